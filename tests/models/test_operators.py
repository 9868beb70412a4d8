"""Both forms of the elementary operators are the same function with the same gradients."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

import plain
from localmim.models.layers import Attention, Mlp, TakeTokens, is_slow_width
from localmim.models.operators import (
    AddBias,
    AddToRows,
    Gelu,
    Normalise,
    Operator,
    Softmax,
    SplitHeads,
    Transpose,
)

RNG = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    """Random numbers with a mean, which a careless variance would lose digits to."""
    return (RNG.standard_normal(shape) + 3).astype(np.float32)


CASES = {
    "bias": (AddBias, (values(7, 5), values(5))),
    "normalise": (lambda: Normalise(1e-6), (values(6, 24), values(24), values(24))),
    "normalise rows of one value": (lambda: Normalise(1e-6), (np.full((3, 8), 5, np.float32), values(8), values(8))),
    "softmax": (Softmax, (values(2, 3, 4, 5),)),
    "gelu": (Gelu, (values(50) - 4,)),
}


@pytest.mark.parametrize("name", CASES)
def test_forms_are_equal(name):
    """What a GPU computes by fused kernels, a CPU computes by products."""
    build, inputs = CASES[name]
    results = []
    for fused in (False, True):
        operator = build()
        operator.fused = fused
        weight = np.random.default_rng(1).standard_normal(inputs[0].shape).astype(np.float32)
        out, gradients, _ = plain.backward(operator, weight, *inputs)
        results.append((out, *gradients))
    for ours, theirs in zip(*results):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("skip", [0, 2])
def test_heads_by_gathering(skip):
    """Queries without the first rows, keys and values of each head, and the gradient of all three."""
    qkv = values(2, 5, 24)

    class All(nn.Cell):
        def __init__(self, fused):
            super().__init__()
            self.split = SplitHeads(2)
            self.split.fused = fused

        def construct(self, x):
            q, k, v = self.split(x, skip)
            return ops.concat((q.reshape(-1), (2 * k * k).reshape(-1), v.reshape(-1)))

    size = 2 * 2 * 4 * (3 * 5 - skip)
    weight = np.arange(size, dtype=np.float32)
    (ours, (mine,), _), (theirs, (plainly,), _) = (plain.backward(All(fused), weight, qkv) for fused in (False, True))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(mine, plainly)


def test_transpose_by_gathering():
    """Axes before the last one in another order."""
    x = values(2, 3, 4, 5)
    weight = values(3, 4, 2, 5)
    results = []
    for fused in (False, True):
        cell = Transpose()
        cell.fused = fused

        class Moved(nn.Cell):
            def __init__(self, cell):
                super().__init__()
                self.move = cell

            def construct(self, x):
                return self.move(x, (1, 2, 0, 3))

        out, (dx,), _ = plain.backward(Moved(cell), weight, x)
        results.append((out, dx))
    np.testing.assert_array_equal(results[0][0], x.transpose(1, 2, 0, 3))
    for ours, theirs in zip(*results):
        np.testing.assert_array_equal(ours, theirs)


def test_tokens_taken_more_than_once():
    """Gradients of a token that is taken twice add up, in both forms."""
    ids = np.array([2, 0, 2], np.int32)
    for fused in (False, True):
        cell = TakeTokens()
        cell.fused = fused
        x, weight = values(2, 3, 4), np.ones((2, 3, 4), np.float32)

        class Taken(nn.Cell):
            def __init__(self, cell):
                super().__init__()
                self.take, self.ids = cell, ms.Tensor(ids)

            def construct(self, x):
                return self.take(x, self.ids)

        out, (dx,), _ = plain.backward(Taken(cell), weight, x)
        np.testing.assert_array_equal(out, x[:, ids])
        np.testing.assert_array_equal(dx[:, :, 0], [[1, 0, 2]] * 2)


def test_add_to_rows():
    """Against numpy, with the gradients of both arguments."""
    x, b, weight = values(3, 4), values(3), values(3, 4)
    out, (dx, db), _ = plain.backward(AddToRows(), weight, x, b)
    np.testing.assert_allclose(out, x + b[:, None], rtol=1e-6)
    np.testing.assert_array_equal(dx, weight)
    np.testing.assert_allclose(db, weight.sum(axis=1), rtol=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
def test_mlp_of_a_slow_width(scaled):
    """ViT-B's hidden layer lies transposed on a CPU, layer scale or not."""
    inputs = (values(2, 3, 4), *([values(4)] if scaled else []))
    results = []
    for fused in (False, True):
        mlp = plain.randomise(Mlp(4, 3072), 0)
        mlp.fused = fused
        out, gradients, weights = plain.backward(mlp, values(2, 3, 4) * 0 + 1, *inputs)
        results.append((out, *gradients, *weights.values()))
    for ours, theirs in zip(*results):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_slow_widths():
    """Multiples of 4096 bytes, but powers of two, which oneDNN copies."""
    assert [w for w in (768, 1024, 1536, 2048, 2304, 3072, 4096, 5120) if is_slow_width(w)] == [3072, 5120]


@pytest.mark.parametrize("skip", [0, 2])
def test_flash_attention_is_called_as_documented(monkeypatch, skip):
    """No CPU has it: a stand-in written from MindSpore's documentation shows that layout, scale and heads are right."""

    def stand_in(query, key, value, head_num, scalar_value=1.0):
        heads = [x.reshape(*x.shape[:2], head_num, -1).transpose(0, 2, 1, 3) for x in (query, key, value)]
        q, k, v = (x.asnumpy().astype(np.float32) for x in heads)
        scores = np.exp(scalar_value * q @ k.transpose(0, 1, 3, 2))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        return ms.Tensor(mixed.transpose(0, 2, 1, 3).reshape(query.shape).astype(np.float16))

    monkeypatch.setattr(ops, "flash_attention_score", stand_in)
    attention = Attention(32, 2)
    assert not attention.flash
    qkv = ms.Tensor(RNG.standard_normal((2, 5, 96)).astype(np.float16))
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        plainly = attention.attend(qkv, skip).asnumpy()
        attention.flash = True
        np.testing.assert_allclose(attention.attend(qkv, skip).asnumpy(), plainly, rtol=0, atol=4e-3)
    finally:
        ms.set_context(mode=mode)


def test_a_cpu_takes_its_own_form():
    """The forms by hand are those that run here."""
    operators = [AddBias(), Normalise(1e-6), Softmax(), Gelu(), Mlp(4, 8)]
    assert not any(operator.fused for operator in operators)
    assert all(isinstance(operator, Operator) and isinstance(operator, nn.Cell) for operator in operators)

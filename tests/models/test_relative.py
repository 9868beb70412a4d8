"""Relative places: classes of offsets against plain formulas, biases against plain products."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from localmim.models.layers import Attention, Block, set_compute_dtype
from localmim.models.relative import (
    BUCKETS,
    ContextualBias,
    TableBias,
    buckets,
    coarse_offset,
    offset_classes,
)
from localmim.models.vit import VisionTransformer

rng = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def without_compiling():
    """Golden files hold the graphs to the authors' values; here single layers are looked at."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def test_coarse_offsets():
    """iRPE at its ratio of 1.9: 0, 1 and 2 are their own classes, 3 is with 2, all beyond are 3."""
    assert coarse_offset(np.arange(-6, 7)).tolist() == [-3, -3, -3, -2, -2, -1, 0, 1, 2, 2, 3, 3, 3]


def test_buckets_do_not_depend_on_the_grid():
    """A pair two rows up and one column left has one class everywhere: weights go from windows to whole images."""
    small, large = buckets((5, 5)), buckets((9, 12))
    assert small[1 + 2 * 5 + 1, 1 + 0 * 5 + 0] == large[1 + 6 * 12 + 5, 1 + 4 * 12 + 4] == (2 + 3) * 7 + 1 + 3
    assert (large[0] == BUCKETS - 1).all() and (large[:, 0] == BUCKETS - 1).all()
    assert np.unique(large[1:, 1:]).tolist() == list(range(BUCKETS - 1))


def test_offset_classes():
    """BEiT's order: offsets first, then class token to patch, patch to class token, class token to itself."""
    h, w = 3, 2
    classes = offset_classes((h, w))
    assert classes[0, 1:].tolist() == [15] * 6 and classes[1:, 0].tolist() == [16] * 6 and classes[0, 0] == 17
    for a in range(6):
        for b in range(6):
            i, j = a // w - b // w + h - 1, a % w - b % w + w - 1
            assert classes[1 + a, 1 + b] == i * (2 * w - 1) + j


def test_table_bias():
    """Each pair and head gets its number; rows that are skipped leave the rest as it is."""
    bias = TableBias((2, 2), 3)
    table = rng.normal(size=bias.table.shape).astype(np.float32)
    bias.table.set_data(Tensor(table))
    classes = offset_classes((2, 2))
    whole = bias(None, Tensor(classes)).asnumpy()
    assert np.array_equal(whole, table[classes].transpose(2, 0, 1)[None])
    assert np.array_equal(bias(None, Tensor(classes), 2).asnumpy(), whole[:, :, 2:])


def test_contextual_bias():
    """q_i . R[:, class(i, j)], the query as it comes; the same in the rows that remain when some are skipped."""
    bias = ContextualBias(4)
    table = rng.normal(size=(1, 4, BUCKETS)).astype(np.float32)
    bias.table.set_data(Tensor(table))
    classes = buckets((2, 3))
    q = rng.normal(size=(2, 3, 7, 4)).astype(np.float32)
    expected = np.einsum("bhid,dij->bhij", q, table[0][:, classes])
    assert np.allclose(bias(Tensor(q), Tensor(classes)).asnumpy(), expected, atol=1e-5)
    assert np.allclose(bias(Tensor(q[:, :, 2:]), Tensor(classes), 2).asnumpy(), expected[:, :, 2:], atol=1e-5)


def test_key_biases_change_nothing():
    """Why one fused bias serves BEiT, which has none for keys."""
    attention = Attention(8, 2)
    qkv = rng.normal(size=(2, 5, 24)).astype(np.float32)
    moved = qkv + np.concatenate([np.zeros(8), rng.normal(size=8), np.zeros(8)]).astype(np.float32)
    ours, theirs = (attention.attend(Tensor(x)).asnumpy() for x in (qkv, moved))
    assert np.allclose(ours, theirs, atol=1e-5)


def test_layer_scale_multiplies_the_branches():
    """Its factors are folded into weights; at 0 a block is the identity, at 1 it is a block without them."""
    ms.set_seed(3)
    plain, scaled = Block(8, 2), Block(8, 2, layer_scale=1.0)
    for name, p in plain.parameters_and_names():
        dict(scaled.parameters_and_names())[name].set_data(p)
    x = Tensor(rng.normal(size=(2, 5, 8)).astype(np.float32))
    assert np.allclose(plain(x).asnumpy(), scaled(x).asnumpy(), atol=1e-6)
    scaled.gamma_1.set_data(Tensor(np.zeros(8, np.float32)))
    scaled.gamma_2.set_data(Tensor(np.zeros(8, np.float32)))
    assert np.array_equal(scaled(x).asnumpy(), x.asnumpy())


def test_a_hidden_pixel_is_not_seen():
    """With a mask token nothing of a hidden patch reaches any output."""
    encoder = VisionTransformer(16, 4, 3, 16, 2, 2, taps=(1,), mask_token=True, position="learned")
    images = rng.normal(size=(2, 3, 16, 16)).astype(np.float32)
    hidden = np.zeros((2, 16), np.float32)
    hidden[:, [0, 6]] = 1
    other = images.copy()
    other[:, :, :4, :4] += 3  # patch 0
    other[:, :, 4:8, 8:12] -= 2  # patch 6
    arrays = Tensor(hidden), Tensor(np.array([[0, 6]] * 2, np.int32))
    one, two = (encoder(Tensor(x), *arrays)[0].asnumpy() for x in (images, other))
    assert np.array_equal(one, two)
    assert not np.allclose(encoder.features(Tensor(images)).asnumpy(), encoder.features(Tensor(other)).asnumpy())


@pytest.mark.parametrize("relative", ["contextual", "shared"])
def test_half_precision(relative):
    """Without position codes the embedding must widen by itself: the residual stream is float32 in any precision."""
    encoder = VisionTransformer(16, 4, 3, 16, 1, 2, taps=(0,), mask_token=True, position="none", relative=relative)
    arrays = Tensor(np.eye(16, dtype=np.float32)[:2]), Tensor(np.array([[0], [1]], np.int32))
    images = Tensor(rng.normal(size=(2, 3, 16, 16)).astype(np.float32))
    whole = encoder(images, *arrays)[0].asnumpy()
    half = set_compute_dtype(encoder, ms.float16)(images, *arrays)[0]
    assert half.dtype == ms.float32
    np.testing.assert_allclose(half.asnumpy(), whole, atol=2e-2)

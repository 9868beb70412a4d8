"""AdamW against PyTorch's definition in float64, the decay groups, and the state that checkpoints hold."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from localmim.training.optimizer import AdamW, Group, Momentum, WeightAverage, decays

SHAPES = {
    "encoder.blocks.0.attn.qkv.weight": (6, 4),
    "encoder.blocks.0.attn.qkv.bias": (6,),
    "encoder.blocks.0.norm1.gamma": (4,),
    "encoder.blocks.0.norm1.beta": (4,),
    "decoders.0.mask_token": (1, 1, 4),
    "encoder.patch_embed.weight": (4, 3, 2, 2),
}
DECAYING = {"encoder.blocks.0.attn.qkv.weight", "decoders.0.mask_token", "encoder.patch_embed.weight"}


def parameters(seed: int) -> dict[str, Parameter]:
    rng = np.random.default_rng(seed)
    return {n: Parameter(Tensor(rng.normal(size=s).astype(np.float32)), name=n) for n, s in SHAPES.items()}


def gradients(seed: int, size: float) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=s) * size).astype(np.float32) for s in SHAPES.values()]


class PlainAdamW:
    """torch.optim.AdamW's documented update, float64."""

    def __init__(self, weights: dict[str, np.ndarray], betas, eps: float, weight_decay: float):
        self.weights = {n: w.astype(np.float64) for n, w in weights.items()}
        self.m = {n: np.zeros(w.shape) for n, w in weights.items()}
        self.v = {n: np.zeros(w.shape) for n, w in weights.items()}
        self.betas, self.eps, self.weight_decay, self.t = betas, eps, weight_decay, 0

    def step(self, grads: list[np.ndarray], lr: float) -> None:
        self.t += 1
        b1, b2 = self.betas
        for (name, w), g in zip(self.weights.items(), grads):
            if name in DECAYING:
                w = w * (1 - lr * self.weight_decay)
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g.astype(np.float64) ** 2
            m, v = self.m[name] / (1 - b1**self.t), self.v[name] / (1 - b2**self.t)
            self.weights[name] = w - lr * m / (np.sqrt(v) + self.eps)


@pytest.mark.parametrize(
    ("betas", "eps", "size"),
    [((0.9, 0.95), 1e-8, 1.0), ((0.9, 0.999), 1e-3, 1e-3)],
    ids=["pre-training", "eps as large as the gradients"],
)
def test_five_updates_equal_pytorchs(betas, eps, size):
    """Bias correction, decoupled decay and where eps is added: each moves the second case by percents if wrong."""
    ours = parameters(0)
    optimizer = AdamW(ours, betas, eps, weight_decay=0.05)
    plain = PlainAdamW({n: p.asnumpy() for n, p in ours.items()}, betas, eps, 0.05)
    for update, lr in enumerate((1e-3, 1e-2, 3e-2, 2e-2, 5e-3), start=1):
        grads = gradients(update, size)
        optimizer(tuple(map(Tensor, grads)), *optimizer.scalars(lr, update))
        plain.step(grads, lr)
    state = optimizer.state()
    for name, p in ours.items():
        np.testing.assert_allclose(p.asnumpy(), plain.weights[name], atol=1e-6, rtol=0, err_msg=name)
        np.testing.assert_allclose(state[f"first.{name}"], plain.m[name], atol=1e-6 * size, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(state[f"second.{name}"], plain.v[name], atol=0, rtol=1e-4, err_msg=name)


def test_decay_groups():
    """Matrices, kernels and tokens decay; biases and norms do not, whatever their shape."""
    assert {n for n, p in parameters(0).items() if decays(n, p)} == DECAYING
    matrix = Parameter(Tensor(np.zeros((2, 3), np.float32)))
    assert decays("a.weight", matrix) and not decays("a.bias", matrix) and not decays("a.beta", matrix)


def test_state_round_trip():
    """A resumed run must make bit for bit the updates that it would have made."""
    first, second = parameters(1), parameters(2)
    a = AdamW(first)
    for update in (1, 2):
        a(tuple(map(Tensor, gradients(update, 1))), *a.scalars(1e-2, update))
    b = AdamW(second)
    b.load_state(a.state())
    for name, p in second.items():
        p.set_data(Tensor(first[name].asnumpy()))
    for optimizer in (a, b):
        optimizer(tuple(map(Tensor, gradients(3, 1))), *optimizer.scalars(2e-2, 3))
    for name in SHAPES:
        np.testing.assert_array_equal(first[name].asnumpy(), second[name].asnumpy(), err_msg=name)
    assert a.state().keys() == {f"{kind}.{n}" for kind in ("first", "second") for n in SHAPES}
    for name, array in a.state().items():
        np.testing.assert_array_equal(b.state()[name], array, err_msg=name)


def test_incomplete_state_is_refused():
    """A checkpoint of another model may not leave moments as they were."""
    optimizer = AdamW(parameters(3))
    state = optimizer.state()
    del state["second.decoders.0.mask_token"]
    with pytest.raises(KeyError, match="mask_token"):
        optimizer.load_state(state)


def test_layer_wise_rates():
    """A group's share multiplies the whole scheduled rate, of the decay too, as separate learning rates would."""
    scales = {n: 0.5**i for i, n in enumerate(SHAPES)}
    ours = parameters(0)
    optimizer = AdamW(ours, groups={n: Group(s, n in DECAYING) for n, s in scales.items()})
    plain = {n: PlainAdamW({n: p.asnumpy()}, (0.9, 0.95), 1e-8, 0.05) for n, p in ours.items()}
    for update, lr in enumerate((1e-2, 3e-2), start=1):
        grads = gradients(update, 1)
        optimizer(tuple(map(Tensor, grads)), *optimizer.scalars(lr, update))
        for (name, one), g in zip(plain.items(), grads):
            one.step([g], lr * scales[name])
    for name, p in ours.items():
        np.testing.assert_allclose(p.asnumpy(), plain[name].weights[name], atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.parametrize("trust", [0.0, 0.001], ids=["sgd", "lars"])
def test_momentum_and_lars(trust):
    """MAE's LARS in float64: matrices decay and are scaled to 0.001 of their norm, 1-D tensors are left alone."""
    ours = parameters(0)
    optimizer = Momentum(ours, 0.9, 0.1, trust)
    weights = {n: p.asnumpy().astype(np.float64) for n, p in ours.items()}
    velocity = {n: 0.0 for n in weights}
    for update in (1, 2, 3):
        grads = gradients(update, 1)
        optimizer(tuple(map(Tensor, grads)), *optimizer.scalars(0.5, update))
        for (name, w), g in zip(weights.items(), grads):
            g = g + 0.1 * w if name in DECAYING else g.astype(np.float64)
            if trust and w.ndim > 1:
                g = g * trust * np.linalg.norm(w) / np.linalg.norm(g)
            velocity[name] = 0.9 * velocity[name] + g
            weights[name] = w - 0.5 * velocity[name]
    for name, p in ours.items():
        np.testing.assert_allclose(p.asnumpy(), weights[name], atol=2e-6, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(optimizer.state()[f"velocity.{name}"], velocity[name], atol=2e-6, err_msg=name)


def test_lars_starts_from_a_zero_weight():
    """A weight of norm 0 takes the plain step: its scaled one would be nothing, forever."""
    name = "head.weight"
    weight = {name: Parameter(Tensor(np.zeros((2, 3), np.float32)), name=name)}
    optimizer = Momentum(weight, 0.9, 0.0, 0.001)
    optimizer((Tensor(np.ones((2, 3), np.float32)),), *optimizer.scalars(0.5, 1))
    np.testing.assert_allclose(weight[name].asnumpy(), -0.5)


def test_weight_average():
    """decay x average + (1 - decay) x weight at each call, from the weights that it began with."""
    ours = parameters(0)
    average = WeightAverage(ours, 0.75)
    expected = {n: p.asnumpy() for n, p in ours.items()}
    for seed in (1, 2):
        for name, p in parameters(seed).items():
            ours[name].set_data(Tensor(p.asnumpy()))
            expected[name] = 0.75 * expected[name] + 0.25 * p.asnumpy()
        average()
    for name, value in average.state().items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6, err_msg=name)

"""The optimizer step as a graph: what is skipped, accumulated, clipped and scaled, on a model of two weights."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from localmim.training.optimizer import AdamW
from localmim.training.step import LossScaler, TrainStep

LR = 0.01


class Tiny(nn.Cell):
    """x [n, 3] -> mean square of x W^T + b, in two parts."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        self.weight = Parameter(Tensor(rng.normal(size=(2, 3)).astype(np.float32)))
        self.bias = Parameter(Tensor(rng.normal(size=2).astype(np.float32)))

    def construct(self, x):
        y = ops.matmul(x, self.weight.T) + self.bias
        losses = (y * y).mean(axis=0)
        return losses.sum(), losses


class Setup:
    """A model, its optimizer and a step."""

    def __init__(self, **kwargs):
        self.model = Tiny()
        self.optimizer = AdamW(dict(self.model.parameters_and_names()))
        self.step = TrainStep(self.model, self.optimizer, **kwargs)

    def weights(self) -> dict[str, np.ndarray]:
        return {n: p.asnumpy().copy() for n, p in self.model.parameters_and_names()}

    def everything(self) -> dict[str, np.ndarray]:
        """Weights and moments."""
        return {**self.weights(), **{n: a.copy() for n, a in self.optimizer.state().items()}}

    def gradients(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Of the loss at the weights as they are, by hand, float64."""
        w = self.weights()
        y = x.astype(np.float64) @ w["weight"].T + w["bias"]
        return {"weight": 2 * y.T @ x / len(x), "bias": 2 * y.mean(0)}


def batch(seed: int, n: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)


def bad_batch() -> np.ndarray:
    x = batch(9)
    x[1, 2] = np.nan
    return x


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[n], b[n]) for n in a)


def first_moments(setup: Setup, gradients: dict[str, np.ndarray], factor: float = 1.0) -> None:
    """After one update from zero the first moment is a tenth of the gradient."""
    state = setup.optimizer.state()
    for name, gradient in gradients.items():
        expected = 0.1 * factor * gradient
        np.testing.assert_allclose(
            state[f"first.{name}"], expected, atol=1e-6 * np.abs(expected).max(), rtol=0, err_msg=name
        )


def test_good_step():
    """Loss, parts and gradients are those of the weights before the update; without clipping no norm is computed."""
    setup, x = Setup(), batch(1)
    before, gradients = setup.weights(), setup.gradients(x)
    result = setup.step([(x,)], LR, 1)
    y = x @ before["weight"].T + before["bias"]
    assert result.finite and result.grad_norm is None
    np.testing.assert_allclose(result.losses, (y * y).mean(0), rtol=1e-6)
    assert result.loss == pytest.approx(float(result.losses.sum()), rel=1e-6)
    first_moments(setup, gradients)
    moved = setup.weights()
    for name, gradient in gradients.items():  # the first step of Adam is lr long, against the gradient
        decayed = before[name] * (1 - LR * 0.05 * (name == "weight"))
        np.testing.assert_allclose(moved[name], decayed - LR * np.sign(gradient), atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"clip": 1.0}, {"scaler": LossScaler(True, 8.0)}], ids=["plain", "clip", "fp16"]
)
def test_a_nan_changes_nothing(options):
    """One bad image must not destroy days of training: no weight, no moment, no decay; and the next step is as ever."""
    setup, undisturbed = Setup(**options), Setup(**options)
    assert setup.step([(batch(1),)], LR, 1).finite and undisturbed.step([(batch(1),)], LR, 1).finite
    before = setup.everything()
    result = setup.step([(bad_batch(),)], LR, 2)
    assert not result.finite and np.isnan(result.loss)
    assert same(before, setup.everything())
    if "scaler" not in options:
        assert setup.step([(batch(2),)], LR, 2).finite and undisturbed.step([(batch(2),)], LR, 2).finite
        assert same(setup.everything(), undisturbed.everything())


class FiniteLoss(nn.Cell):
    """A loss of 0 whose gradient is not finite."""

    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor(np.zeros((2, 1), np.float32)))

    def construct(self, x):
        losses = ops.sqrt(ops.abs(ops.matmul(x, self.weight))).sum(axis=0)
        return losses.sum(), losses


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite(clip):
    """The loss can look fine where the gradient is not: both are looked at."""
    model = FiniteLoss()
    optimizer = AdamW(dict(model.parameters_and_names()))
    result = TrainStep(model, optimizer, clip=clip)([(np.ones((3, 2), np.float32),)], LR, 1)
    assert result.loss == 0 and not result.finite
    assert not model.weight.asnumpy().any() and not optimizer.state()["first.weight"].any()


def test_accumulation_equals_one_batch():
    """Two halves give the mean gradient of the whole, in both of two successive steps: buffers start at zero again."""
    whole, halves = Setup(), Setup(accumulate=2)
    for update in (1, 2):
        x = batch(update, 8)
        gradients = halves.gradients(x)
        a, b = whole.step([(x,)], LR, update), halves.step([(x[:4],), (x[4:],)], LR, update)
        assert a.finite and b.finite
        assert b.loss == pytest.approx(a.loss, rel=1e-6)
        np.testing.assert_allclose(b.losses, a.losses, rtol=1e-6)
        if update == 1:
            first_moments(halves, gradients)
        for name, expected in whole.everything().items():
            np.testing.assert_allclose(
                halves.everything()[name], expected, atol=1e-6 * np.abs(expected).max(), rtol=0, err_msg=name
            )


def test_a_nan_in_one_half():
    """The step is skipped whole, and nothing of it is left in the buffers: the next step equals an undisturbed one."""
    setup, undisturbed = Setup(accumulate=2), Setup(accumulate=2)
    before = setup.everything()
    assert not setup.step([(batch(1),), (bad_batch(),)], LR, 1).finite
    assert same(before, setup.everything())
    for s in (setup, undisturbed):
        assert s.step([(batch(2),), (batch(3),)], LR, 1).finite
    assert same(setup.everything(), undisturbed.everything())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clipping(accumulate):
    """All gradients together are scaled to the norm, and the norm before that is reported; smaller ones stay."""
    x = batch(4, 4)
    parts = [(x,)] * accumulate  # the mean of equal parts is the part
    clipped, untouched = Setup(clip=0.5, accumulate=accumulate), Setup(clip=1e6, accumulate=accumulate)
    gradients = clipped.gradients(x)
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert norm > 1
    for setup, factor in ((clipped, 0.5 / (norm + 1e-6)), (untouched, 1.0)):
        result = setup.step(parts, LR, 1)
        assert result.finite and result.grad_norm == pytest.approx(norm, rel=1e-6)
        first_moments(setup, gradients, factor)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_scale(accumulate):
    """An overflow halves the scale and skips the step; `patience` good steps double it; results do not see it."""
    x = batch(5)
    parts = [(x,)] * accumulate
    scaler = LossScaler(True, scale=2.0**127, patience=2)
    setup = Setup(scaler=scaler, accumulate=accumulate)
    before, gradients = setup.everything(), setup.gradients(x)
    result = setup.step(parts, LR, 1)
    assert not result.finite and scaler.scale == 2.0**126
    assert np.isfinite(result.loss)  # of the loss itself, not of its multiple
    assert same(before, setup.everything())
    scaler.load_state({"scale": 2.0**20, "good_steps": 0})
    assert setup.step(parts, LR, 1).finite
    first_moments(setup, gradients)
    assert scaler.scale == 2.0**20
    assert setup.step(parts, LR, 2).finite
    assert scaler.scale == 2.0**21


def test_loss_scaler_counts():
    """A bad step starts the count again; the scale stays at 1 or above; its state survives; off means 1 forever."""
    scaler = LossScaler(True, scale=4.0, patience=3)
    for finite in (True, True, False, True, True):
        scaler.update(finite)
    assert scaler.state() == {"scale": 2.0, "good_steps": 2}
    other = LossScaler(True, patience=3)
    other.load_state(scaler.state())
    other.update(True)
    assert other.state() == {"scale": 4.0, "good_steps": 0}
    for _ in range(5):
        other.update(False)
    assert other.scale == 1.0
    off = LossScaler(False)
    for finite in (False, True):
        off.update(finite)
    assert off.state() == {"scale": 1.0, "good_steps": 0}
    assert LossScaler(True).scale == 65536.0 and LossScaler(True).patience == 2000  # the authors'

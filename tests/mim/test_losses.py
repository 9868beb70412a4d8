"""Losses against float64 numpy, values and gradients, in graph mode."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from localmim.mim.losses import cross_entropy, squared_error, weighted_mean


class Mean(nn.Cell):
    """The mean of a loss over rows, and the gradient of the prediction."""

    def __init__(self, error, weights: Tensor | None):
        super().__init__()
        self.error, self.weights = error, weights
        self.gradient = ms.value_and_grad(self.mean, 0)

    def mean(self, prediction: Tensor, target: Tensor) -> Tensor:
        return weighted_mean(self.error(prediction, target), self.weights)

    def construct(self, prediction: Tensor, target: Tensor):
        return self.gradient(prediction, target)


class Error(nn.Cell):
    """Errors of the rows, as a graph."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def construct(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.error(prediction, target)


def plain_cross_entropy(logits: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Errors [B, R] and softmax - one-hot [B, R, V], float64."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    sums = np.exp(x).sum(axis=-1, keepdims=True)
    own = np.take_along_axis(x, ids[..., None].astype(np.int64), axis=-1)
    hot = np.arange(x.shape[-1]) == ids[..., None]
    return (np.log(sums) - own)[..., 0], np.exp(x) / sums - hot


def row_weights(weighted: bool) -> tuple[Tensor | None, np.ndarray]:
    """Weights of 2 x 5 rows, some of them 0, for the loss; and each row's share of the mean."""
    if not weighted:
        return None, np.full((2, 5), 0.1)
    values = np.array([[0, 0.25, 1, 0.5, 0], [0.75, 0, 0, 1, 1]])
    return Tensor(values.astype(np.float32)), values / values.sum()


@pytest.mark.parametrize("weighted", [False, True])
def test_squared_error(weighted):
    """Mean over a row's values, then over the rows; a row of weight 0 has no gradient."""
    generator = np.random.default_rng(0)
    p, t = generator.normal(1, 2, (2, 2, 5, 7)).astype(np.float32)
    weights, shares = row_weights(weighted)
    difference = p.astype(np.float64) - t
    errors = Error(squared_error)(Tensor(p), Tensor(t))
    np.testing.assert_allclose(errors.asnumpy(), (difference**2).mean(axis=-1), rtol=1e-6)
    loss, gradient = Mean(squared_error, weights)(Tensor(p), Tensor(t))
    np.testing.assert_allclose(float(loss), ((difference**2).mean(axis=-1) * shares).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient.asnumpy(), 2 / 7 * difference * shares[..., None], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_cross_entropy(scale, weighted):
    """Logits far beyond what exp can take, and rows where the id's share of the softmax is 0 in float32."""
    generator = np.random.default_rng(1)
    logits = (generator.normal(size=(2, 5, 11)) * scale).astype(np.float32)
    ids = generator.integers(0, 11, (2, 5)).astype(np.int32)
    ids[0, 2] = logits[0, 2].argmin()
    ids[1, 3] = logits[1, 3].argmax()
    weights, shares = row_weights(weighted)
    expected, slope = plain_cross_entropy(logits, ids)
    errors = Error(cross_entropy)(Tensor(logits), Tensor(ids[..., None]))
    np.testing.assert_allclose(errors.asnumpy(), expected, rtol=1e-5, atol=1e-6 * scale)
    loss, gradient = Mean(cross_entropy, weights)(Tensor(logits), Tensor(ids[..., None]))
    np.testing.assert_allclose(float(loss), (expected * shares).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient.asnumpy(), slope * shares[..., None], atol=1e-6)


@pytest.mark.parametrize("error", [squared_error, cross_entropy])
def test_half_precision_predictions(error):
    """A decoder in fp16 gives fp16 predictions; the error is worked out in float32 all the same."""
    generator = np.random.default_rng(2)
    p = (generator.normal(size=(1, 3, 600)) * 300).astype(np.float16)
    t = generator.integers(0, 600, (1, 3)) if error is cross_entropy else generator.normal(size=(1, 3, 600))
    t = t.astype(np.int32 if error is cross_entropy else np.float32)
    got = Error(error)(Tensor(p), Tensor(t[..., None] if error is cross_entropy else t))
    assert got.dtype == ms.float32
    if error is cross_entropy:
        expected = plain_cross_entropy(p, t)[0]
    else:
        expected = ((p.astype(np.float64) - t) ** 2).mean(axis=-1)  # about 9e4: more than fp16 holds
    np.testing.assert_allclose(got.asnumpy(), expected, rtol=1e-5)

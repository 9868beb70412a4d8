"""Targets: what is predicted for a cell, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

import plain
from localmim.mim.targets import HogTarget, PixelTarget


def patches(images: np.ndarray, cell: int) -> np.ndarray:
    """[B, C, H, W] -> [B, hs, ws, cell*cell*C], values ordered (row, column, channel), one loop a cell, float64."""
    B, C, H, W = images.shape
    out = np.empty((B, H // cell, W // cell, cell * cell * C))
    for i in range(H // cell):
        for j in range(W // cell):
            square = images[:, :, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell]
            out[:, i, j] = np.moveaxis(square, 1, -1).reshape(B, -1)
    return out


@pytest.mark.parametrize("chans", [1, 4])
def test_normalised_pixels(chans):
    """Mean and *unbiased* variance over all values of a cell, all channels together; channel fastest."""
    images = np.random.default_rng(0).normal(0.3, 2, (2, chans, 8, 16)).astype(np.float32)
    target = PixelTarget((2, 4, 8), chans)
    assert target.dims == [4 * chans, 16 * chans, 64 * chans]
    for cell, got in zip((2, 4, 8), target(Tensor(images))):
        x = patches(images, cell)
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(got.asnumpy(), expected, atol=2e-5, rtol=0)


def test_raw_pixels():
    """Without norm_pix they are the input's own values."""
    images = np.random.default_rng(1).normal(size=(2, 3, 4, 8)).astype(np.float32)
    (got,) = PixelTarget((4,), 3, normalise=False)(Tensor(images))
    np.testing.assert_array_equal(got.asnumpy(), patches(images, 4).astype(np.float32))


def test_flat_cell_is_zero():
    """A patch of sky has no variance; dividing by it must not end the run."""
    images = np.full((1, 3, 8, 8), -1.7, np.float32)
    for got in PixelTarget((4, 8), 3)(Tensor(images)):
        np.testing.assert_allclose(got.asnumpy(), 0, atol=1e-3)


def test_hog_target():
    """Values of a cell: the channels' histograms one after the other, as in the authors' predictions."""
    images = np.random.default_rng(2).normal(size=(1, 3, 8, 16)).astype(np.float32)
    target = HogTarget((4, 8), 3, nbins=6)
    assert target.dims == [18, 18]
    for cell, got in zip((4, 8), target(Tensor(images))):
        expected = plain.hog(images, cell, 6)
        np.testing.assert_allclose(got.asnumpy(), expected.reshape((*expected.shape[:3], 18)), atol=1e-5)


def test_hog_bias_draw():
    """One pair a scale, U(-1/3, 1/3), by the run's seed: a resumed run must have the same targets."""
    values = [HogTarget((2,) * 500, 3, 9, bias=True, seed=s).hog.bias.asnumpy() for s in (0, 0, 1)]
    np.testing.assert_array_equal(values[0], values[1])
    assert np.abs(values[0] - values[2]).max() > 0.1
    assert values[0].shape == (500, 2) and 0.32 < np.abs(values[0]).max() <= 1 / 3
    assert HogTarget((2,), 3, 9).hog.bias is None

"""The HOG operator against a plain float64 version written from the definition."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import plain
from localmim.mim.hog import Hog


def near_an_edge(images: np.ndarray, nbins: int, bias=(0.0, 0.0)) -> np.ndarray:
    """Pixels [B, C, H, W] whose orientation lies so close to a bin's edge that float32 rounding may move them."""
    gx, gy = plain.sobel(images)
    place = np.arctan2(gx + bias[0], gy + bias[1]) / np.pi * nbins
    return np.abs(place - np.round(place)) < 1e-4


def scene(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Random images. The reflected border makes one gradient exactly 0 there: a bin's edge, but an exact one."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def agree(got: np.ndarray, images: np.ndarray, cell: int, nbins: int, bias=(0.0, 0.0)) -> float:
    """Largest difference over cells where no pixel's bin depends on rounding; at least half of them must be such."""
    B, C, H, W = images.shape
    expected = plain.hog(images, cell, nbins, bias)
    assert got.shape == expected.shape and got.dtype == np.float32
    near = near_an_edge(images, nbins, bias)
    gx, gy = plain.sobel(images)
    if not np.any(bias):
        near &= (gx != 0) & (gy != 0)  # exact zeros are exact in float32 too
    clear = ~near.reshape(B, C, H // cell, cell, W // cell, cell).any((3, 5)).transpose(0, 2, 3, 1)
    assert clear.mean() > 0.5
    return float(np.abs(got - expected)[clear].max())


@pytest.mark.parametrize(
    ("shape", "cells", "nbins"),
    [
        ((2, 3, 32, 32), (4, 8, 16), 9),
        ((1, 1, 24, 36), (6, 4), 9),  # the finest common cell, 2 px, is not asked for
        ((2, 4, 12, 24), (12, 3), 8),
        ((1, 3, 16, 8), (4,), 5),
        ((1, 3, 16, 24), (8, 2), 18),
        ((1, 1, 6, 10), (2, 1), 1),
    ],
)
def test_equals_the_definition(shape, cells, nbins):
    """All cells from one pass, any channels, rectangles, bins and cell sizes."""
    images = scene(0, shape)
    outputs = Hog(cells, nbins)(Tensor(images))
    assert len(outputs) == len(cells)
    for cell, out in zip(cells, outputs):
        assert agree(out.asnumpy(), images, cell, nbins) < 1e-5


def test_every_bin_is_used_and_folded():
    """Opposite gradients share a bin, and each orientation has its own: a wrong fold or argument order moves them."""
    nbins, n = 9, 36
    angles = (np.arange(n) + 0.5) / n * 2 * np.pi - np.pi  # away from edges: four a bin, two and two opposite
    i, j = np.mgrid[:8, :8]
    # gx (left minus right) = sin, gy (top minus bottom) = cos of the orientation
    ramps = [-(np.sin(a) * j + np.cos(a) * i) for a in angles]
    images = np.stack(ramps)[:, None].astype(np.float32)
    (out,) = Hog((2,), nbins)(Tensor(images))
    inner = out.asnumpy()[:, 1:3, 1:3, 0]  # [n, 2, 2, nbins], away from the reflected border
    expected = np.floor(angles / np.pi * nbins).astype(int) % nbins
    np.testing.assert_array_equal(inner.argmax(-1), np.broadcast_to(expected[:, None, None], (n, 2, 2)))
    np.testing.assert_allclose(inner.max(-1), 1, atol=1e-6)
    assert set(expected) == set(range(nbins))


def test_bias():
    """Each cell size has its own pair, added to the gradients before everything else."""
    images = scene(1, (2, 3, 16, 32))
    bias = np.array([[0.3, -0.2], [-0.25, 0.1], [0.05, 0.33]], np.float32)
    for cell, pair, out in zip((4, 8, 16), bias, Hog((4, 8, 16), 18, bias)(Tensor(images))):
        assert agree(out.asnumpy(), images, cell, 18, pair) < 1e-5
        assert np.abs(out.asnumpy() - plain.hog(images, cell, 18)).max() > 1e-2


def test_ties_are_exact():
    """Where one gradient is exactly 0: phase 0 or pi is bin 0, a right angle bin nbins / 2 (even nbins)."""
    i, j = np.mgrid[:8, :8].astype(np.float32)
    images = np.stack([-j, j, -i, i])[:, None]  # gradients: left-right up, down; top-bottom up, down
    (out,) = Hog((4,), 8)(Tensor(images))
    bins = out.asnumpy()[:, :, :, 0].argmax(-1)  # [4, 2, 2]
    np.testing.assert_array_equal(bins, np.array([4, 4, 0, 0])[:, None, None] * np.ones((2, 2), int))


def test_float16_images_give_float32():
    """Targets are computed in float32 whatever the rest runs in: float16 gradients would move bins."""
    images = scene(2, (2, 3, 16, 16)).astype(np.float16)
    (out,) = Hog((4,), 9)(Tensor(images))
    assert out.dtype == ms.float32
    assert agree(out.asnumpy(), images.astype(np.float32), 4, 9) < 1e-5


@pytest.mark.parametrize("biased", [False, True])
def test_flat_image_is_zero(biased):
    """No gradient, no direction: zeros, not 0 / 0. With a bias the same direction everywhere."""
    bias = np.array([[0.3, -0.2]], np.float32) if biased else None
    (out,) = Hog((4,), 9, bias)(Tensor(np.full((1, 3, 8, 8), 0.7, np.float32)))
    expected = plain.hog(np.zeros((1, 3, 8, 8)), 4, 9, bias[0]) if biased else np.zeros((1, 2, 2, 3, 9))
    np.testing.assert_allclose(out.asnumpy(), expected, atol=1e-6)


class Sum(nn.Cell):
    """Images times a weight, plus their HOG."""

    def __init__(self):
        super().__init__()
        self.hog = Hog((4,), 9)

    def construct(self, images, weight):
        (out,) = self.hog(images * weight)
        return (out * out).sum() * 10 + (images * weight).sum(), out


def test_no_gradient():
    """A target is data: only the second term may reach the input."""
    images = scene(3, (1, 1, 8, 8))
    _, (dx, dw) = plain.Gradients(Sum(), (0, 1), None)(Tensor(images), Tensor(2.0))
    np.testing.assert_allclose(dx.asnumpy(), np.full_like(images, 2))
    assert float(dw.asnumpy()) == pytest.approx(float(images.sum()), rel=1e-4)


def test_bias_is_frozen():
    """It is stored in checkpoints and never trained."""
    (bias,) = Hog((4, 8), 9, np.ones((2, 2))).get_parameters()
    assert not bias.requires_grad and bias.shape == (2, 2)


def test_graph_equals_pynative():
    """Debugging in PyNative mode must show what the graph computes."""
    images = Tensor(scene(4, (1, 3, 8, 16)))
    hog = Hog((4, 8), 9)
    graph = [x.asnumpy() for x in hog(images)]
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        eager = [x.asnumpy() for x in hog(images)]
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
    for a, b in zip(graph, eager):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (((), 9), "at least 1"),
        (((4, 0), 9), r"cells \[4, 0\]"),
        (((4,), 0), "nbins 0"),
        (((4, 8), 9, np.zeros((1, 2))), r"\[2, 2\], got \[1, 2\]"),
    ],
)
def test_refuses_arguments(arguments, said):
    """Named when the operator is built."""
    with pytest.raises(ValueError, match=said):
        Hog(*arguments)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 3, 16, 18), "an image of 16x18 pixels does not divide into HOG cells of 4 px"),
        ((1, 3, 8, 8), "8x8 pixels does not divide into HOG cells of 16 px"),
        ((3, 16, 16), "takes images"),
        ((1, 3, 1, 16), "at least 2x2 pixels, got 1x16"),
    ],
)
def test_refuses_images(shape, said):
    """A size that does not divide is named while the graph is made, instead of dropping the rest of the image."""
    with pytest.raises(ValueError, match=said):
        Hog((4, 16), 9)(Tensor(np.zeros(shape, np.float32)))

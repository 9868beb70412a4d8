"""Glyphs of HOG lie along the edges of the image that they are drawn over."""

from __future__ import annotations

import numpy as np
import pytest

from localmim.analysis.glyphs import hog_glyphs


def hog_of(image: np.ndarray, cell: int, nbins: int = 9) -> np.ndarray:
    """HOG of [H, W] by the definition: [H/cell, W/cell, 1, nbins]."""
    x = np.pad(image, 1, "reflect")
    rows = x[:-2] + 2 * x[1:-1] + x[2:]
    cols = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    g0, g1 = rows[:, :-2] - rows[:, 2:], cols[:-2] - cols[2:]  # left minus right, top minus bottom
    bins = np.floor(np.arctan2(g0, g1) / np.pi * nbins).astype(int) % nbins
    votes = np.hypot(g0, g1)[..., None] * np.eye(nbins)[bins]  # [H, W, nbins]
    H, W = image.shape
    hog = votes.reshape(H // cell, cell, W // cell, cell, nbins).mean((1, 3))
    return (hog / np.maximum(np.linalg.norm(hog, axis=-1, keepdims=True), 1e-12))[:, :, None]


@pytest.mark.parametrize("stretch", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("degrees", [0, 20, 45, 70, 90, 110, 135, 160])
def test_along_the_edge(degrees, stretch):
    """An edge at a known slant (clockwise from the x axis, y down) gives strokes at that slant, within a bin; where the
    picture is stretched, at the slant that the edge then has."""
    slant = np.radians(degrees)
    y, x = np.mgrid[-31.5:32, -31.5:32]
    image = 1 / (1 + np.exp(-(y * np.cos(slant) - x * np.sin(slant))))  # bright on one side of a line
    high, wide = 33 * stretch[0], 33 * stretch[1]
    picture = hog_glyphs(hog_of(image, 16)[1:3, 1:3], (2 * high, 2 * wide))  # four cells around the centre
    assert picture.shape == (2 * high, 2 * wide) and picture.dtype == np.float32
    cells = picture.reshape(2, high, 2, wide).transpose(0, 2, 1, 3).reshape(4, high, wide)
    strongest = cells[np.argmax(cells.max((1, 2)))]
    v, u = np.mgrid[-(high - 1) / 2 : high / 2, -(wide - 1) / 2 : wide / 2]
    v, u = v / stretch[0], u / stretch[1]  # back where the image is
    bright = np.where(strongest > 0.6 * strongest.max(), strongest, 0)
    angle = 0.5 * np.arctan2(2 * (bright * u * v).sum(), (bright * (u * u - v * v)).sum())
    off = np.degrees(angle) - degrees
    assert abs((off + 90) % 180 - 90) < 180 / 9 / 2 + 3


def test_brightness_follows_strength():
    """It is the mean over channels; negative predictions and NaN are dark; cells need not be whole pixels."""
    hog = np.zeros((1, 3, 2, 4))
    hog[0, 0, :, 1] = [1.0, 0.2]
    hog[0, 1, :, 1] = -1.0
    hog[0, 2, :, 1] = np.nan
    picture = hog_glyphs(hog, (21, 64))
    assert picture[:, :21].max() == pytest.approx(0.6)
    assert picture[:, 22:].max() == 0

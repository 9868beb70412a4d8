"""HOG as a picture: in each cell a stroke a bin, along the edges that the bin counts."""

from __future__ import annotations

import numpy as np


def hog_glyphs(hog: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """How much of each pixel is under a stroke, times how strong the bin is.

    A bin b of n holds the pixels whose phase atan2(horizontal, vertical gradient) lies in [b, b + 1) * pi / n, modulo
    pi. The gradient then points along (sin, cos) of the phase (x right, y down), and the edge along (cos, -sin). Where
    the picture has another aspect than the model's square cells, strokes are stretched as the image is, so they lie
    along its edges there, too.

    Args:
        hog: float [hs, ws, C, nbins], normalised a cell and channel; strength is the mean over C, clipped to [0, 1].
            NaN: nothing is drawn.
        size: (height, width) of the picture, pixels.

    Returns:
        float32 [height, width], from 0 to 1.
    """
    hs, ws, _, nbins = hog.shape
    strength = np.clip(np.nan_to_num(hog).mean(axis=2), 0.0, 1.0).astype(np.float32)  # [hs, ws, nbins]
    row, y = _places(size[0], hs)
    column, x = _places(size[1], ws)
    y, high, wide = y[:, None], size[0] / hs, size[1] / ws  # [height, 1], sides of a cell in pixels
    half_width = max(0.5, 0.04 * min(high, wide))
    picture = np.zeros(size, np.float32)
    for b in range(nbins):
        phase = (b + 0.5) * np.pi / nbins
        dx, dy = np.cos(phase) * wide, -np.sin(phase) * high
        length = np.hypot(dx, dy)
        dx, dy = dx / length, dy / length
        across = np.clip(half_width + 0.5 - np.abs(y * dx - x * dy), 0, 1)  # share of the pixel under the stroke
        along = np.clip(0.46 * length + 0.5 - np.abs(x * dx + y * dy), 0, 1)
        picture = np.maximum(picture, strength[row][:, column, b] * (across * along))
    return picture


def _places(pixels: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The cell of each pixel along an axis and its distance from the cell's centre, pixels: int, float32 [pixels]."""
    centres = (np.arange(pixels) + 0.5) * cells / pixels
    index = centres.astype(int)
    return index, ((centres - index - 0.5) * pixels / cells).astype(np.float32)

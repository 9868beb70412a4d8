"""Targets: what is predicted for a cell. Each is a Cell from images to one grid of values a scale, without gradient.

A target has `dims`, the number of values that a decoder predicts for a cell at each scale, and maps [B, C, H, W] to a
tuple of [B, hs, ws, D].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from localmim.mim.hog import Hog
from localmim.mim.losses import cross_entropy, squared_error


class HogTarget(nn.Cell):
    """HOG of every channel, ordered (channel, bin, row, column of a histogram), D = in_chans * nbins * split^2.

    Args:
        cells: Cell sides in pixels, one a scale.
        in_chans: Image channels.
        nbins: Orientation bins.
        bias: Whether to draw the authors' frozen gradient bias, U(-1/3, 1/3), one pair a scale (see mim/hog.py).
        seed: Of that draw.
        split: Histograms a cell side (MaskFeat has 2 a patch); it divides every cell.
        window: As of Hog.
    """

    def __init__(
        self,
        cells: Sequence[int],
        in_chans: int = 3,
        nbins: int = 9,
        bias: bool = False,
        seed: int = 0,
        split: int = 1,
        window: int = 0,
    ):
        super().__init__()
        values = np.random.default_rng(seed).uniform(-1 / 3, 1 / 3, (len(cells), 2)) if bias else None
        self.hog = Hog([c // split for c in cells], nbins, values, window)
        self.in_chans, self.nbins, self.split = in_chans, nbins, split
        self.dims = [in_chans * nbins * split**2] * len(cells)

    def construct(self, images: Tensor) -> tuple[Tensor, ...]:
        grids = []
        for x in self.hog(images):
            if self.split > 1:
                B, h, w, C, n = x.shape
                s = self.split
                x = x.reshape(B, h // s, s, w // s, s, C, n).transpose(0, 1, 3, 5, 6, 2, 4)  # [B, hs, ws, C, n, s, s]
            grids.append(x.reshape(x.shape[:3] + (-1,)))  # [B, hs, ws, D]
        return tuple(grids)

    def histograms(self, grid: np.ndarray) -> np.ndarray:
        """Values of cells [B, hs, ws, D], targets or predictions, as histograms [B, hs*split, ws*split, C, nbins]."""
        (B, h, w, _), s = grid.shape, self.split
        x = grid.reshape(B, h, w, self.in_chans, self.nbins, s, s).transpose(0, 1, 5, 2, 6, 3, 4)
        return x.reshape(B, h * s, w * s, self.in_chans, self.nbins)


class PixelTarget(nn.Cell):
    """Pixels of each cell, D = cell^2 * in_chans.

    Args:
        cells: Cell sides in pixels, one a scale.
        in_chans: Image channels.
        normalise: Subtract each cell's mean and divide by sqrt(variance + 1e-6) of all its values; unbiased variance.
        channels_first: Values are ordered (channel, row, column), as a pixel shuffle takes them (SimMIM); else
            (row, column, channel).
    """

    def __init__(self, cells: Sequence[int], in_chans: int = 3, normalise: bool = True, channels_first: bool = False):
        super().__init__()
        self.cell_sizes, self.normalise = tuple(cells), normalise
        self.order = (0, 2, 4, 1, 3, 5) if channels_first else (0, 2, 4, 3, 5, 1)
        self.dims = [c * c * in_chans for c in cells]

    def construct(self, images: Tensor) -> tuple[Tensor, ...]:
        B, C, H, W = images.shape
        images = ops.stop_gradient(images).astype(ms.float32)
        grids = []
        for c in self.cell_sizes:
            x = images.reshape(B, C, H // c, c, W // c, c).transpose(self.order)  # [B, hs, ws, c, c, C] or C first
            x = x.reshape(B, H // c, W // c, c * c * C)
            if self.normalise:
                x = x - x.mean(axis=-1, keep_dims=True)
                variance = (x * x).sum(axis=-1, keepdims=True) / max(c * c * C - 1, 1)
                x = x / ops.sqrt(variance + 1e-6)
            grids.append(ops.stop_gradient(x))
        return tuple(grids)

    def images(self, grid: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Values of cells [B, hs, ws, D], targets or predictions, as images [B, C, H, W].

        Args:
            images: The true ones; where cells are normalised, their means and deviations are put back.
        """
        (B, C, H, W), (h, w) = images.shape, grid.shape[1:3]
        split = images.reshape(B, C, h, H // h, w, W // w)
        if self.normalise:
            mean, variance = (f(split, axis=(1, 3, 5)) for f in (np.mean, partial(np.var, ddof=1)))
            grid = grid * np.sqrt(variance + 1e-6)[..., None] + mean[..., None]
        shape = [split.shape[i] for i in self.order]
        return grid.reshape(shape).transpose(np.argsort(self.order)).reshape(B, C, H, W)


class CodebookTarget(nn.Cell):
    """Ids of a codebook, which a tokenizer has made before the step (mim/codebook.py): data, like a mask.

    Args:
        scales: How many.
        vocab: Entries of the codebook; a decoder predicts a score for each, and the loss is their cross-entropy.
    """

    def __init__(self, scales: int, vocab: int):
        super().__init__()
        if vocab < 2:
            raise ValueError(f"a codebook needs at least 2 entries, got vocab {vocab}")
        self.dims = [vocab] * scales

    def construct(self, images: Tensor, *ids: Tensor) -> tuple[Tensor, ...]:
        """ids int32 [B, hs, ws], one a scale -> a tuple of [B, hs, ws, 1]."""
        grids = []
        for x in ids:
            grids.append(x.expand_dims(-1))
        return tuple(grids)


def build_target(
    kind: str, cells: Sequence[int], in_chans: int, nbins, hog_bias, norm_pix, vocab, seed
) -> tuple[nn.Cell, Callable]:
    """The target of a kind for cells of so many pixels, and the error that goes with it.

    Raises:
        ValueError: There is no such kind.
    """
    if kind == "hog":
        return HogTarget(cells, in_chans, nbins, hog_bias, seed), squared_error
    if kind == "pixels":
        return PixelTarget(cells, in_chans, norm_pix), squared_error
    if kind == "codebook":
        return CodebookTarget(len(cells), vocab), cross_entropy
    raise ValueError(f"target {kind!r} is none of 'hog', 'pixels', 'codebook'")

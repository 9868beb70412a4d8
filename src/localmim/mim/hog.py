"""Histograms of oriented gradients as a graph-mode Cell: the target of LocalMIM and MaskFeat.

Definition (Wang et al., LocalMIM, CVPR 2023, after Dalal and Triggs, CVPR 2005), for each channel of the normalised
image: Sobel gradients on the reflect-padded image, orientation folded modulo pi into `nbins` hard bins (no
interpolation), magnitudes averaged over each cell, L2-normalised over the bins of a cell. No block normalisation.

The authors run this once a scale, with a convolution, a scatter into a per-pixel histogram and a pooling. Here the
pixels are read once for all cell sizes: gradients by shifted differences, magnitudes summed straight into the finest
cells, and coarser cells from those. In exact arithmetic that is the same.

`bias` is not a feature of the method. The authors' larger recipes leave the convolution's random default bias switched
on, frozen, another one for each cell size; their targets cannot be reproduced without it. Each cell size then needs its
own gradients and bins. See docs/quirks.md. `window` is mmpretrain's for MaskFeat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

# Most of these operators run on one CPU thread. Parts of the batch are chains of operators that run beside one another.
CHAINS = 2


class Hog(nn.Cell):
    """HOG of all `cells` sizes from one pass over the pixels; no gradient; float32 whatever the input.

    Args:
        cells: Cell sides in pixels, for example (4, 8, 16, 32).
        nbins: Orientation bins over half a turn.
        bias: [len(cells), 2] added to the horizontal and vertical gradient, stored frozen; None: no bias.
        window: Side of the Gaussian that weighs magnitudes, repeated over the image; 0: all count alike.

    Raises:
        ValueError: A cell or `nbins` below 1, a bias of another shape; at compile time, an image side that a cell or
            the window does not divide.
    """

    def __init__(self, cells: Sequence[int], nbins: int = 9, bias: np.ndarray | None = None, window: int = 0):
        super().__init__()
        cells = tuple(int(c) for c in cells)
        if not cells or min(cells) < 1 or nbins < 1:
            raise ValueError(f"HOG needs cell sizes and nbins of at least 1, got cells {list(cells)} and nbins {nbins}")
        self.cell_sizes, self.nbins = cells, int(nbins)
        self.window = gaussian(window) if window else None
        self.sizes, self.pooling = pooling_plan(cells)
        self.pad = nn.ReflectionPad2d(1)
        # On a CPU x / y keeps 16 bytes for each value as long as the graph lives, and so does x + y of integers;
        # RealDiv and addn do not.
        self.divide = ops.RealDiv()
        self.bias = None
        if bias is not None:
            bias = np.asarray(bias, np.float32)
            if bias.shape != (len(cells), 2):
                raise ValueError(f"a HOG bias has one pair a cell size, [{len(cells)}, 2], got {list(bias.shape)}")
            self.bias = Parameter(Tensor(bias), requires_grad=False)

    def construct(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, C, H, W] -> for each cell size [B, H/cell, W/cell, C, nbins]."""
        self.check(images.shape)
        images = ops.stop_gradient(images).astype(ms.float32)
        outputs = []
        if self.bias is None:
            levels = self.histograms(images, self.sizes[:1])
            for source, ratio in self.pooling:
                levels.append(pool(levels[source], ratio))
            for cell in self.cell_sizes:
                outputs.append(self.normalise(levels[self.sizes.index(cell)]))
        else:
            for sums in self.histograms(images, self.cell_sizes):
                outputs.append(self.normalise(sums))
        return tuple([ops.stop_gradient(x) for x in outputs])

    def check(self, shape):
        """Every image side must hold a whole number of cells, and the padding needs two pixels."""
        if len(shape) != 4:
            raise ValueError(f"HOG takes images [B, C, H, W], got {shape}")
        if shape[2] < 2 or shape[3] < 2:
            raise ValueError(f"HOG needs images of at least 2x2 pixels, got {shape[2]}x{shape[3]}")
        for cell in self.cell_sizes:
            if shape[2] % cell != 0 or shape[3] % cell != 0:
                raise ValueError(
                    f"an image of {shape[2]}x{shape[3]} pixels does not divide into HOG cells of {cell} px"
                )
        if self.window is not None and (shape[2] % len(self.window) != 0 or shape[3] % len(self.window) != 0):
            raise ValueError(
                f"an image of {shape[2]}x{shape[3]} pixels does not divide into HOG windows of {len(self.window)} px"
            )

    def histograms(self, images: Tensor, sizes) -> list[Tensor]:
        """[B, C, H, W] -> for each cell size [B, H/cell, W/cell, C, nbins], from parts of the batch side by side."""
        B = images.shape[0]
        gradients = []
        for part in ops.split(images, B // CHAINS if B % CHAINS == 0 else B, 0):
            gradients.append(self.gradients(part))
        outputs = []
        for k in range(len(sizes)):
            parts, first = [], self.first_bins(gradients[0][0].shape, sizes[k])
            for gx, gy in gradients:
                if self.bias is not None:
                    gx, gy = gx + self.bias[k, 0], gy + self.bias[k, 1]
                parts.append(self.histogram(gx, gy, first, sizes[k]))
            outputs.append(ops.concat(parts, 0))
        return outputs

    def gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sobel differences, left minus right and top minus bottom: [B, C, H, W] -> two of the same shape."""
        x = self.pad(x)  # [B, C, H+2, W+2]
        rows = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]  # [B, C, H, W+2]
        cols = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]  # [B, C, H+2, W]
        return rows[..., :-2] - rows[..., 2:], cols[:, :, :-2] - cols[:, :, 2:]

    def bins(self, gx: Tensor, gy: Tensor) -> Tensor:
        """Orientation bin of each pixel, int32: floor(atan2(gx, gy) / pi * nbins) modulo nbins.

        In these very steps, as the authors do it: where a pixel lies on a bin's edge, float32 rounding decides, and a
        cheaper form such as atan(gx / gy) decides otherwise.
        """
        b = ops.floor(self.divide(ops.atan2(gx, gy), math.pi) * self.nbins)  # -nbins .. nbins
        return (b - ops.floor(self.divide(b, self.nbins)) * self.nbins).astype(ms.int32)

    def first_bins(self, shape, cell: int) -> Tensor:
        """Where the bins of each pixel's cell begin among those of all images: int32 [B, C, H, W]."""
        B, C, H, W = shape
        first = Tensor(first_bin(C, H, W, cell, self.nbins))  # [C, H, W], in the bins of one image
        image = np.arange(B, dtype=np.int32) * (H // cell * (W // cell) * C * self.nbins)
        return first.broadcast_to(shape) + Tensor(image.reshape(B, 1, 1, 1)).broadcast_to(shape)

    def histogram(self, gx: Tensor, gy: Tensor, first: Tensor, cell: int) -> Tensor:
        """Mean magnitude a bin in each cell: two [B, C, H, W] -> [B, H/cell, W/cell, C, nbins]."""
        B, C, H, W = gx.shape
        h, w, n = H // cell, W // cell, self.nbins
        magnitude = ops.sqrt(gx * gx + gy * gy)
        if self.window is not None:
            side = len(self.window)
            magnitude = magnitude * Tensor(np.tile(self.window, (H // side, W // side)))
        ids = ops.addn((self.bins(gx, gy), first)).reshape(-1)
        sums = ops.unsorted_segment_sum(magnitude.reshape(-1), ids, B * h * w * C * n)
        return sums.reshape(B, h, w, C, n) * (1.0 / cell**2)

    def normalise(self, x: Tensor) -> Tensor:
        """L2 norm 1 over the bins of each cell, dividing by at least 1e-12."""
        ones = ops.ones((self.nbins, 1), ms.float32)
        rows = x.reshape(-1, self.nbins)
        norm = ops.maximum(ops.sqrt(ops.matmul(rows * rows, ones)), 1e-12)  # sums of the bins, as a product
        return self.divide(rows, norm.broadcast_to(rows.shape)).reshape(x.shape)


def gaussian(side: int) -> np.ndarray:
    """Weights [side, side] of a Gaussian around the middle, standard deviation side // 2, sum 1; float32."""
    place = (np.arange(side) - (side - 1) / 2) / (side // 2)
    weights = np.exp(-0.5 * (place[:, None] ** 2 + place**2))
    return (weights / weights.sum()).astype(np.float32)


def pooling_plan(cells: tuple[int, ...]) -> tuple[list[int], list[tuple[int, int]]]:
    """How coarser cells come from finer ones.

    Returns:
        The sizes of all levels, the finest first (it divides all others), and for each level after it the place of the
        level that it is pooled from and by how much.
    """
    sizes = [reduce(math.gcd, cells)]
    steps = []
    for cell in sorted(set(cells) - set(sizes)):
        source = max(i for i in range(len(sizes)) if cell % sizes[i] == 0)
        steps.append((source, cell // sizes[source]))
        sizes.append(cell)
    return sizes, steps


def pool(x: Tensor, r: int) -> Tensor:
    """Mean over r x r cells: [B, h, w, C, n] -> [B, h/r, w/r, C, n]."""
    B, h, w, C, n = x.shape
    x = ops.addn(ops.split(x.reshape(B * h // r, r, w * C * n), 1, 1))  # a sum of slices: quicker than a reduction
    x = ops.addn(ops.split(x.reshape(B * h * w // (r * r), r, C * n), 1, 1))
    return x.reshape(B, h // r, w // r, C, n) * (1.0 / r**2)


def first_bin(C: int, H: int, W: int, cell: int, nbins: int) -> np.ndarray:
    """For each pixel, where its cell's bins begin in a flat [H/cell, W/cell, C, nbins]; int32 [C, H, W]."""
    i, j = np.arange(H) // cell, np.arange(W) // cell
    c = np.arange(C)[:, None, None]
    place = i[:, None] * (W // cell) + j
    return ((place * C + c) * nbins).astype(np.int32)

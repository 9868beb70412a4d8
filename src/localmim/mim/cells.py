"""Cells of a patch: how a prediction at scale s lines up with the patches, the target and the mask.

At scale s >= 1 a patch holds s x s cells, at scale 1/2 a cell covers 2 x 2 patches. Predictions are made for hidden
patches only and come as rows: [B, M, s*s*D] for s >= 1, the cells of a patch in *nested* order (the two halves first,
then the halves of each half: what two transposed convolutions with kernel = stride = 2 produce), and [B, L/4, D] for
s = 1/2.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor

from localmim.models.layers import take_rows

SCALES = (4.0, 2.0, 1.0, 0.5)


def check_scale(scale: float) -> None:
    """ValueError when the scale is none of 4, 2, 1, 0.5."""
    if scale not in SCALES:
        raise ValueError(f"scale {scale:g} is none of 4, 2, 1, 0.5")


def cell_pixels(patch: int, scale: float) -> int:
    """Side of a cell in pixels.

    Raises:
        ValueError: The scale is none of 4, 2, 1, 0.5, or does not divide the patch.
    """
    check_scale(scale)
    cell = patch / scale
    if cell != int(cell):
        raise ValueError(f"scale {scale:g} does not divide a patch of {patch} px into whole cells")
    return int(cell)


def check_grid(grid: tuple[int, int], scale: float) -> None:
    """At scale 1/2 a cell covers 2 x 2 patches, so both sides of the grid must be even.

    Raises:
        ValueError: They are not.
    """
    if scale < 1 and (grid[0] % 2 or grid[1] % 2):
        raise ValueError(f"scale 0.5 needs an even number of patches a side, and the grid is {grid[0]}x{grid[1]}")


def target_rows(target: Tensor, scale: float, ids_mask: Tensor) -> Tensor:
    """A target on the grid of cells, [B, hs, ws, D], as rows in the order of the predictions (module docstring).

    Args:
        ids_mask: [B, M], or [B*V, M] where each image is seen in V views, those of an image side by side.
    """
    B, hs, ws, D = target.shape
    if scale < 1:
        return target.reshape(B, hs * ws, D)
    if scale == 4:
        x = target.reshape(B, hs // 4, 2, 2, ws // 4, 2, 2, D)  # [B, h, i, i', w, j, j', D]
        x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)  # [B, h, w, i, j, i', j', D]
    else:
        s = int(scale)
        x = target.reshape(B, hs // s, s, ws // s, s, D).transpose(0, 1, 3, 2, 4, 5)  # [B, h, w, s, s, D]
    s = int(scale)
    rows, M = ids_mask.shape
    x = take_rows(x.reshape(B, hs * ws // (s * s), s * s * D), ids_mask.reshape(B, rows // B * M))
    return x.reshape(rows, M, s * s * D)


def quad_ids(ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """Values of the 2 x 2 patches that each coarse cell covers: [B, h*w] -> [B, h/2 * w/2, 4]."""
    h, w = grid
    x = ids.reshape(-1, h // 2, 2, w // 2, 2).transpose(0, 1, 3, 2, 4)  # [B, h/2, w/2, 2, 2]
    return x.reshape(-1, h * w // 4, 4)


def coarse_weights(ids_restore: Tensor, keep: int, grid: tuple[int, int]) -> Tensor:
    """Hidden share of the 2 x 2 patches under each coarse cell: [B, L/4] float32 in {0, 1/4, 1/2, 3/4, 1}."""
    hidden = (quad_ids(ids_restore, grid) >= keep).astype(ms.float32)
    return hidden.sum(axis=-1) * 0.25


def rows_to_grid(rows: np.ndarray, scale: float, ids_mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Predicted rows back on the grid of cells, for pictures and checks: [B, hs, ws, D], NaN where there is none.

    Args:
        ids_mask: [B, M]; a row of id -1 is left out.
    """
    B, (h, w) = rows.shape[0], grid
    if scale < 1:
        return rows.reshape(B, h // 2, w // 2, -1)
    s = int(scale)
    D = rows.shape[-1] // (s * s)
    full = np.full((B, h * w + 1, s * s * D), np.nan, np.float32)  # -1 is the place after the last
    np.put_along_axis(full, ids_mask[..., None].astype(np.int64), rows, axis=1)
    full = full[:, :-1]
    if s == 4:
        x = full.reshape(B, h, w, 2, 2, 2, 2, D).transpose(0, 1, 3, 5, 2, 4, 6, 7)  # [B, h, i, i', w, j, j', D]
    else:
        x = full.reshape(B, h, w, s, s, D).transpose(0, 1, 3, 2, 4, 5)  # [B, h, s, w, s, D]
    return x.reshape(B, h * s, w * s, D)

"""Cells of a patch: prediction rows, grids and masks must speak of the same place in the image."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from localmim.mim.cells import cell_pixels, check_grid, coarse_weights, quad_ids, rows_to_grid, target_rows
from localmim.mim.masking import RandomMasking

GRID = (2, 4)  # patches; a rectangle, so that rows and columns cannot be exchanged unseen


@pytest.fixture(scope="module")
def mask():
    return RandomMasking(8, 0.6, 0)(0, np.arange(3))


def places(scale: float) -> np.ndarray:
    """A target [3, hs, ws, 3] that says at each cell which image, row and column it is."""
    h, w = (int(n * scale) for n in GRID)
    return np.stack(np.meshgrid(np.arange(3), np.arange(h), np.arange(w), indexing="ij"), -1).astype(np.float32)


@pytest.mark.parametrize("scale", [4.0, 2.0, 1.0, 0.5])
def test_round_trip(mask, scale):
    """Grid to rows to grid: every hidden cell in its place, and nothing where nothing is predicted."""
    target = places(scale)
    rows = target_rows(Tensor(target), scale, Tensor(mask.ids_mask)).asnumpy()
    grid = rows_to_grid(rows, scale, mask.ids_mask, GRID)
    if scale < 1:
        np.testing.assert_array_equal(grid, target)
        return
    s = int(scale)
    assert rows.shape == (3, mask.ids_mask.shape[1], s * s * 3)
    hidden = mask.mask().reshape(3, *GRID).repeat(s, 1).repeat(s, 2) == 1
    np.testing.assert_array_equal(grid[hidden], target[hidden])
    assert np.isnan(grid[~hidden]).all()


def test_order_of_the_rows(mask):
    """Cells of a patch in nested order: halves first, then the halves of each half. Heads produce exactly this."""
    target = places(4.0)
    rows = target_rows(Tensor(target), 4.0, Tensor(mask.ids_mask)).asnumpy().reshape(3, -1, 16, 3)
    nested = [(2 * i + k, 2 * j + m) for i in (0, 1) for j in (0, 1) for k in (0, 1) for m in (0, 1)]
    for b in range(3):
        for n, patch in enumerate(mask.ids_mask[b]):
            i, j = divmod(int(patch), GRID[1])
            expected = [(b, 4 * i + di, 4 * j + dj) for di, dj in nested]
            np.testing.assert_array_equal(rows[b, n], expected)


def test_coarse_weights(mask):
    """At scale 1/2 a cell counts by the hidden share of its four patches: the 2 x 2 mean, not the maximum."""
    keep = mask.ids_keep.shape[1]
    weights = coarse_weights(Tensor(mask.ids_restore), keep, GRID).asnumpy()
    expected = mask.mask().reshape(3, 1, 2, 2, 2).mean((2, 4)).reshape(3, 2)
    np.testing.assert_array_equal(weights, expected)


def test_coarse_weights_take_all_five_values():
    """0, 1/4, 1/2, 3/4 and 1, with every number of hidden patches under a cell."""
    hidden = np.array([[[0, 0], [0, 0]], [[1, 0], [0, 0]], [[1, 0], [0, 1]], [[1, 1], [0, 1]], [[1, 1], [1, 1]]])
    flat = hidden.reshape(5, 4)
    visible_first = np.argsort(np.argsort(flat, 1, kind="stable"), 1, kind="stable").astype(np.int32)
    got = [
        float(coarse_weights(Tensor(ids[None]), int((1 - m).sum()), (2, 2)).asnumpy()[0, 0])
        for ids, m in zip(visible_first, flat)
    ]
    assert got == [0, 0.25, 0.5, 0.75, 1]


def test_quad_ids():
    """The four patches of each coarse cell, row by row, on a rectangle."""
    ids = np.arange(16, dtype=np.int32).reshape(2, 8)
    got = quad_ids(Tensor(ids), GRID).asnumpy()
    np.testing.assert_array_equal(got, [[[0, 1, 4, 5], [2, 3, 6, 7]], [[8, 9, 12, 13], [10, 11, 14, 15]]])


def test_cell_pixels():
    """Spec's table at 16 px; a cell that would not be whole pixels is refused."""
    assert [cell_pixels(16, s) for s in (4.0, 2.0, 1.0, 0.5)] == [4, 8, 16, 32]
    assert cell_pixels(14, 2.0) == 7
    with pytest.raises(ValueError, match="scale 4 does not divide a patch of 14 px"):
        cell_pixels(14, 4.0)
    with pytest.raises(ValueError, match=r"scale 8 is none of 4, 2, 1, 0.5"):
        cell_pixels(16, 8.0)


def test_check_grid():
    """Coarse cells need even sides; the other scales take any grid."""
    check_grid((2, 4), 0.5)
    check_grid((3, 5), 1.0)
    for grid in ((3, 4), (4, 3)):
        with pytest.raises(ValueError, match=f"the grid is {grid[0]}x{grid[1]}"):
            check_grid(grid, 0.5)

"""What every case uses: the comparison, its tolerances, and HOG away from the edges of its bins."""

from __future__ import annotations

import numpy as np

HOG, ACTIVATION, LOSS, GRADIENT = 1e-5, 2e-5, 1e-5, 1e-4


class Comparison:
    """Prints one line a value and remembers whether all agreed."""

    def __init__(self):
        self.count = self.failures = 0

    def check(self, name: str, ours, theirs, tolerance: float, relative: bool = True) -> None:
        """Largest difference, by default relative to the largest magnitude; NaN in `ours` is a mismatch."""
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        self.count += 1
        if ours.shape != theirs.shape:
            difference, text = np.inf, f"shape {list(ours.shape)} for {list(theirs.shape)}"
        else:
            difference = float(np.abs(ours - theirs).max()) if ours.size else 0.0
            if relative:
                difference /= max(float(np.abs(theirs).max()) if theirs.size else 0.0, 1e-12)
            text = f"{difference:.2e} (at most {tolerance:.0e}), {ours.size} values"
        good = difference <= tolerance
        self.failures += not good
        print(f"{'ok  ' if good else 'FAIL'} {name:44s} {text}")


def unambiguous_cells(images: np.ndarray, cell: int, nbins: int, bias=None) -> np.ndarray:
    """[B, H/cell, W/cell, C] bool: cells without a pixel whose bin rounding could change (see the module docstring)."""
    x = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    rows = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    cols = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    gx, gy = rows[..., :-2] - rows[..., 2:], cols[:, :, :-2] - cols[:, :, 2:]
    if bias is not None:
        gx, gy = gx + bias[0], gy + bias[1]
    place = np.arctan2(gx, gy) / np.pi * nbins
    near = (np.abs(place - np.round(place)) < 1e-4) & (gx != 0) & (gy != 0)
    B, C, H, W = near.shape
    return ~near.reshape(B, C, H // cell, cell, W // cell, cell).any(axis=(3, 5)).transpose(0, 2, 3, 1)


def check_hog(compare, name, ours, theirs, images, cell, nbins, bias=None) -> None:
    """ours [B, h, w, C, nbins] against theirs [B, C*nbins, h, w]."""
    B, h, w, C, n = ours.shape
    theirs = theirs.reshape(B, C, n, h, w).transpose(0, 3, 4, 1, 2)
    clear = unambiguous_cells(images, cell, nbins, bias)
    compare.check(f"{name} ({clear.mean():.1%} of cells)", ours[clear], theirs[clear], HOG, relative=False)

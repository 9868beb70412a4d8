"""Masks for pyramids: whole units of the coarsest stage are hidden, and all images of a batch share one mask.

A unit is a square of 2^(stages-1) x patch pixels (32 for Swin); at stage s it holds r x r tokens, r = 2^(stages-1-s).
Inside a unit tokens are in nested order, so that the four tokens that a patch merging joins lie side by side and
merging is a reshape. For an encoder that merges rows first, masks are those of LocalMIM's code in every way
(docs/quirks.md, Q1 to Q3): one more unit hidden where ratio x units is a whole number, and the coordinates in the
middle stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from localmim.errors import UserError
from localmim.mim.masking import RandomMasking, TokenMask, mask_from_shuffle
from localmim.models.windows import Windows, nested_offsets, pack_windows


@dataclass(frozen=True)
class UnitMask:
    """One mask of a batch as index arrays, int32, of one shape for every mask.

    Attributes:
        hidden: [units] bool, row-major.
        patches: [K] visible patches, in the order in which the encoder keeps them.
        taps: What is visible and hidden at each tap's grid, repeated for each image.
        windows: For each stage the plain windows, then the shifted ones where there are any.
    """

    hidden: np.ndarray
    patches: np.ndarray
    taps: tuple[TokenMask, ...]
    windows: tuple[Windows, ...]
    views: ClassVar[int] = 1

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What enters the graph, in this order: the patches, three arrays a tap, the windows' arrays."""
        return self.patches, *(a for tap in self.taps for a in tap.arrays()), *(a for w in self.windows for a in w)

    def tap(self, k: int) -> TokenMask:
        """The mask at the grid of tap k."""
        return self.taps[k]

    def mask(self) -> np.ndarray:
        """[B, units] float32, 1 = hidden, row-major."""
        return np.repeat(self.hidden[None].astype(np.float32), len(self.taps[0].ids_keep), axis=0)


class UnitMasking:
    """Hides a share of the units of a batch at random.

    The mask is a function of (seed, epoch, first image of the batch) alone, or of (seed, epoch, draw).

    Args:
        encoder: A SwinTransformer; read are its grids, its windows, its taps and `rows_first`, which says that it is
            trained as the authors' code does it.
        ratio: Share of the units that is hidden.
        seed: The run's seed.

    Raises:
        UserError: The ratio leaves nothing visible or hides nothing.
    """

    by_batch = True

    def __init__(self, encoder, ratio: float, seed: int):
        self.stages, self.tap_grids, self.quirks = encoder.stages, encoder.tap_grids, encoder.rows_first
        self.units = encoder.mask_grid
        count = self.units[0] * self.units[1]
        self.random = RandomMasking(count, ratio, seed)
        self.keep = self.random.keep
        if self.quirks:  # a permutation p hides what has p <= int(ratio * units)
            self.keep = count - int(ratio * count) - 1
        if self.keep < 1:
            raise UserError(f"mask.ratio {ratio} leaves none of the {count} units visible")
        self.tokens = [self._tokens(stage.grid) for stage in self.stages]
        self.coordinates = [self._coordinates(s) for s in range(len(self.stages))]
        self.tap_tokens = [self._tokens(grid) for grid in self.tap_grids]
        self.unit_px = encoder.mask_unit

    def describe(self) -> str:
        h, w = self.units
        return f"{self.keep} of {h}x{w} squares of {self.unit_px} px visible, the same in all images of a batch"

    def __call__(self, epoch: int, samples: np.ndarray, draw: int | None = None) -> UnitMask:
        """The mask of a batch.

        Args:
            samples: Positions in the data set, [B].
            draw: What the mask follows from in place of the first image: the number of the step where all devices and
                forward passes of a step share one mask.
        """
        order = np.argsort(self.random.noise(epoch, int(samples[0]) if draw is None else draw), kind="stable")
        return self.of_order(order, len(samples))

    def of_order(self, order: np.ndarray, batch: int) -> UnitMask:
        """The mask of a permutation of the units, whose first `keep` stay visible, for a batch of images."""
        hidden = np.ones(len(order), bool)
        hidden[order[: self.keep]] = False
        return self.mask_of(hidden, batch)

    def mask_of(self, hidden: np.ndarray, batch: int) -> UnitMask:
        """The index arrays of a mask [units] for a batch of images."""
        visible = np.flatnonzero(~hidden)
        taps = tuple(self._tap(tokens[visible].ravel(), tokens.size, batch) for tokens in self.tap_tokens)
        windows = []
        for stage, coordinates in zip(self.stages, self.coordinates):
            seen = coordinates[visible].reshape(-1, 2)
            windows += [pack_windows(seen, stage.grid, stage.window, shift) for shift in stage.shifts]
        return UnitMask(hidden, self.tokens[0][visible].ravel(), taps, tuple(windows))

    def _tap(self, keep: np.ndarray, total: int, batch: int) -> TokenMask:
        """The mask of a tap whose visible tokens are `keep`, for each image of a batch."""
        hidden = np.ones(total, bool)
        hidden[keep] = False
        shuffle = np.concatenate([keep, np.flatnonzero(hidden)])
        return mask_from_shuffle(np.repeat(shuffle[None], batch, axis=0), len(keep))

    def _tokens(self, grid: tuple[int, int]) -> np.ndarray:
        """Row-major token numbers of each unit, in nested order: int32 [units, r*r]."""
        r = grid[0] // self.units[0]
        offsets = nested_offsets(r, rows_first=self.quirks)  # [r*r, 2]
        i, j = np.divmod(np.arange(self.units[0] * self.units[1]), self.units[1])
        rows = i[:, None] * r + offsets[:, 0]
        return (rows * grid[1] + j[:, None] * r + offsets[:, 1]).astype(np.int32)

    def _coordinates(self, stage: int) -> np.ndarray:
        """(row, column) of each unit's tokens on the stage's grid, in nested order: [units, r*r, 2]."""
        grid, tokens = self.stages[stage].grid, self.tokens[stage]
        if self.quirks and stage > 0:  # read off as if the numbers counted row by row; they count unit by unit
            r = grid[0] // self.units[0]
            offsets = nested_offsets(r, rows_first=True)
            unit_major = np.arange(tokens.size).reshape(tokens.shape)
            number = unit_major[:, offsets[:, 0] * r + offsets[:, 1]]
            return np.stack(np.divmod(number, grid[1]), axis=-1)
        return np.stack(np.divmod(tokens, grid[1]), axis=-1)

"""Masks for encoders that see all tokens, the hidden ones replaced by a learned token (SimMIM, BEiT, MaskFeat)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from localmim.errors import UserError
from localmim.mim.masking import philox


@dataclass(frozen=True)
class ReplacedMask:
    """A batch's masks on whole images.

    Attributes:
        units: [B, uh, uw] bool, the squares that are hidden as one, on the encoder's `mask_grid`.
        hidden: [B, N] float32, 1 = replaced, on the encoder's first tokens, row-major.
        ids_mask: [B, M] int32, what is predicted, on the tap's grid, ascending; -1 fills up where an image has fewer.
    """

    units: np.ndarray
    hidden: np.ndarray
    ids_mask: np.ndarray
    views: ClassVar[int] = 1

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What enters the graph, in this order: hidden, ids_mask."""
        return self.hidden, self.ids_mask

    def tap(self, k: int) -> ReplacedMask:
        """The mask at the grid of tap k: there is one tap."""
        return self

    def mask(self) -> np.ndarray:
        """[B, uh*uw] float32, 1 = hidden."""
        return self.units.reshape(len(self.units), -1).astype(np.float32)


def replaced_mask(units: np.ndarray, tokens: tuple[int, int], tap: tuple[int, int], most: int) -> ReplacedMask:
    """The arrays of hidden squares [B, uh, uw].

    Args:
        tokens: Grid of the encoder's first tokens, whole multiples of (uh, uw).
        tap: Grid of the tap: whole multiples as well.
        most: Hidden squares of an image at most.
    """
    at_tap = spread(units, tap).reshape(len(units), -1)
    per_unit = at_tap.shape[1] // (units.shape[1] * units.shape[2])
    ids_mask = np.full((len(units), most * per_unit), -1, np.int32)
    for row, hidden in zip(ids_mask, at_tap):
        ids = np.flatnonzero(hidden)
        row[: len(ids)] = ids
    return ReplacedMask(units, spread(units, tokens).reshape(len(units), -1).astype(np.float32), ids_mask)


def spread(units: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Each square's value for the cells of a finer grid that lie in it: [B, uh, uw] -> [B, *grid]."""
    return units.repeat(grid[0] // units.shape[1], axis=1).repeat(grid[1] // units.shape[2], axis=2)


class SquareMasking:
    """SimMIM's masks: a share of the squares of each image, rounded up, drawn at random.

    Args:
        units: Squares (uh, uw) of an image.
        tokens: Grid of the encoder's first tokens.
        tap: Grid on which is predicted.
        ratio: Share that is hidden.
        seed: The run's seed.

    Raises:
        UserError: The ratio leaves nothing visible.
    """

    by_batch = False

    def __init__(self, units: tuple[int, int], tokens: tuple[int, int], tap: tuple[int, int], ratio: float, seed: int):
        self.units, self.tokens, self.tap_grid, self.seed = units, tokens, tap, seed
        self.count = math.ceil(units[0] * units[1] * ratio)
        if self.count >= units[0] * units[1]:
            raise UserError(f"mask.ratio {ratio} leaves none of the {units[0] * units[1]} squares visible")

    def describe(self) -> str:
        return f"{self.count} of {self.units[0]}x{self.units[1]} squares hidden by a mask token"

    def __call__(self, epoch: int, samples: np.ndarray, draw: int | None = None) -> ReplacedMask:
        """Masks of a batch; `samples` [B] are positions in the data set. Each image has its own, whatever the draw."""
        total = self.units[0] * self.units[1]
        return self.of_order(np.stack([philox(self.seed, epoch, int(s)).permutation(total) for s in samples]))

    def of_order(self, order: np.ndarray) -> ReplacedMask:
        """Masks from a permutation of the squares an image [B, >= count], whose first `count` are hidden."""
        units = np.zeros((len(order), self.units[0] * self.units[1]), bool)
        np.put_along_axis(units, order[:, : self.count].astype(np.int64), True, axis=1)
        return replaced_mask(units.reshape(-1, *self.units), self.tokens, self.tap_grid, self.count)

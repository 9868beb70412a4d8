"""Block-wise masks: rectangles are hidden one after the other until enough is (BEiT, Bao et al. 2021; MaskFeat).

A rectangle's area is uniform from `min_block` to what is still to be hidden, the logarithm of its aspect uniform from
ln 0.3 to -ln 0.3, its place uniform. It counts if it is smaller than the grid both ways and hides something new, but no
more than is still to be hidden. Small grids and small remainders refuse most rectangles, so a draw can get stuck. Three
rules say what happens then, and where a rectangle may lie (docs/quirks.md):

* "exact", the default: it may lie anywhere, and always exactly the wanted number is hidden, so that all masks have one
  static shape. Should 1000 rectangles in a row be refused, visible patches taken at random complete the mask.
* "slowfast", as MaskFeat's authors: the mask stays short when ten rectangles in a row are refused.
* "mmpretrain": as "exact", but no rectangle reaches the last row or the last column.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import numpy as np

from localmim.errors import UserError
from localmim.mim.masking import philox
from localmim.mim.replaced_masking import ReplacedMask, replaced_mask

Rule = Literal["exact", "slowfast", "mmpretrain"]

TRIES = {"exact": 1000, "slowfast": 10, "mmpretrain": 1000}  # refused in a row before a draw counts as stuck
LOG_ASPECT = math.log(0.3), math.log(1 / 0.3)


class Source(Protocol):
    """Where random numbers come from: `Numbers`, or a record of those that a reference drew."""

    def uniform(self, low: float, high: float) -> float:
        """Between the two, in either order."""

    def below(self, end: int) -> int:
        """0 to end - 1."""


class Numbers:
    """Random numbers of a numpy Generator."""

    def __init__(self, generator: np.random.Generator):
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.generator.random()

    def below(self, end: int) -> int:
        return int(self.generator.integers(end))


def draw_blocks(source: Source, grid: tuple[int, int], count: int, min_block: int, rule: Rule) -> np.ndarray:
    """One image's mask [h, w] bool, True = hidden; `count` cells of it, with the rule "slowfast" at most.

    Args:
        min_block: The least area of a rectangle, in cells, as long as so many are still to be hidden.
    """
    h, w = grid
    hidden = np.zeros(grid, bool)
    left, refused = count, 0
    while left and refused < TRIES[rule]:
        area = source.uniform(min_block, left)
        aspect = math.exp(source.uniform(*LOG_ASPECT))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        refused += 1
        if rows >= h or columns >= w:
            continue
        beyond = 0 if rule == "mmpretrain" else 1
        top, start = source.below(h - rows + beyond), source.below(w - columns + beyond)
        block = hidden[top : top + rows, start : start + columns]
        new = block.size - np.count_nonzero(block)
        if 0 < new <= left:
            block[:] = True
            left, refused = left - new, 0
    if left and rule != "slowfast":
        free = np.flatnonzero(~hidden & reachable(grid, rule))
        for _ in range(left):
            place = source.below(len(free))
            hidden.flat[free[place]] = True
            free = np.delete(free, place)
    return hidden


def reachable(grid: tuple[int, int], rule: Rule) -> np.ndarray:
    """Which cells a rule can hide: [h, w] bool."""
    cells = np.ones(grid, bool)
    if rule == "mmpretrain":
        cells[-1], cells[:, -1] = False, False
    return cells


class BlockMasking:
    """Hides rectangles of each image's patches.

    Args:
        grid: Patches (h, w) of an image.
        ratio: Share that is hidden, rounded to whole patches.
        seed: The run's seed.
        min_block: The least area of a rectangle, in patches; None: a fifth of what is hidden.
        rule: What happens where rectangles do not fit; see the module's docstring.

    Raises:
        UserError: The ratio hides nothing or more than the rule can, or `min_block` is more than is hidden.
    """

    by_batch = False

    def __init__(
        self, grid: tuple[int, int], ratio: float, seed: int, min_block: int | None = None, rule: Rule = "exact"
    ):
        self.grid, self.seed, self.rule = tuple(grid), seed, rule
        total = grid[0] * grid[1]
        most = min(int(reachable(grid, rule).sum()), total - 1)
        self.count = round(total * ratio)
        if self.count < 1:
            raise UserError(f"mask.ratio {ratio} hides none of the {total} patches")
        if self.count > most:
            raise UserError(f"mask.ratio {ratio} hides {self.count} of the {total} patches, at most {most} can be")
        self.min_block = self.count // 5 if min_block is None else min_block
        if not 0 <= self.min_block <= self.count:
            raise UserError(f"mask.min_block is {min_block}, expected 0 to {self.count}, the patches that are hidden")

    def describe(self) -> str:
        most = "at most " if self.rule == "slowfast" else ""
        return f"{most}{self.count} of {self.grid[0]}x{self.grid[1]} patches hidden in blocks by a mask token"

    def __call__(self, epoch: int, samples: np.ndarray, draw: int | None = None) -> ReplacedMask:
        """Masks of a batch; `samples` [B] are positions in the data set. Each image has its own, whatever the draw."""
        return self.of_hidden(np.stack([self.draw(Numbers(philox(self.seed, epoch, int(s)))) for s in samples]))

    def draw(self, source: Source) -> np.ndarray:
        """One image's mask [h, w] bool."""
        return draw_blocks(source, self.grid, self.count, self.min_block, self.rule)

    def of_hidden(self, hidden: np.ndarray) -> ReplacedMask:
        """Masks of a batch from what is hidden [B, h, w] bool, at most `count` patches an image."""
        return replaced_mask(hidden, self.grid, self.grid, self.count)

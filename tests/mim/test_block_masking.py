"""Block-wise masks: rectangles by the rule, exact counts, draws that get stuck, and the two references' variants."""

from __future__ import annotations

import math

import numpy as np
import pytest

from localmim.errors import UserError
from localmim.mim.block_masking import LOG_ASPECT, BlockMasking, draw_blocks


class Script:
    """Random numbers out of a list; it must be asked for in the order in which the rule draws."""

    def __init__(self, *numbers):
        self.numbers, self.asked = list(numbers), []

    def uniform(self, low, high):
        self.asked.append((low, high))
        return self.numbers.pop(0)

    def below(self, end):
        self.asked.append(end)
        return self.numbers.pop(0)


class Largest:
    """Always the largest number: rectangles as high and wide as they get, at the far corner."""

    def uniform(self, low, high):
        return max(low, high)

    def below(self, end):
        return end - 1


def test_the_rule_step_by_step():
    """Area, aspect, then place if it fits; what hides nothing new or too much is refused, and costs a try."""
    source = Script(
        *(4.0, math.log(4), 1, 2),  # 4 x 1 cells at row 1, column 2
        *(9.0, math.log(0.25)),  # 2 x 6 cells: as wide as the grid, refused before a place is drawn
        *(4.0, 0.0, 2, 1),  # 2 x 2 cells, two of them hidden already
        *(1.0, 0.0, 1, 2),  # one cell that is hidden: nothing new
        *(3.0, 0.0, 0, 4),  # round(sqrt 3) = 2: four new cells, and only two are left
        *(2.0, math.log(2), 4, 0),  # 2 x 1 cells at the lower left
    )
    hidden = draw_blocks(source, (6, 6), 8, 3, "exact")
    np.testing.assert_array_equal(
        hidden,
        [
            [0, 0, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [0, 1, 1, 0, 0, 0],
            [1, 0, 1, 0, 0, 0],
            [1, 0, 0, 0, 0, 0],
        ],
    )
    areas = [pair for pair in source.asked if isinstance(pair, tuple) and pair != LOG_ASPECT]
    assert areas == [(3, 8), (3, 4), (3, 4), (3, 2), (3, 2), (3, 2)] and not source.numbers
    assert source.asked[2:4] == [6 - 4 + 1, 6 - 1 + 1]  # the last row and column can be reached


def test_pure_in_seed_epoch_and_sample():
    """A resumed run, other workers or another batch order must not change an image's mask."""
    masking = BlockMasking((14, 14), 0.4, 5)
    batch = masking(3, np.array([7, 2]))
    for row, sample in enumerate((7, 2)):
        np.testing.assert_array_equal(
            BlockMasking((14, 14), 0.4, 5)(3, np.array([sample])).hidden[0], batch.hidden[row]
        )
    others = [masking(4, np.array([7])), BlockMasking((14, 14), 0.4, 6)(3, np.array([7])), masking(3, np.array([8]))]
    assert len({m.hidden.tobytes() for m in others} | {batch.hidden[:1].tobytes()}) == 4


@pytest.mark.parametrize(
    ("grid", "ratio", "count", "least"),
    [
        ((14, 14), 0.4, 78, None),
        ((14, 14), 75 / 196, 75, 16),
        ((5, 9), 0.5, 22, 22),
        ((2, 2), 0.7, 3, 0),
        ((1, 7), 0.5, 4, 1),
    ],
)
def test_always_the_exact_number(grid, ratio, count, least):
    """One static shape whatever the grid: also where hardly a rectangle fits, or none (a grid of one row)."""
    mask = BlockMasking(grid, ratio, 0, least)(0, np.arange(200))
    assert mask.ids_mask.shape == (200, count) and mask.ids_mask.min() >= 0
    np.testing.assert_array_equal(mask.hidden.sum(1), count)
    np.testing.assert_array_equal(np.sort(mask.ids_mask, 1), mask.ids_mask)
    np.testing.assert_array_equal(np.take_along_axis(mask.hidden, mask.ids_mask.astype(int), 1), 1)
    assert mask.mask().max(0).min() == 1  # every patch is hidden in some image


@pytest.mark.parametrize(("rule", "count", "hidden"), [("exact", 20, 20), ("mmpretrain", 16, 16), ("slowfast", 20, 0)])
def test_a_stuck_draw_ends(rule, count, hidden):
    """Numbers that never give a rectangle that fits: mmpretrain's own loop would not end."""
    assert draw_blocks(Largest(), (5, 5), count, 3, rule).sum() == hidden


def test_slowfast_may_stop_short():
    """Places that are left over are -1, which the loss leaves out; it never hides too much."""
    mask = BlockMasking((14, 14), 75 / 196, 0, 16, "slowfast")(0, np.arange(60))
    counts = mask.hidden.sum(1)
    assert counts.max() == 75 and 60 < counts.min() < 75
    np.testing.assert_array_equal((mask.ids_mask >= 0).sum(1), counts)


def test_mmpretrain_never_reaches_the_last_row_and_column():
    """numpy's upper end is not included: the reference's own bug, and only with its switch."""
    mask = BlockMasking((14, 14), 75 / 196, 0, 16, "mmpretrain")(0, np.arange(60)).units
    assert not mask[:, -1].any() and not mask[:, :, -1].any() and (mask.sum((1, 2)) == 75).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ratio": 0.01}, "mask.ratio 0.01 hides none of the 16 patches"),
        ({"ratio": 0.99}, "hides 16 of the 16 patches, at most 15"),
        ({"ratio": 0.75, "rule": "mmpretrain"}, "hides 12 of the 16 patches, at most 9"),
        ({"ratio": 0.5, "min_block": 9}, "mask.min_block is 9, expected 0 to 8"),
    ],
)
def test_refused(arguments, words):
    """Nothing to predict, nothing to see, more than the rule reaches, or rectangles larger than the mask."""
    with pytest.raises(UserError, match=words):
        BlockMasking((4, 4), **{"seed": 0, **arguments})

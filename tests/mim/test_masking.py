"""Masks are data: exact counts, pure in (seed, epoch, sample), fair."""

from __future__ import annotations

import numpy as np
import pytest

from localmim.errors import UserError
from localmim.mim.masking import RandomMasking, TokenMask, mask_from_noise, mask_from_shuffle, num_visible


@pytest.mark.parametrize(
    ("patches", "ratio", "keep"),
    [(196, 0.75, 49), (100, 0.9, 9), (16, 0.6, 6), (64, 0.5, 32), (7, 0.1, 6), (2, 0.5, 1)],
)
def test_counts(patches, ratio, keep):
    """Truncated in floating point like the authors' (100 at 0.9 gives 9): published runs saw this many tokens."""
    assert num_visible(patches, ratio) == keep
    mask = RandomMasking(patches, ratio, 0)(0, np.arange(5))
    assert mask.ids_keep.shape == (5, keep) and mask.ids_mask.shape == (5, patches - keep)
    np.testing.assert_array_equal(mask.mask().sum(1), patches - keep)


def test_parts_are_a_permutation():
    """Visible and hidden patches are all patches once; ids_restore puts both back in image order; int32 throughout."""
    mask = RandomMasking(30, 0.6, 1)(2, np.arange(4))
    shuffled = np.concatenate([mask.ids_keep, mask.ids_mask], 1)
    np.testing.assert_array_equal(np.sort(shuffled, 1), np.tile(np.arange(30), (4, 1)))
    np.testing.assert_array_equal(np.take_along_axis(shuffled, mask.ids_restore, 1), np.tile(np.arange(30), (4, 1)))
    assert {a.dtype for a in mask.arrays()} == {np.dtype(np.int32)}
    hidden = mask.mask()
    assert hidden.dtype == np.float32
    np.testing.assert_array_equal(np.take_along_axis(hidden, mask.ids_keep, 1), 0)
    np.testing.assert_array_equal(np.take_along_axis(hidden, mask.ids_mask, 1), 1)


def equal(a: TokenMask, b: TokenMask) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a.arrays(), b.arrays()))


def test_pure_in_seed_epoch_and_sample():
    """A resumed run, other workers or another batch order must not change an image's mask."""
    masking = RandomMasking(49, 0.75, 5)
    batch = masking(3, np.array([7, 2, 11]))
    alone = [masking(3, np.array([s])) for s in (7, 2, 11)]
    again = RandomMasking(49, 0.75, 5)(3, np.array([11, 7, 2], np.int64))
    for row, (one, other) in enumerate(zip(alone, (1, 2, 0))):
        for whole, single, moved in zip(batch.arrays(), one.arrays(), again.arrays()):
            np.testing.assert_array_equal(whole[row], single[0])
            np.testing.assert_array_equal(whole[row], moved[other])


def test_does_not_touch_the_global_generator():
    """Masks may not depend on, or disturb, whatever else draws random numbers."""
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    first = RandomMasking(49, 0.75, 0)(0, np.arange(2))
    assert np.random.random() == expected
    assert equal(first, RandomMasking(49, 0.75, 0)(0, np.arange(2)))


def test_differs_between_samples_epochs_and_seeds():
    """Also where the numbers only change places: (seed 1, epoch 2, sample 3) is not (3, 2, 1)."""
    keys = [(s, e, i) for s in range(4) for e in range(4) for i in range(4)]
    masks = [RandomMasking(49, 0.75, s)(e, np.array([i])).ids_restore.tobytes() for s, e, i in keys]
    assert len(set(masks)) == len(keys)


def test_is_fair():
    """Every patch is hidden about equally often, and pairs are too: 4000 draws, five standard deviations."""
    n, patches = 4000, 16
    hidden = RandomMasking(patches, 0.75, 0)(0, np.arange(n)).mask()
    p = 12 / 16
    assert np.abs(hidden.mean(0) - p).max() < 5 * np.sqrt(p * (1 - p) / n)
    both = hidden.T @ hidden / n
    pair = p * 11 / 15
    off_diagonal = both[~np.eye(patches, dtype=bool)]
    assert np.abs(off_diagonal - pair).max() < 5 * np.sqrt(pair * (1 - pair) / n)


def test_order_of_the_visible():
    """The smallest noise first, as the MAE family does it: a reference's own noise can be replayed."""
    noise = np.array([[0.5, 0.1, 0.9, 0.3], [0.0, 0.7, 0.2, 0.6]])
    mask = mask_from_noise(noise, 2)
    np.testing.assert_array_equal(mask.ids_keep, [[1, 3], [0, 2]])
    np.testing.assert_array_equal(mask.ids_mask, [[0, 2], [3, 1]])
    np.testing.assert_array_equal(mask.mask(), [[1, 0, 1, 0], [0, 1, 0, 1]])
    assert equal(mask, mask_from_shuffle(np.argsort(noise, 1), 2))


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan")])
def test_ratio_outside(ratio):
    """Nothing to see, or nothing to predict."""
    with pytest.raises(UserError, match=r"mask.ratio must lie between 0 and 1"):
        RandomMasking(16, ratio, 0)


def test_ratio_too_close_to_the_ends():
    """Inside (0, 1), and still nothing is visible or hidden."""
    with pytest.raises(UserError, match="leaves none of the 4 patches visible"):
        num_visible(4, 0.8)
    with pytest.raises(UserError, match="hides none of the 4 patches"):
        num_visible(4, 1e-20)

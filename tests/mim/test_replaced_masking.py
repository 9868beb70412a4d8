"""Masks on whole images: which squares are hidden, and what of it the encoder and the head are told."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from localmim.errors import UserError
from localmim.mim.replaced_masking import SquareMasking, replaced_mask, spread


def masking(ratio: float = 0.6, seed: int = 0) -> SquareMasking:
    """SimMIM's squares of a Swin at 192 px: 6 x 6, of 8 x 8 tokens and one token of the tap each."""
    return SquareMasking((6, 6), (48, 48), (6, 6), ratio, seed)


@pytest.mark.parametrize(("ratio", "hidden"), [(0.6, 22), (0.5, 18), (0.75, 27), (0.01, 1)])
def test_counts_are_rounded_up(ratio, hidden):
    """ceil(count x ratio), where the methods that leave patches out round the visible ones down."""
    mask = masking(ratio)(0, np.arange(3))
    assert mask.units.sum(axis=(1, 2)).tolist() == [hidden] * 3
    assert mask.ids_mask.shape == (3, hidden)
    assert f"{hidden} of 6x6 squares" in masking(ratio).describe()


def test_pure_in_seed_epoch_and_sample():
    """A resumed run sees the same masks; neither the other images nor the global generator matter."""
    np.random.seed(0)
    mask = masking(seed=5)(3, np.array([7, 2, 11]))
    np.random.seed(1)
    again = masking(seed=5)(3, np.array([4, 7], np.int64), draw=9)
    np.testing.assert_array_equal(mask.units[0], again.units[1])
    draws = {masking(seed=s)(e, np.array([i])).units.tobytes() for s, e, i in itertools.product(range(4), repeat=3)}
    assert len(draws) == 64


def test_is_fair():
    """Every square is hidden about equally often: 1200 draws, five standard deviations."""
    share = 22 / 36
    hidden = masking()(0, np.arange(1200)).units.mean(axis=0)
    assert np.abs(hidden - share).max() < 5 * np.sqrt(share * (1 - share) / 1200)


def test_arrays_say_the_same():
    """Tokens, predicted places and the mask for pictures are one mask at three resolutions, rows before columns."""
    squares = SquareMasking((2, 3), (4, 6), (2, 3), 0.5, 0)
    mask = squares.of_order(np.array([[5, 0, 4, 1, 2, 3], [1, 2, 3, 0, 4, 5]]))
    assert mask.units.astype(int).tolist() == [[[1, 0, 0], [0, 1, 1]], [[0, 1, 1], [1, 0, 0]]]
    assert mask.ids_mask.tolist() == [[0, 4, 5], [1, 2, 3]]
    hidden, ids = mask.arrays()
    assert hidden.dtype == np.float32 and ids.dtype == np.int32
    assert hidden[0].reshape(4, 6).tolist() == [[1, 1, 0, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 1, 1]] * 2
    np.testing.assert_array_equal(mask.mask(), mask.units.reshape(2, 6))
    assert mask.tap(0).ids_mask is mask.ids_mask


def test_squares_of_several_tap_tokens():
    """A ViT's squares hold 2 x 2 patches: all of them are predicted."""
    mask = SquareMasking((2, 2), (4, 4), (4, 4), 0.5, 0).of_order(np.array([[3, 0]]))
    assert mask.ids_mask.tolist() == [[0, 1, 4, 5, 10, 11, 14, 15]]


def test_short_masks_are_filled_up():
    """Images may hide fewer than the most; the array's shape must not tell."""
    units = np.zeros((2, 2, 2), bool)
    units[0, 1, 1] = units[1, 0, 0] = units[1, 0, 1] = True
    mask = replaced_mask(units, (4, 4), (2, 2), 3)
    assert mask.ids_mask.tolist() == [[3, -1, -1], [0, 1, -1]]
    np.testing.assert_array_equal(mask.hidden.reshape(2, 4, 4), spread(units, (4, 4)))


def test_refuses_to_hide_everything():
    """ceil makes 0.99 of 36 squares all of them: the encoder would see nothing."""
    with pytest.raises(UserError, match=r"0\.99 leaves none of the 36 squares"):
        masking(0.99)

"""LoMaR's windows: where they lie, what is hidden in them, and who sees which."""

from __future__ import annotations

import math

import numpy as np
import pytest

from localmim.errors import UserError
from localmim.mim.window_masking import WindowMasking, authors_pairing

GRID, K, V = (9, 8), 4, 3


def masking(quirks: bool = False, **changes) -> WindowMasking:
    return WindowMasking(
        **{"grid": GRID, "window": K, "views": V, "quirks": quirks, "ratio": 0.8, "seed": 5, **changes}
    )


def corners(mask) -> np.ndarray:
    """(row, column) of each window's first patch, [B, V, 2]."""
    first = mask.ids.reshape(len(mask.ids), V, K * K)[..., 0]
    return np.stack(np.divmod(first, GRID[1]), axis=-1)


def test_windows_are_squares_of_neighbours_inside_the_image():
    """Tokens are row-major inside a window, which the encoder's relative places rely on."""
    mask = masking()(0, np.arange(40))
    for first, ids in zip(corners(mask).reshape(-1, 2), mask.ids.reshape(-1, K, K)):
        assert (first >= 0).all() and (first <= np.array(GRID) - K).all()
        expected = (first[0] + np.arange(K))[:, None] * GRID[1] + first[1] + np.arange(K)
        assert np.array_equal(ids, expected)


def test_an_image_sees_all_of_its_windows():
    """No two share a top row or a left column, in any image."""
    found = corners(masking()(3, np.arange(40)))
    for axis in (0, 1):
        assert all(len(set(values)) == V for values in found[..., axis])


def test_hidden_patches():
    """int(16 * 0.8) = 12 of each window, named by place and by patch alike."""
    mask = masking()(0, np.arange(5))
    assert mask.hidden.shape == (15, 16) and (mask.hidden.sum(1) == 12).all()
    ids = mask.ids.reshape(15, 16)
    for hidden, rows, patches, window in zip(mask.hidden, mask.rows, mask.ids_mask, ids):
        assert np.array_equal(np.flatnonzero(hidden), rows)
        assert np.array_equal(window[rows], patches)
    drawn = mask.mask()
    assert drawn.shape == (5, 72) and all(
        set(np.flatnonzero(m)) == set(p) for m, p in zip(drawn, mask.ids_mask.reshape(5, -1))
    )


def test_a_mask_depends_on_its_image_alone():
    """Not on the batch, and it is another one in the next epoch."""
    one, batch, later = masking()(2, np.array([7])), masking()(2, np.array([1, 7])), masking()(3, np.array([7]))
    assert np.array_equal(one.ids[0], batch.ids[1]) and np.array_equal(one.ids_mask, batch.ids_mask[V:])
    assert not np.array_equal(one.ids_mask, later.ids_mask)


def test_windows_of_the_authors():
    """One draw a batch; an image sees V / gcd(B, V) windows: with 6 images and 3 views the same one three times."""
    for batch in (4, 6, 9):
        found = corners(masking(quirks=True)(0, np.arange(batch)))
        assert len({tuple(c) for c in found.reshape(-1, 2)}) == V
        assert all(len({tuple(c) for c in image}) == V // math.gcd(batch, V) for image in found)
    shared = [corners(masking(quirks=True)(0, samples, draw=11)) for samples in (np.arange(4), np.arange(4, 8))]
    assert np.array_equal(*shared)


def test_every_row_of_the_authors_is_there_once():
    """The pairing is a permutation of their rows: noise of each row is used by one image."""
    noise = np.arange(4 * V, dtype=float).reshape(4, V, 1)
    top, left, drawn = authors_pairing(np.arange(V), 10 + np.arange(V), noise)
    assert sorted(drawn.ravel()) == list(range(4 * V))
    assert np.array_equal(top + 10, left) and np.array_equal(drawn[..., 0] % V, top)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": 6}, "mask.views is 6, expected 1 to 5"),
        ({"ratio": 0.99, "window": 2}, None),
        ({"ratio": 0.01}, "hides 0 of the 16 patches"),
    ],
)
def test_what_does_not_fit_is_one_line(changes, message):
    """More windows than places for them; nothing hidden. (Three of four hidden is fine.)"""
    if message is None:
        assert masking(**changes).count == 3
        return
    with pytest.raises(UserError, match=message):
        masking(**changes)

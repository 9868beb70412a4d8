"""Windows as index arrays: packed so that the fixed shape always suffices, and attending as the definition says."""

from __future__ import annotations

import numpy as np
import pytest

import plain
from localmim.models.windows import (
    Windows,
    group_shape,
    num_windows,
    pack,
    pack_windows,
    whole_windows,
    window_labels,
)

SIZES = {
    "192": (48, 48),
    "224": (56, 56),
    "256x320": (64, 80),
    "448": (112, 112),
}  # first stage's grid; units are 8 x 8


def stages(grid: tuple[int, int], window: int):
    """(stage, grid, window, shifts) as the encoder has them: no shift where one window spans a side."""
    for s in range(4):
        side = grid[0] >> s, grid[1] >> s
        fits = min(side) <= window
        yield s, side, min(side) if fits else window, (0,) if fits else (0, window // 2)


def unit_mask(rng: np.random.Generator, units: int, ratio: float) -> np.ndarray:
    """[units] bool, True = hidden; at least one visible."""
    hidden = np.ones(units, bool)
    hidden[rng.permutation(units)[: max(1, int(units * (1 - ratio)))]] = False
    return hidden


# --- pack


def check_packing(counts: list[int], capacity: int) -> int:
    """Nothing over capacity, no overlap, no hole, first-fit; returns the number of groups."""
    group, begin = pack(counts, capacity)
    groups = max(group) + 1
    assert set(group) == set(range(groups))
    used = [0] * groups
    for b, g, count in sorted(zip(begin, group, counts)):
        assert b == used[g]  # one window after the other: no overlap, no hole, each once
        used[g] += count
    assert sum(used) == sum(counts) and max(used) <= capacity
    smallest = sorted(used)[:2]
    assert groups == 1 or sum(smallest) > capacity  # else the later of two groups would not have been opened
    return groups


def test_pack_on_random_counts():
    """3000 draws: every window once, never over capacity, any two groups together over capacity."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        capacity = int(rng.integers(1, 200))
        counts = rng.integers(1, rng.integers(1, capacity + 1) + 1, size=rng.integers(1, 80))
        check_packing(counts.tolist(), capacity)


def fewest_groups(counts: list[int], capacity: int) -> int:
    """The exact optimum: fewest groups, then most room in the last one, over all orders (a DP over subsets)."""
    n = len(counts)
    best = [(0, capacity)] + [(n + 1, 0)] * (2**n - 1)  # (groups opened, tokens in the last)
    for subset in range(1, 2**n):
        for i in range(n):
            if subset >> i & 1:
                groups, used = best[subset ^ 1 << i]
                full = used + counts[i] > capacity
                best[subset] = min(best[subset], (groups + 1, counts[i]) if full else (groups, used + counts[i]))
    return best[-1][0]


def test_pack_is_near_the_optimum():
    """Every group too many costs attention on padding: first-fit decreasing is proved to need 11/9 optimum + 6/9."""
    rng = np.random.default_rng(1)
    more = []
    for _ in range(120):
        capacity = int(rng.integers(4, 50))
        counts = rng.integers(1, capacity + 1, size=rng.integers(2, 9)).tolist()
        groups, optimum = max(pack(counts, capacity)[0]) + 1, fewest_groups(counts, capacity)
        assert optimum <= groups <= 11 / 9 * optimum + 6 / 9
        more.append(groups - optimum)
    assert np.mean(more) < 0.05  # nearly always the optimum itself


def partitions(total: int, largest: int):
    """All multisets of positive counts that sum to `total`, none above `largest`."""
    if total == 0:
        yield []
    for first in range(min(total, largest), 0, -1):
        for rest in partitions(total - first, first):
            yield [first, *rest]


@pytest.mark.parametrize(("window", "tokens"), [(1, 6), (2, 26), (3, 21)])
def test_group_shape_suffices_for_all_counts(window, tokens):
    """The bound by brute force: every way of spreading up to so many tokens over windows, however many windows."""
    S = window * window
    reached = set()
    for N in range(1, tokens + 1):
        G, slots = group_shape(N, (1000, 1000), window, 0)
        assert slots == min(N, S)
        needed = max(max(pack(counts, slots)[0]) + 1 for counts in partitions(N, slots))
        assert needed <= G
        reached |= {N} if needed == G else set()
    if window == 3:  # not larger than it must be: two windows of 5 never share 9 slots
        assert {10, 15, 20} <= reached


@pytest.mark.parametrize(("window", "shift"), [(7, 0), (7, 3), (14, 0), (14, 7), (5, 2), (8, 4), (1, 0)])
@pytest.mark.parametrize("grid", [(56, 56), (14, 14), (9, 31), (64, 80), (7, 21)])
def test_num_windows(grid, window, shift):
    """Groups never outnumber windows: the count must be that of the labels that occur."""
    coordinates = np.argwhere(np.ones(grid))
    assert num_windows(grid, window, shift) == len(np.unique(window_labels(coordinates, grid, window, shift)))


# --- packed windows


def official_labels(grid: tuple[int, int], window: int, shift: int) -> np.ndarray:
    """The window of each place of a grid [h, w], by rolling and masking the whole grid."""
    tokens, regions = plain.rolled_windows(grid, window, shift)
    labels = np.empty(grid[0] * grid[1], int)
    labels[tokens[tokens >= 0]] = (np.arange(len(tokens))[:, None] * 9 + regions)[tokens >= 0]
    return labels.reshape(grid)


def check_windows(packed: Windows, coordinates: np.ndarray, grid: tuple[int, int], window: int, shift: int) -> None:
    """Shapes, inverses, who attends to whom, and relative positions, for any packing of visible tokens."""
    N, S = len(coordinates), min(len(coordinates), window * window)
    G = group_shape(N, grid, window, shift)[0]
    never = (2 * window - 1) ** 2
    assert packed.pairs.shape == (G, S, S) and packed.slots.shape == (G * S,) and packed.place.shape == (N,)
    assert {a.dtype for a in packed} == {np.dtype(np.int32)}
    assert packed.pairs.min() >= 0 and packed.pairs.max() <= never  # the kernel does not check its indices
    np.testing.assert_array_equal(packed.slots[packed.place], np.arange(N))
    real = np.zeros(G * S, bool)
    real[packed.place] = True
    assert real.sum() == N and not packed.slots[~real].any()

    label = official_labels(grid, window, shift)[tuple(coordinates.T)]  # [N]
    slots, real = packed.slots.reshape(G, S), real.reshape(G, S)
    groups_of = np.unique(np.stack([label, packed.place // S]), axis=1)
    assert len(groups_of[0]) == len(np.unique(label))  # a window's tokens are all in one group ...
    same = label[slots][:, :, None] == label[slots][:, None, :]
    attend = packed.pairs < never
    both = real[:, :, None] & real[:, None, :]
    np.testing.assert_array_equal(attend[both], same[both])  # ... and there, the same window is to attend
    assert not attend[real[:, :, None] != real[:, None, :]].any()  # no token attends to a pad, no pad to a token
    assert attend[:, np.arange(S), np.arange(S)].all()  # a softmax over nothing would be NaN
    g, q, k = np.nonzero(attend & both)
    rows = plain.relative_rows(coordinates[slots[g, q]], coordinates[slots[g, k]], window)
    np.testing.assert_array_equal(packed.pairs[g, q, k], rows)


@pytest.mark.parametrize("window", [7, 14, 5, 8])
@pytest.mark.parametrize(("size", "count"), [("192", 24), ("224", 32), ("256x320", 14), ("448", 4)])
def test_masks(size, window, count):
    """Two tokens attend to one another if and only if they share a window, and the fixed shape always holds them.

    Random masks, ratios 0.25 to 0.9, all stages, both shifts, true coordinates and the authors'.
    """
    rng = np.random.default_rng([window, *SIZES[size]])
    for n in range(count):
        units = SIZES[size][0] // 8, SIZES[size][1] // 8
        hidden = unit_mask(rng, units[0] * units[1], rng.uniform(0.25, 0.9) if size != "448" else 0.75)
        for s, grid, side, shifts in stages(SIZES[size], window):
            _, coordinates = plain.swin_coordinates(hidden, grid, units, scrambled=n % 2 > 0 and s > 0)
            for shift in shifts:
                check_windows(pack_windows(coordinates, grid, side, shift), coordinates, grid, side, shift)


@pytest.mark.parametrize("window", [7, 14, 5, 8])
def test_shape_suffices_for_thousands_of_masks(window):
    """800 masks a window, 192 to 256x320 px, packed for their number of groups alone."""
    rng = np.random.default_rng(window)
    for n in range(800):
        size = SIZES[("192", "224", "256x320")[n % 3]]
        units = size[0] // 8, size[1] // 8
        hidden = unit_mask(rng, units[0] * units[1], rng.uniform(0.25, 0.9))
        s, grid, side, shifts = list(stages(size, window))[n // 3 % 2]
        _, coordinates = plain.swin_coordinates(hidden, grid, units, scrambled=n // 6 % 2 > 0 and s > 0)
        shift = shifts[n // 12 % len(shifts)]
        labels = plain.window_labels(coordinates, side, shift) @ (1000, 1)
        counts = np.unique(labels, return_counts=True)[1]
        G, S = group_shape(len(coordinates), grid, side, shift)
        assert max(pack(counts.tolist(), S)[0]) < G


@pytest.mark.parametrize(("shift", "share"), [(0, 0.5), (3, 0.03), (3, 0.9)])
def test_any_tokens(shift, share):
    """The bound does not lean on units: any set of places of a grid, even a single one, or all but a few."""
    rng = np.random.default_rng(5)
    for grid in ((20, 33), (14, 14), (7, 28), (8, 9)):
        for _ in range(8):
            coordinates = np.argwhere(rng.random(grid) < share)
            coordinates = coordinates if len(coordinates) else np.array([[grid[0] - 1, grid[1] - 1]])
            check_windows(pack_windows(coordinates, grid, 7, shift), coordinates, grid, 7, shift)


def test_worst_case_fills_the_bound():
    """25 tokens in each of 30 windows of 49: no two share a group, and all 30 groups of the fixed shape are used."""
    cells = np.argwhere(np.ones((7, 7)))[:25]
    corners = np.argwhere(np.ones((6, 5))) * 7
    coordinates = (corners[:, None] + cells).reshape(-1, 2)
    assert group_shape(len(coordinates), (56, 56), 7, 0) == (30, 49)
    packed = pack_windows(coordinates, (56, 56), 7, 0)
    check_windows(packed, coordinates, (56, 56), 7, 0)
    assert len(np.unique(packed.place // 49)) == 30


@pytest.mark.parametrize(
    ("window", "shift", "s", "scrambled", "least"),
    [(7, 0, 0, False, 23), (7, 3, 0, False, 23), (7, 0, 1, False, 7), (7, 0, 1, True, 6), (14, 0, 0, False, 7)],
)
def test_adversarial_masks(window, shift, s, scrambled, least):
    """Masks of 224 px searched for as many groups as possible: never above the fixed number, which some do need.

    Random masks need 16 to 19 of 31 groups at the first stage, and 4 or 5 of 7 at the second or with windows of 14.
    """
    rng = np.random.default_rng(3)
    units, grid = (7, 7), (56 >> s, 56 >> s)
    labels = np.zeros((49, 64 >> 2 * s), int)  # the window of each unit's tokens
    for u in range(49):
        _, coordinates = plain.swin_coordinates(np.arange(49) != u, grid, units, scrambled)
        labels[u] = plain.window_labels(coordinates, window, shift) @ (1000, 1)
    labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    N = 12 * labels.shape[1]
    G, S = group_shape(N, grid, window, shift)

    def score(visible: np.ndarray) -> tuple[int, int, float]:
        """Groups; then windows more than half full, and how little more: two such never share a group."""
        counts = np.bincount(labels[visible].ravel())
        counts = counts[counts > 0]
        large = counts[counts > S / 2]
        return max(pack(counts.tolist(), S)[0]) + 1, len(large), -large.sum()

    most = 0
    for _ in range(3):
        order = rng.permutation(49)
        now = score(order[:12])
        for _ in range(700):
            trial = order.copy()
            i, j = rng.integers(12), rng.integers(12, 49)
            trial[[i, j]] = trial[[j, i]]
            new = score(trial[:12])
            assert new[0] <= G
            if new >= now:
                order, now = trial, new
        most = max(most, now[0])
        hidden = np.ones(49, bool)
        hidden[order[:12]] = False
        _, coordinates = plain.swin_coordinates(hidden, grid, units, scrambled)
        check_windows(pack_windows(coordinates, grid, window, shift), coordinates, grid, window, shift)
    assert most >= least  # far above what random masks need


def test_few_tokens_stay_in_order():
    """One group needs no gather: slots and places are the tokens' own order."""
    coordinates = np.array([[8, 8], [0, 0], [3, 3], [6, 6]])
    packed = pack_windows(coordinates, (14, 14), 7, 0)
    assert packed.pairs.shape == (1, 4, 4)
    np.testing.assert_array_equal(packed.slots, range(4))
    np.testing.assert_array_equal(packed.place, range(4))
    np.testing.assert_array_equal(packed.pairs[0] < 169, [[1, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]])


# --- whole images

GRIDS = [((14, 14), 7), ((7, 7), 7), ((8, 8), 7), ((15, 22), 7), ((5, 31), 4), ((4, 6), 7), ((16, 24), 8), ((3, 9), 5)]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), GRIDS)
def test_whole_windows(grid, window, shifted):
    """Window by window the official Swin's: filled up, rolled, cut, and regions that were apart masked."""
    shift = window // 2 if shifted else 0
    whole = whole_windows(grid, window, shift)
    tokens, regions = plain.rolled_windows(grid, window, shift)
    N, S = grid[0] * grid[1], window * window
    np.testing.assert_array_equal(whole.slots.reshape(-1, S), np.where(tokens < 0, N, tokens))
    np.testing.assert_array_equal(whole.slots[whole.place], np.arange(N))
    cells = np.stack(np.divmod(np.arange(S), window), axis=1)
    rows = plain.relative_rows(cells[:, None], cells[None], window)
    expected = np.where(regions[:, :, None] == regions[:, None], rows, (2 * window - 1) ** 2)
    np.testing.assert_array_equal(whole.pairs, expected)
    assert {a.dtype for a in whole} == {np.dtype(np.int32)}


@pytest.mark.parametrize(("window", "shift"), [(7, 0), (7, 3), (8, 4)])
def test_all_visible_is_the_whole_image(window, shift):
    """With nothing hidden, pre-training's attention is downstream's."""
    grid = (2 * window, 3 * window)
    coordinates = np.argwhere(np.ones(grid))
    N = len(coordinates)

    def matrix(windows: Windows) -> np.ndarray:
        """[N, N]: the bias row of each pair."""
        group, slot = np.divmod(windows.place, windows.pairs.shape[1])
        rows = windows.pairs[group[:, None], slot[:, None], slot[None]]
        return np.where(group[:, None] == group[None], rows, (2 * window - 1) ** 2)

    packed = pack_windows(coordinates, grid, window, shift)
    assert packed.place.shape == (N,)
    np.testing.assert_array_equal(matrix(packed), matrix(whole_windows(grid, window, shift)))

"""Which tokens attend to which in a Swin transformer, as index arrays of fixed shape, made on the host.

Two tokens attend to one another if and only if they have the same window label. Attention runs on groups of S slots
that hold whole windows; the shapes of the arrays depend on the number of tokens alone, not on which they are:

* pairs [G, S, S]: row of the bias table for each pair of slots of a group, or the table's length for a pair in
  different windows, which must not attend.
* slots [G*S]: the token in each slot. Slots that are left over hold token 0 and attend only among themselves.
* place [N]: the slot of each token.

Visible tokens of a masked image are packed: several windows share a group. When all tokens fit into one group (G = 1,
S = N), it holds them in their own order, so that nothing need be moved. A whole image has one group a window.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Windows(NamedTuple):
    """Index arrays, int32; see the module's docstring."""

    pairs: np.ndarray
    slots: np.ndarray
    place: np.ndarray


def num_windows(grid: tuple[int, int], window: int, shift: int) -> int:
    """Windows on a grid; with a shift those at the edges are narrower."""
    return int(np.prod([(side - 1 + (window - shift) % window) // window + 1 for side in grid]))


def window_labels(coordinates: np.ndarray, grid: tuple[int, int], window: int, shift: int) -> np.ndarray:
    """The window of each token: coordinates (row, column) [N, 2] on a grid (h, w) -> labels [N].

    A shift puts the borders at shift, shift + window, ...: what rolling the image and masking what wraps around does.
    """
    offset = (window - shift) % window
    rows, columns = ((coordinates + offset) // window).T
    return rows * (grid[1] // window + 2) + columns


def group_shape(tokens: int, grid: tuple[int, int], window: int, shift: int) -> tuple[int, int]:
    """(G, S): groups and slots of a group that hold any `tokens` of a grid, however they lie.

    S is a window's area, or the number of tokens when it is smaller. Packing is first-fit, so of two groups together
    more than S tokens are in use: a group is only opened when its first window did not fit into any before. Hence
    floor(G/2) * (S + 1) tokens are needed to fill G groups, plus one for an odd one; and no group is empty, so G is
    at most the number of windows.
    """
    S = min(tokens, window * window)
    if tokens <= S:
        return 1, S
    G = 2 * (tokens // (S + 1))
    G += tokens % (S + 1) > 0
    return min(G, num_windows(grid, window, shift)), S


def pack(counts: list[int], capacity: int) -> tuple[list[int], list[int]]:
    """First-fit decreasing: the group of each window, and the slot in it where the window begins.

    Args:
        counts: Tokens of each window, each at most `capacity`.
        capacity: Slots of a group.
    """
    used: list[int] = []
    group, begin = [0] * len(counts), [0] * len(counts)
    for i in sorted(range(len(counts)), key=lambda i: -counts[i]):
        need = counts[i]
        room = capacity - need
        g = next((g for g, u in enumerate(used) if u <= room), len(used))
        if g == len(used):
            used.append(0)
        group[i], begin[i] = g, used[g]
        used[g] += need
    return group, begin


def pack_windows(coordinates: np.ndarray, grid: tuple[int, int], window: int, shift: int) -> Windows:
    """The visible tokens' windows, packed.

    Args:
        coordinates: (row, column) of each token on the grid, [N, 2].
        grid: (h, w) in tokens.
        window: Side of a window; shift: where its borders lie.
    """
    N = len(coordinates)
    G, S = group_shape(N, grid, window, shift)
    labels = window_labels(coordinates, grid, window, shift)
    codes = pair_codes(coordinates, window)
    if G == 1 and S == N:
        order = np.arange(N, dtype=np.int32)
        return Windows(pair_rows(codes[None], labels[None], window), order, order)
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    group, begin = pack(counts.tolist(), S)
    order = np.argsort(inverse, kind="stable")  # tokens window by window
    first = np.asarray(group) * S + np.asarray(begin)  # [windows], the slot of a window's first token
    ends = np.cumsum(counts)
    place = np.empty(N, np.int32)
    place[order] = np.repeat(first - (ends - counts), counts) + np.arange(N)
    slots = np.zeros(G * S, np.int32)
    slots[place] = np.arange(N, dtype=np.int32)
    filled = np.full(G * S, -1, labels.dtype)
    filled[place] = labels
    return Windows(pair_rows(codes[slots].reshape(G, S), filled.reshape(G, S), window), slots, place)


def whole_windows(grid: tuple[int, int], window: int, shift: int) -> Windows:
    """The windows of a whole image, one a group, as the official Swin has them.

    A grid that is no multiple of the window is filled up at the right and at the bottom. Tokens there exist for
    attention only: slots name them as token h * w, one past the last, and others attend to them.
    """
    h, w = grid
    H, W = (-(-side // window) * window for side in grid)
    rows = (np.arange(H) + shift) % H  # rolled
    columns = (np.arange(W) + shift) % W
    i, j = (a.reshape(H // window, window, W // window, window) for a in np.meshgrid(rows, columns, indexing="ij"))
    i, j = (a.transpose(0, 2, 1, 3).reshape(-1, window * window) for a in (i, j))  # [G, S]
    slots = np.where((i < h) & (j < w), i * w + j, h * w).astype(np.int32)
    coordinates = np.stack([i.ravel(), j.ravel()], axis=1)
    labels = window_labels(coordinates, (H, W), window, shift).reshape(slots.shape)
    codes = pair_codes(coordinates, window).reshape(slots.shape)
    place = np.empty(h * w + 1, np.int32)
    place[slots.ravel()] = np.arange(slots.size, dtype=np.int32)
    return Windows(pair_rows(codes, labels, window), slots.ravel(), place[: h * w])


def pair_codes(coordinates: np.ndarray, window: int) -> np.ndarray:
    """One number a token, whose differences tell relative positions inside a window: [N, 2] -> int32 [N]."""
    return (coordinates[:, 0] * (2 * window - 1) + coordinates[:, 1]).astype(np.int32)


def pair_rows(codes: np.ndarray, labels: np.ndarray, window: int) -> np.ndarray:
    """Rows of the bias table: codes and labels [G, S] -> int32 [G, S, S], query first.

    Row (drow + w - 1) * (2w - 1) + dcolumn + w - 1 for a query minus its key; (2w - 1)^2 where labels differ.
    """
    centre = (window - 1) * 2 * window
    rows = codes[:, :, None] - codes[:, None, :] + np.int32(centre)
    return np.where(labels[:, :, None] == labels[:, None, :], rows, np.int32((2 * window - 1) ** 2))


def nested_offsets(r: int, rows_first: bool) -> np.ndarray:
    """(row, column) of the r x r tokens of a unit, quads of quads: [r*r, 2].

    A quad is (0,0), (1,0), (0,1), (1,1), the official Swin's order of merging, and with `rows_first`
    (0,0), (0,1), (1,0), (1,1).
    """
    quad = np.array([[0, 0], [0, 1], [1, 0], [1, 1]] if rows_first else [[0, 0], [1, 0], [0, 1], [1, 1]])
    offsets = np.zeros((1, 2), np.int64)
    while len(offsets) < r * r:
        offsets = (offsets[:, None] * 2 + quad).reshape(-1, 2)
    return offsets

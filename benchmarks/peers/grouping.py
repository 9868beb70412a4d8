"""A Swin on visible tokens as the authors run it: coordinates, groups of windows, ways back to image order; numpy only.

After Huang et al., "Green Hierarchical Vision Transformer for Masked Image Modeling" (NeurIPS 2022), whose grouping
LocalMIM uses. Tokens are unit by unit, a unit being a square of pixels that is hidden as a whole, and row by row inside
a unit. Two tokens attend to one another if they lie in one window. Few tokens are one group with a mask; of many, whole
windows are packed into groups by solving one knapsack a group.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Groups(NamedTuple):
    """Windows of one shift of a stage, N tokens in G groups of S slots.

    Attributes:
        slots: [G*S] the token in each slot, 0 in those left over; None where the one group has all tokens in order.
        place: [N] the slot of each token, or None.
        index: [G, S, S] row of the bias table for each pair, 0 for a pair that does not attend.
        mask: float32 [G, 1, S, S], 0 or minus infinity where a pair does not attend. (The authors have -100, whose
            exponential is a denormal number: a CPU then multiplies several times slower. The result is the same.)
    """

    slots: np.ndarray | None
    place: np.ndarray | None
    index: np.ndarray
    mask: np.ndarray


def coordinates(visible: np.ndarray, side: int, grid: tuple[int, int], units: tuple[int, int], first: bool):
    """(row, column) of the visible tokens of a stage, [N, 2].

    True ones in the first stage. Later the authors read them off numbers that count unit by unit as if these counted
    row by row, which is kept here: the weights they published were trained so.

    Args:
        visible: Numbers of the visible units, ascending, row-major.
        side: Tokens a side of a unit; grid: tokens of the stage; units: units of an image; first: of the first stage.
    """
    if not first:
        numbers = visible[:, None] * side**2 + np.arange(side**2)
        return np.stack(np.divmod(numbers.reshape(-1), grid[1]), axis=1)
    return np.stack(np.divmod(patches(visible, side, units), grid[1]), axis=1)


def patches(visible: np.ndarray, side: int, units: tuple[int, int]) -> np.ndarray:
    """Row-major numbers of the visible tokens: unit by unit, row by row inside, [N]."""
    i, j = np.divmod(visible, units[1])
    a, b = np.divmod(np.arange(side**2), side)
    rows, columns = i[:, None] * side + a, j[:, None] * side + b
    return (rows * (units[1] * side) + columns).reshape(-1)


def restore(hidden: np.ndarray, side: int) -> np.ndarray:
    """The place of each token of a grid, unit by unit, among the visible, then the hidden ones: [L]."""
    return np.argsort(np.argsort(np.repeat(hidden, side**2), kind="stable"))


def knapsack(counts: list[int], capacity: int) -> list[int]:
    """Which windows fill a group best: numbers of the chosen, by the usual table, leaving out what does not help."""
    best = np.zeros((len(counts) + 1, capacity + 1), int)
    for i, count in enumerate(counts):
        best[i + 1] = best[i]
        best[i + 1, count:] = np.maximum(best[i, count:], best[i, : capacity + 1 - count] + count)
    chosen, room = [], capacity
    for i in reversed(range(len(counts))):
        if best[i + 1, room] != best[i, room]:
            chosen.append(i)
            room -= counts[i]
    return chosen[::-1]


def group_windows(places: np.ndarray, window: int, shift: int) -> Groups:
    """Tokens at places [N, 2] in groups."""
    offset = (window - shift) % window
    N = len(places)
    rows, columns = ((places + offset) // window).T
    labels = rows * N + columns
    if len(places) <= 2 * window**2:
        return Groups(None, None, *relations(places[None], labels[None], window))
    windows, counts = np.unique(labels, return_counts=True)
    members = [np.flatnonzero(labels == label) for label in windows]
    size, left, groups = min(window**2, counts.max()), list(range(len(windows))), []
    while left:
        chosen = [left[i] for i in knapsack([int(counts[i]) for i in left], int(size))]
        groups.append(np.concatenate([members[i] for i in chosen]))
        left = [i for i in left if i not in chosen]
    slots = np.zeros((len(groups), size), int)
    filled = np.full(slots.shape, -1)
    for g, tokens in enumerate(groups):
        slots[g, : len(tokens)] = tokens
        filled[g, : len(tokens)] = labels[tokens]
    place = np.empty(N, int)
    place[slots[filled >= 0]] = np.flatnonzero(filled.reshape(-1) >= 0)
    return Groups(slots.reshape(-1), place, *relations(places[slots], filled, window))


def relations(places: np.ndarray, labels: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """index and mask of `Groups` for tokens at places [G, S, 2] in windows [G, S]; slots of label -1 are left over."""
    same = labels[:, :, None] == labels[:, None]
    rows, columns = np.moveaxis(places[:, :, None] - places[:, None] + window - 1, -1, 0)
    index = np.where(same, rows * (2 * window - 1) + columns, 0)
    return index, np.where(same, 0, -np.inf).astype(np.float32)[:, None]

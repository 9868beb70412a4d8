"""Data sinking: a step's inputs wait on the device, where MindData's threads put them while it computes.

MindSpore has it on GPU and Ascend. A row of a run (sample numbers, then the inputs of each forward pass) is a row of a
MindData set, and `mindspore.data_sink` sends the rows ahead. What is computed is the same; the rows are only made
earlier, so `bad_images` may name an image before the step that would have met it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
from mindspore import Tensor

from localmim.errors import UserError

Row = tuple[np.ndarray, Sequence[tuple[np.ndarray | Tensor, ...]]]  # sample numbers, inputs of each forward pass


def require_sink(device: str) -> None:
    """UserError where the device has no queue."""
    if device == "CPU":
        raise UserError("data.sink is true, but a CPU has no queue to sink data to: expected false, or a GPU or Ascend")


def _together(*columns: Tensor) -> tuple[Tensor, ...]:
    return columns


class _Flat:
    """Rows as MindData takes them, one tuple of arrays each. MindData also iterates it to learn the shapes."""

    def __init__(self, rows):
        self.rows, self.error = rows, None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        flat = None
        try:
            for ids, parts in self.rows:
                flat = (ids, *(array for part in parts for array in part))
                yield flat
        except Exception as error:  # MindData would make a RuntimeError with pages of text of it
            self.error = error
            while flat is not None:  # whoever takes it looks at the error first
                yield flat


def sunk(rows) -> Iterator[Row]:
    """`rows`, whose arrays are on the device already. `rows` has a length and begins anew whenever it is iterated."""
    if not len(rows):
        return
    _, parts = next(iter(rows))
    passes, width = len(parts), len(parts[0])
    names = ["sample", *(f"input_{i}" for i in range(passes * width))]
    flat = _Flat(rows)
    dataset = ds.GeneratorDataset(flat, names, shuffle=False, num_parallel_workers=1)
    take = ms.data_sink(_together, dataset)
    for _ in range(len(rows)):
        ids, *arrays = take()
        if flat.error is not None:
            raise flat.error
        yield ids.asnumpy(), [tuple(arrays[i * width : (i + 1) * width]) for i in range(passes)]

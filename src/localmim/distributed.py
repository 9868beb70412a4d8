"""The devices that share a job: those that MindSpore's msrun started, or this one alone.

A device that waits for the others in vain would wait for ever. So whatever waits does it under a time limit: when that
is over, the process says so in one line and ends, and the launcher ends the rest.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from localmim.errors import PeerError

_UNIT = 4096.0
WAIT_LIMIT_S = 1800.0


class _Sum(nn.Cell):
    def __init__(self):
        super().__init__()
        self.sum = ops.AllReduce()

    def construct(self, x):
        return self.sum(x)


@functools.cache
def _sum() -> _Sum:
    """One for all sums: it keeps a compiled graph for each shape."""
    return _Sum()


class Ranks(NamedTuple):
    """This process among those of the job.

    Attributes:
        rank, world: Its number, from 0, and how many there are.
        limit_s: Seconds that it waits for the others.
    """

    rank: int = 0
    world: int = 1
    limit_s: float = WAIT_LIMIT_S

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def total(self, values: np.ndarray, doing: str = "adding up results") -> np.ndarray:
        """The sum of everyone's `values`, the same on all: float64 [n], whole numbers below 2^36 exact."""
        values = np.asarray(values, np.float64)
        if self.world == 1:
            return values
        high = np.floor(values / _UNIT)  # CPUs reduce in float32, which alone would lose counts above 2^24
        parts = np.stack([high, values - high * _UNIT])
        with self.limit(doing):
            high, low = _sum()(Tensor(parts, ms.float32)).asnumpy().astype(np.float64)
        return high * _UNIT + low

    def gather(self, *values: float) -> np.ndarray:
        """Everyone's `values`, the same on all: float64 [n, world]."""
        table = np.zeros((len(values), self.world))
        table[:, self.rank] = values
        return self.total(table.ravel()).reshape(table.shape)

    def rows(self, values: np.ndarray) -> np.ndarray:
        """Everyone's rows, float32 [n, D] with an n of one's own, rank after rank; bit for bit the same on all."""
        if self.world == 1:
            return values
        counts = self.gather(len(values))[0].astype(int)
        table = np.zeros((counts.sum(), values.shape[1]))
        first = counts[: self.rank].sum()
        table[first : first + len(values)] = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return self.total(table.ravel()).astype(np.uint32).view(np.float32).reshape(table.shape)

    def union(self, numbers: set[int]) -> set[int]:
        """Everyone's whole `numbers` from 0 to below 2^36, the same on all."""
        longest = int(self.gather(len(numbers)).max())
        if self.world == 1 or not longest:
            return set(numbers)
        table = np.zeros((self.world, 2 ** (longest - 1).bit_length()))  # few widths: each is a graph of its own
        table[self.rank, : len(numbers)] = np.asarray(sorted(numbers)) + 1
        table = self.total(table.ravel())
        return set((table[table > 0] - 1).astype(int).tolist())

    def agree(self, error: Exception | None, doing: str) -> None:
        """All go on, or none: raises `error` where there is one, and PeerError where another process has one."""
        failed = self.gather(float(error is not None))[0] if self.world > 1 else [error is not None]
        if error is not None:
            raise error
        if any(failed):
            raise PeerError(f"rank {int(np.argmax(failed))} failed in {doing}")

    def limit(self, doing: str):
        """Inside this context the process ends when it takes longer than `limit_s`; nothing where it is alone."""
        return contextlib.nullcontext() if self.world == 1 else time_limit(self.limit_s, self.rank, doing)


@contextlib.contextmanager
def time_limit(seconds: float, rank: int, doing: str):
    """Ends the process with exit code 3 if the context is not left in time. It cannot be an exception: what waits for
    another process is in compiled code."""

    def give_up():
        print(
            f"stopped: rank {rank} waited {seconds:g} s for the others, {doing}; "
            "wait_limit_s says how long it may, and the other logs what they were doing",
            file=sys.stderr,
            flush=True,
        )
        os._exit(3)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def join(limit_s: float = WAIT_LIMIT_S) -> Ranks:
    """Meets the other processes of the job. Call it after the device is set.

    msrun says by MS_WORKER_NUM how many there are; without it this process is alone.
    """
    if int(os.environ.get("MS_WORKER_NUM", "1")) <= 1:
        return Ranks()
    from mindspore.communication import get_group_size, get_rank, init

    init()
    return Ranks(get_rank(), get_group_size(), limit_s)

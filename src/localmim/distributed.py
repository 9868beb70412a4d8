"""The devices that share a job: those that MindSpore's msrun started, or this one alone."""

from __future__ import annotations

import os
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

_UNIT = 4096.0


class _Sum(nn.Cell):
    def __init__(self):
        super().__init__()
        self.sum = ops.AllReduce()

    def construct(self, x):
        return self.sum(x)


class Ranks(NamedTuple):
    """This process among those of the job."""

    rank: int = 0
    world: int = 1

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum of everyone's `values`, the same on all: float64 [n], whole numbers below 2^36 exact."""
        if self.world == 1:
            return values
        high = np.floor(values / _UNIT)  # CPUs reduce in float32, which alone would lose counts above 2^24
        parts = np.stack([high, values - high * _UNIT])
        high, low = _Sum()(Tensor(parts, ms.float32)).asnumpy().astype(np.float64)
        return high * _UNIT + low


def join() -> Ranks:
    """Meets the other processes of the job. Call it after the device is set.

    msrun says by MS_WORKER_NUM how many there are; without it this process is alone.
    """
    if int(os.environ.get("MS_WORKER_NUM", "1")) <= 1:
        return Ranks()
    from mindspore.communication import get_group_size, get_rank, init

    init()
    return Ranks(get_rank(), get_group_size())

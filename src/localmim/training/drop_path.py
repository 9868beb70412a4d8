"""Stochastic depth as data: factors drawn on the host, as masks are, so that runs can go on bit for bit.

Huang et al., "Deep Networks with Stochastic Depth" (ECCV 2016), by sample as timm has it: a branch is dropped for a
sample with the rate of its block, and divided by the share that is kept otherwise. mindcv's DropPath draws inside the
graph from a global seed, and what it draws next cannot be saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_PURPOSE = 0x64726F70  # keeps this stream of random numbers apart from that of masks


def drop_path_factors(rates: Sequence[float], seed: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """What the attention and the MLP of each block are multiplied with, float32 [depth, 2, B]: 0 or 1 / (1 - rate).

    Args:
        rates: Rate of each block.
        samples: Sample numbers [B]; each has its own stream, whatever the batch.
    """
    draws = [np.random.default_rng([seed, epoch, int(s), _PURPOSE]).random((len(rates), 2)) for s in samples]
    keep = 1 - np.asarray(rates).reshape(-1, 1, 1)
    return np.where(np.stack(draws, axis=-1) < keep, 1 / keep, 0).astype(np.float32)

"""Stochastic depth as data: factors drawn on the host, as masks are, so that runs can go on bit for bit.

Huang et al., "Deep Networks with Stochastic Depth" (ECCV 2016), by sample as timm has it: a branch is dropped for a
sample with the rate of its block, and divided by the share that is kept otherwise. mindcv's DropPath draws inside the
graph from a global seed, and what it draws next cannot be saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_PURPOSE = 0x64726F70  # keeps this stream of random numbers apart from that of masks


def drop_path_factors(
    rates: Sequence[float], seed: int, epoch: int, samples: np.ndarray, views: int = 1, shared: int = 0
) -> np.ndarray:
    """What both branches of each block are multiplied with, float32 [depth, 2, B*views]: 0 or 1 / (1 - rate).

    Args:
        rates: Rate of each block.
        samples: Sample numbers [B]; each has its own stream, whatever the batch.
        views: Rows of the encoder that a sample makes, side by side; each has its own draws.
        shared: In so many first blocks the views of a sample are dropped together: where they are one pass through the
            authors' code (FastConvMAE's convolution stages), a branch is dropped for the image.
    """
    streams = [np.random.default_rng([seed, epoch, int(s), _PURPOSE]) for s in samples]
    draws = np.concatenate([stream.random((len(rates), 2, views)) for stream in streams], axis=-1)  # [depth, 2, B*V]
    draws[:shared] = draws[:shared, :, ::views].repeat(views, axis=-1)
    keep = 1 - np.asarray(rates).reshape(-1, 1, 1)
    return np.where(draws < keep, 1 / keep, 0).astype(np.float32)

"""Losses: how far a row of predictions is from its target, in float32, and the mean over rows.

A row is one hidden patch, or one cell: a loss gives an error a row, so that rows can be weighted. Sums over the last
axis are products with a column of ones, because a CPU reduces on one thread only but multiplies on all of them.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row: [B, R, D], [B, R, D] -> [B, R] float32."""
    difference = _difference(prediction, target)
    return _row_means(difference * difference, prediction.shape)


def absolute_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of each row: [B, R, D], [B, R, D] -> [B, R] float32."""
    return _row_means(ops.abs(_difference(prediction, target)), prediction.shape)


def _difference(prediction: Tensor, target: Tensor) -> Tensor:
    """[B, R, D], [B, R, D] -> [B*R, D] float32."""
    difference = prediction.astype(ms.float32) - target.astype(ms.float32)
    return difference.reshape(-1, prediction.shape[2])


def _row_means(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """[B*R, D] -> [B, R] for shape (B, R, D)."""
    B, R, D = shape
    return ops.matmul(x, ops.ones((D, 1), ms.float32)).reshape(B, R) / D


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """-log softmax(logits)[id] of each cell, n cells a row: [B, R, n*V], ids int [B, R, n] in 0..V-1 -> [B, R*n]."""
    B, R, n = ids.shape
    V = logits.shape[2] // n
    log_shares = ops.log_softmax(logits.astype(ms.float32).reshape(B * R * n, V), axis=-1).reshape(B * R * n * V)
    starts = Tensor(np.arange(B * R * n, dtype=np.int64).reshape(B, R * n) * V)  # int64: B*R*n*V may pass 2^31
    return -ops.gather(log_shares, starts + ids.reshape(B, R * n).astype(ms.int64), 0)


def weighted_mean(errors: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of errors [B, R] as a scalar; with weights [B, R] >= 0, not all 0: sum(errors * weights) / sum(weights)."""
    if weights is None:
        return errors.mean()
    return (errors * weights).sum() / weights.sum()

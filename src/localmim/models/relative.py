"""Relative positions: what is added to the scores of attention, for a grid with a class token or inside windows.

* `TableBias`: a learned number for each offset and head, BEiT's (Bao et al., ICLR 2022). Its table is one block's own
  or shared by all.
* `ContextualBias`: a learned vector for each of 50 classes of offsets, which the query is multiplied with, iRPE's
  "contextual product on keys" (Wu et al., ICCV 2021), as LoMaR uses it. It depends on no grid.

Both get the class of each pair of tokens as a constant [N, N], class token first. `window_bias` is for attention inside
windows, where a class may also say that two tokens must not see one another.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from localmim.models.layers import parameter

NEVER = -1e4  # added to the scores of what must not attend: exp of it is exactly 0
_ALPHA, _BETA, _GAMMA = 1.9, 3.8, 15.2  # iRPE's piecewise function at its ratio of 1.9
_REACH = 3  # the largest value of it
BUCKETS = (2 * _REACH + 1) ** 2 + 1  # one for each pair of values, one for pairs with the class token


def offset_classes(grid: tuple[int, int]) -> np.ndarray:
    """Row of BEiT's table for each query and key: int32 [1 + h*w, 1 + h*w].

    The last three rows are: class token to patch, patch to class token, class token to itself.
    """
    h, w = grid
    i, j = (a.ravel() for a in np.meshgrid(np.arange(h), np.arange(w), indexing="ij"))
    count = (2 * h - 1) * (2 * w - 1)
    classes = np.empty((1 + h * w, 1 + h * w), np.int32)
    classes[1:, 1:] = (i[:, None] - i + h - 1) * (2 * w - 1) + (j[:, None] - j + w - 1)
    classes[0, :], classes[:, 0], classes[0, 0] = count, count + 1, count + 2
    return classes


def coarse_offset(offsets: np.ndarray) -> np.ndarray:
    """iRPE's classes of offsets along one axis, -3 to 3: near ones exactly, far ones together."""
    size = np.abs(offsets)
    far = _ALPHA + np.log(np.maximum(size, 1) / _ALPHA) / math.log(_GAMMA / _ALPHA) * (_BETA - _ALPHA)
    far = np.minimum(np.round(far), _BETA).astype(np.int64)
    return (np.sign(offsets) * np.where(size <= _ALPHA, size, far)).astype(np.int32)


def buckets(grid: tuple[int, int]) -> np.ndarray:
    """iRPE's class of each query and key: int32 [1 + h*w, 1 + h*w], the last one for pairs with the class token."""
    h, w = grid
    i, j = (a.ravel() for a in np.meshgrid(np.arange(h), np.arange(w), indexing="ij"))
    classes = np.full((1 + h * w, 1 + h * w), BUCKETS - 1, np.int32)
    row, column = coarse_offset(i[:, None] - i), coarse_offset(j[:, None] - j)
    classes[1:, 1:] = (row + _REACH) * (2 * _REACH + 1) + column + _REACH
    return classes


def window_bias(table: Tensor, pairs: Tensor) -> Tensor:
    """Rows of a table [rows, nh] for pairs [G, S, S] -> [G, nh, S, S]; NEVER for a pair past the last row."""
    last = table.shape[0] - 1
    never = (pairs > last).astype(ms.float32) * NEVER  # the same in all blocks: computed once
    bias = ops.gather(table, ops.minimum(pairs, last), 0).transpose(0, 3, 1, 2)
    return bias + never.expand_dims(1).broadcast_to(bias.shape)


class TableBias(nn.Cell):
    """A learned number for each offset and head; 0 at the start.

    Args:
        grid: Patches (h, w).
    """

    def __init__(self, grid: tuple[int, int], num_heads: int):
        super().__init__()
        self.table = parameter("zeros", ((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, num_heads))

    def construct(self, q: Tensor | None, classes: Tensor, skip: int = 0) -> Tensor:
        """Classes [N, N] -> [1, nh, N - skip, N]."""
        if skip:
            classes = classes[skip:]
        return ops.gather(self.table, classes, 0).transpose(2, 0, 1).expand_dims(0)


class ContextualBias(nn.Cell):
    """A learned vector for each class of offsets, alike in all heads, that queries are multiplied with; 0 at the start.

    The query is not scaled, unlike in the product with keys: the authors' checkpoints are trained so.
    """

    of_query = True  # each image and head has its own bias

    def __init__(self, head_dim: int):
        super().__init__()
        self.table = parameter("zeros", (1, head_dim, BUCKETS))
        self.product = ops.BatchMatMul(transpose_b=True)

    def construct(self, q: Tensor, classes: Tensor, skip: int = 0) -> Tensor:
        """Queries [B, nh, Q, hd], classes [N, N] with Q = N - skip -> [B, nh, Q, N].

        A key's vector depends on the query's place, not on the image: one product a place, over images and heads.
        """
        nh, Q, hd = q.shape[1], q.shape[2], q.shape[3]  # B may be open, which ONNX cannot calculate with
        N = classes.shape[1]
        if skip:
            classes = classes[skip:]
        keys = ops.gather(self.table[0].transpose(1, 0).astype(q.dtype), classes, 0)  # [Q, N, hd]
        scores = self.product(q.transpose(2, 0, 1, 3).reshape(Q, -1, hd), keys)  # [Q, B*nh, N]
        return scores.astype(ms.float32).reshape(Q, -1, nh, N).transpose(1, 2, 0, 3)

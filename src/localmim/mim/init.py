"""Start of the weights in MaskFeat, BEiT and SimMIM on a ViT; the layers' own is MAE's, Xavier."""

from __future__ import annotations

import math
from collections.abc import Iterable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import Normal, TruncatedNormal, initializer


def draw(cell: nn.Cell, std: float = 0.02, cut: float | None = None) -> None:
    """Draws every trainable matrix and token of `cell` anew, normal; tables of relative places stay 0.

    Args:
        cut: In standard deviations, where the distribution is cut off; None: nowhere. (The references' "truncated
            normal" cuts at 2, not at 2 standard deviations: with one of 0.02 that is nowhere.)
    """
    law = Normal(std) if cut is None else TruncatedNormal(std, 0.0, -cut * std, cut * std)
    for name, parameter in cell.parameters_and_names():
        if parameter.requires_grad and len(parameter.shape) > 1 and not name.endswith("relative.table"):
            parameter.set_data(initializer(law, parameter.shape, ms.float32).init_data())


def shrink_branches(blocks: Iterable[nn.Cell]) -> None:
    """Divides what ends the two branches of block i, from 0, by sqrt(2 (i + 1))."""
    for i, block in enumerate(blocks):
        for linear in (block.attn.proj, block.mlp.fc2):
            fill(linear.weight, linear.weight.asnumpy() / math.sqrt(2 * (i + 1)))


def fill(parameter: Parameter, value: float | np.ndarray) -> None:
    """Gives all of a parameter a value, or each of its elements its own."""
    parameter.set_data(Tensor(np.broadcast_to(np.float32(value), parameter.shape).copy()))

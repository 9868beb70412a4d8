"""Counts the multiply-adds of a forward pass as it is really computed: every matrix product and convolution that runs.

They are counted while the model runs in PyNative mode, where each operator is a Python call. Element-wise work, norms
and softmax do not count, nor do sums and copies that are written as products with a vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import mindspore as ms
from mindspore import Tensor, nn, ops


def of_product(left: Tensor, out: Tensor, transposed: bool = False) -> int:
    """[..., m, k] x [..., k, n]: k for each number of the result; `transposed`: the left one is [..., k, m].

    None where m, k or n is 1.
    """
    k = left.shape[-2 if transposed and left.ndim > 1 else -1]
    return 0 if 1 in (k, *out.shape[-2:]) else out.size * k


def of_convolution(weight: Tensor, out: Tensor) -> int:
    """weight [O, I / groups, kernel...]: a kernel's size for each number of the result."""
    return out.size * math.prod(weight.shape[1:])


@contextmanager
def counted() -> Iterator[list[int]]:
    """The multiply-adds of each product and convolution that runs meanwhile in PyNative mode, as a growing list."""
    counts: list[int] = []

    def product(call):
        def counting(self, left, right):
            out = call(self, left, right)
            counts.append(of_product(left, out, self.transpose_a))
            return out

        return counting

    def convolution(call):
        def counting(self, x, weight, *rest):
            out = call(self, x, weight, *rest)
            counts.append(of_convolution(weight, out))
            return out

        return counting

    def function(call):
        def counting(left, right):
            out = call(left, right)
            counts.append(of_product(left, out))
            return out

        return counting

    patches = [
        (ops.MatMul, "__call__", product),
        (ops.BatchMatMul, "__call__", product),
        (ops.Conv2D, "__call__", convolution),
        (ops, "matmul", function),
    ]
    kept = [getattr(owner, name) for owner, name, _ in patches]
    try:
        for (owner, name, wrap), call in zip(patches, kept):
            setattr(owner, name, wrap(call))
        yield counts
    finally:
        for (owner, name, _), call in zip(patches, kept):
            setattr(owner, name, call)


def multiply_adds(model: nn.Cell, inputs: tuple) -> int:
    """Of one forward pass; the process stays in the mode it was in.

    Args:
        inputs: Arrays.
    """
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        with counted() as counts:
            loss, _ = model(*map(Tensor, inputs))
            loss.asnumpy()
    finally:
        ms.set_context(mode=mode)
    return sum(counts)

"""The least time that a step's work needs on this machine, from the work its graph counts and two measured ceilings.

Counted from the compiled graph (benchmarks/kernels.py), nothing by a formula:

- `operations`: of matrix products, two for each multiply-add. Sums and copies that are written as products with a
  vector are not among them, nor is element-wise work.
- `pass_bytes`: each matrix product reads both factors and writes its result, once. Whatever lies between two products
  is thought to be done on the way, without another pass over memory.
- `update_bytes`: each trained value's gradient is read by the check that all is finite; then AdamW reads weight,
  gradient and two moments and writes weight and moments: 8 passes of 4 bytes.

The floor is max(operations / matmul ceiling, pass_bytes / memory ceiling) + update_bytes / memory ceiling: products and
their traffic may overlap, but the update waits until all gradients are there and found finite.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from kernels import BYTES, Kernel

OWN_SHAPES = 4  # of the step's products, those with the most operations


class Product(NamedTuple):
    """[m, k] x [k, n], and which factors lie transposed."""

    m: int
    k: int
    n: int
    transpose_left: bool = False
    transpose_right: bool = False


class Work(NamedTuple):
    """What a step has to do.

    Attributes:
        operations, pass_bytes, update_bytes: As the module says.
        products: Its plain matrix products with the most operations.
    """

    operations: int
    pass_bytes: int
    update_bytes: int
    products: tuple[Product, ...]


class Ceilings(NamedTuple):
    """Of this machine: operations a second in a product, and bytes a second."""

    operations_per_s: float
    bytes_per_s: float


def work(kernels: Sequence[Kernel]) -> Work:
    """Adds up what the kernels of a step have to do.

    Raises:
        ValueError: There is no update by Adam in it.
    """
    products = [kernel for kernel in kernels if kernel.is_product]
    trained = sum(BYTES[dtype] * math.prod(shape) for dtype, shape in (k.inputs[0] for k in kernels if k.op == "Adam"))
    if not trained:
        raise ValueError("the graph has no update by Adam, expected a whole training step")
    shapes = Counter()
    for kernel in products:
        if kernel.op == "MatMul":
            shapes[Product(*kernel.sizes()[1:], *kernel.flags)] += kernel.operations
    return Work(
        sum(kernel.operations for kernel in products),
        sum(kernel.bytes for kernel in products),
        8 * trained,
        tuple(shape for shape, _ in shapes.most_common(OWN_SHAPES)),
    )


def floor_s(work: Work, ceilings: Ceilings) -> float:
    """The least time of a step, in seconds."""
    passes = max(work.operations / ceilings.operations_per_s, work.pass_bytes / ceilings.bytes_per_s)
    return passes + work.update_bytes / ceilings.bytes_per_s


def report(work: Work, ceilings: Ceilings, step_s: float) -> dict[str, float]:
    """The floor and the distance to it, as benchmarks/step_time.py prints them.

    `matmul_share`: the part of the step that its products would take at the ceiling. `distance`: the step by the floor.
    """
    floor = floor_s(work, ceilings)
    return {
        "gflop": round(work.operations / 1e9, 1),
        "gbyte": round((work.pass_bytes + work.update_bytes) / 1e9, 3),
        "update_gbyte": round(work.update_bytes / 1e9, 3),
        "matmul_gflop_per_s": round(ceilings.operations_per_s / 1e9, 1),
        "memory_gbyte_per_s": round(ceilings.bytes_per_s / 1e9, 1),
        "floor_s": round(floor, 4),
        "matmul_share": round(work.operations / ceilings.operations_per_s / step_s, 4),
        "distance": round(step_s / floor, 4),
    }


def best(turns: Sequence[dict[str, float]]) -> Ceilings:
    """The ceilings of what benchmarks/ceilings.py sent: the best product and the best pass, each by its median turn."""
    rates = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    products = {name: rate for name, rate in rates.items() if name.startswith("product")}
    return Ceilings(max(products.values()), max(rate for name, rate in rates.items() if name not in products))

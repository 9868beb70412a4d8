"""What this machine can do at best through MindSpore: operations a second of matrix products, bytes a second of memory.

Measured in a process of its own that takes turns with training steps, so that both meet the same noise. Everything runs
as in a step: in compiled graphs, with the operators that a step uses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from floor import Product
from localmim.device import set_device

SQUARES = (1024, 2048)  # sides of square products, beside the step's own
BATCH, MOST = 10e9, 16  # operations in one run of a graph of products; products at most
LARGE = 48_000_000  # values that are added, or updated: more than two cores' caches hold
REPEATS = 3


class Products(nn.Cell):
    """The same product of several pairs of factors; all results."""

    def __init__(self, product: Product, count: int):
        super().__init__()
        self.matmul, self.count = ops.MatMul(product.transpose_left, product.transpose_right), count

    def construct(self, lefts, rights):
        results = ()
        for i in range(self.count):
            results += (self.matmul(lefts[i], rights[i]),)
        return results


class Sum(nn.Cell):
    """a + b."""

    def __init__(self):
        super().__init__()
        self.add = ops.Add()

    def construct(self, a, b):
        return self.add(a, b)


class Update(nn.Cell):
    """Adam's update of one tensor."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = Parameter(Tensor(np.full(size, 1e-3, np.float32)), name="weight")
        self.first = Parameter(Tensor(np.full(size, 1e-3, np.float32)), name="first")
        self.second = Parameter(Tensor(np.full(size, 1e-3, np.float32)), name="second")
        self.adam = ops.Adam()

    def construct(self, gradient):
        self.adam(self.weight, self.first, self.second, 0.9, 0.95, 1e-6, 0.9, 0.95, 1e-8, gradient)
        return self.second[:1]


def jobs(products: Sequence[Product]) -> dict[str, tuple[Callable, float]]:
    """Name -> what runs, and how many operations or bytes that are; names of products begin with "product"."""
    rng = np.random.default_rng(0)

    def tensor(*shape: int) -> Tensor:
        return Tensor(rng.standard_normal(shape, np.float32))

    a, b, total, update = tensor(LARGE), tensor(LARGE), Sum(), Update(LARGE)
    found = {
        "sum": (lambda: total(a, b), 3 * 4 * LARGE),
        "update": (lambda: update(a), 7 * 4 * LARGE),
    }
    for product in [*(Product(n, n, n) for n in SQUARES), *products]:
        m, k, n, left, right = product
        count = min(max(1, round(BATCH / (2 * m * k * n))), MOST)
        lefts = tuple(tensor(*((k, m) if left else (m, k))) for _ in range(count))
        rights = tuple(tensor(*((n, k) if right else (k, n))) for _ in range(count))
        net = Products(product, count)
        found[f"product {product}"] = (lambda net=net, x=lefts, y=rights: net(x, y)[-1]), 2 * m * k * n * count
    return found


def serve(pipe, products: Sequence[Product], device: str) -> None:
    """A process: sends True when it is ready, and for each message the rates that it reached, by name.

    A rate is the best of a few repeats.
    """
    set_device(device)
    ms.set_context(mode=ms.GRAPH_MODE)
    todo = jobs(products)

    def rates() -> dict[str, float]:
        found = {}
        for name, (job, amount) in todo.items():
            seconds = []
            for _ in range(REPEATS):
                begin = time.perf_counter()
                job().reshape(-1)[0].asnumpy()  # waits for a device; on a CPU a graph has ended when it returns
                seconds.append(time.perf_counter() - begin)
            found[name] = amount / min(seconds)
        return found

    rates()  # compiles
    pipe.send(True)
    while pipe.recv():
        pipe.send(rates())

"""Times the HOG operator against a plain one: `python benchmarks/hog.py [--batch-size 8] [--rounds 15]`

The plain version is what one writes first, and what the authors do: for each cell size a convolution, a scatter of the
magnitudes into a histogram a pixel, an average pooling, a normalisation. Both run in graph mode on the same images, in
turns in one process, after a check that they agree. Prints one JSON line; `speedup` is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time

os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from localmim.mim.hog import Hog

CELLS, NBINS = (4, 8, 16, 32), 9
WARM_UP = 15  # MindSpore's CPU kernels try numbers of threads during their first calls


class PlainHog(nn.Cell):
    """One cell size, [B, C, H, W] -> [B, C*nbins, H/cell, W/cell]."""

    def __init__(self, cell: int):
        super().__init__()
        sobel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float32)
        self.kernel = Tensor(np.stack([sobel, sobel.T])[:, None])
        self.pad = nn.ReflectionPad2d(1)
        self.pool = nn.AvgPool2d(cell, cell)

    def construct(self, images):
        B, C, H, W = images.shape
        x = self.pad(images).reshape(B * C, 1, H + 2, W + 2)
        gradients = ops.conv2d(x, self.kernel)  # [B*C, 2, H, W]
        gx, gy = gradients[:, :1], gradients[:, 1:]
        place = ops.floor(ops.atan2(gx, gy) / math.pi * NBINS).astype(ms.int32)
        bins = (place + 2 * NBINS) % NBINS
        empty = ops.zeros((B * C, NBINS, H, W), ms.float32)
        filled = ops.tensor_scatter_elements(empty, bins, ops.sqrt(gx * gx + gy * gy), axis=1)
        x = self.pool(filled)
        x = x / ops.maximum(ops.sqrt((x * x).sum(axis=1, keepdims=True)), Tensor(1e-12, ms.float32))
        return x.reshape(B, C * NBINS, x.shape[2], x.shape[3])


class FourPasses:
    """The plain version at every cell size: four graphs, since in one the compiler would merge what they share."""

    def __init__(self):
        self.passes = [PlainHog(c) for c in CELLS]

    def __call__(self, images):
        return [one(images) for one in self.passes]


def seconds(network, images) -> float:
    """One call until all outputs can be read."""
    begin = time.perf_counter()
    for x in network(images):
        x.asnumpy()
    return time.perf_counter() - begin


def main() -> int:
    """Checks, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    rng = np.random.default_rng(0)
    shape = (arguments.batch_size, 3, arguments.size, arguments.size)
    images = Tensor(rng.standard_normal(shape).astype(np.float32))
    ours, plain = Hog(CELLS, NBINS), FourPasses()
    for a, b in zip(ours(images), plain(images)):
        B, h, w, C, n = a.shape
        b = b.asnumpy().reshape(B, C, n, h, w).transpose(0, 3, 4, 1, 2)
        if not np.allclose(a.asnumpy(), b, atol=1e-5):
            print("the two versions disagree", file=sys.stderr)
            return 1
    times = {"ours": [], "plain": []}
    for i in range(arguments.rounds + WARM_UP):
        for name, network in (("ours", ours), ("plain", plain)):
            spent = seconds(network, images)
            if i >= WARM_UP:
                times[name].append(spent)
    fast, slow = statistics.median(times["ours"]), statistics.median(times["plain"])
    result = {"shape": list(shape), "cells": list(CELLS), "nbins": NBINS, "hog_s": round(fast, 4)}
    print(json.dumps({**result, "plain_s": round(slow, 4), "speedup": round(slow / fast, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

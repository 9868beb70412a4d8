"""What two ranks know of each other, for test_ranks.py: python ranks_task.py HOW; prints what rank 0 found as JSON."""

from __future__ import annotations

import json
import os
import signal
import sys

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from localmim import cli
from localmim.config import load_config
from localmim.data.pipeline import TrainPipeline
from localmim.device import set_device
from localmim.distributed import Ranks, join
from localmim.errors import UserError
from localmim.models.classifier import FeatureNorm
from localmim.training import loop
from localmim.training.optimizer import AdamW
from localmim.training.step import TrainStep, _MeanOverDevices


class Mean(nn.Cell):
    """The mean of gradients over devices, by one way or the other."""

    def __init__(self, parameters, in_one: bool):
        super().__init__()
        self.mean = _MeanOverDevices(parameters, 2, in_one)

    def construct(self, *gradients):
        return self.mean(gradients)


class Square(nn.Cell):
    """A model of one weight."""

    def __init__(self):
        super().__init__()
        self.w = Parameter(Tensor(np.ones((1, 3), np.float32)), name="w")

    def construct(self, x):
        loss = ((self.w * x) ** 2).sum()
        return loss, loss.reshape(1)


def train_with_a_bad_image(recipe: str) -> None:
    """Trains, and one image of rank 1 is not finite from the second step on."""
    take = TrainPipeline.epoch

    def epoch(self, *arguments):
        for i, batch in enumerate(take(self, *arguments)):
            if i and self.rank == 1:
                batch.images[1, 0, 3, 3] = np.nan
            yield batch

    TrainPipeline.epoch = epoch
    loop.train(load_config(["--config", recipe]))


def sums(ranks: Ranks) -> dict:
    """All that ranks exchange."""
    rank = ranks.rank
    found = {
        "total": ranks.total(np.array([rank + 1, 2**35 + rank, 0.5])).tolist(),
        "gather": ranks.gather(rank + 0.25, 7).tolist(),
        "union": sorted(ranks.union({3, 2**24 + 1} if rank == 0 else {3, 5, 8})),
        "nothing": sorted(ranks.union(set())),
        "rows": ranks.rows(np.full((1 + rank, 2), np.float32(-0.1) ** (1 + rank), np.float32)).tolist(),
    }
    draw = np.random.default_rng(rank)
    gradients = [draw.standard_normal(shape).astype(np.float32) for shape in ((3, 4), (5,), (2, 2, 2))]
    parameters = [Parameter(Tensor(np.zeros_like(g)), name=f"p{i}") for i, g in enumerate(gradients)]
    both = [Mean(parameters, in_one)(*map(Tensor, gradients)) for in_one in (True, False)]
    found["same bits"] = all(np.array_equal(a.asnumpy(), b.asnumpy()) for a, b in zip(*both))
    found["gradients"] = [g.asnumpy().tolist() for g in both[0]]

    norm = FeatureNorm(4)
    norm.share(2)
    norm.set_train()
    rows = np.random.default_rng(9).standard_normal((6, 4)).astype(np.float32) * 3 + 5
    found["normed"] = norm(Tensor(rows[3 * rank : 3 * rank + 3])).asnumpy().tolist()
    found["moving"] = [norm.moving_mean.asnumpy().tolist(), norm.moving_variance.asnumpy().tolist()]
    return found


def main(argv: list[str]) -> None:
    """Does what `argv` says on both ranks."""
    how = argv[0]
    if how == "recipe":  # the recipes of two machines that should be one
        config = load_config(["--config", argv[1], "--seed", os.environ["MS_NODE_ID"]])
        loop.train(config)
        return
    if how == "nonfinite":
        train_with_a_bad_image(argv[1])
        return
    set_device("CPU")
    ranks = join(limit_s=60)
    if how == "sums":
        found = sums(ranks)
        if ranks.first:
            print(json.dumps(found), flush=True)
        ranks.agree(None, "nothing")
        ranks.agree(UserError("the disk is full") if ranks.rank == 1 else None, "saving")
    if how == "hang":
        model = Square()
        step = TrainStep(model, AdamW({"w": model.w}), ranks=ranks)
        step([(np.ones(3, np.float32),)], 0.1, 1)
        step.ranks = ranks._replace(limit_s=3)  # short, as nothing is compiled from here on
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        step([(np.ones(3, np.float32),)], 0.1, 2)


if __name__ == "__main__":
    ms.set_seed(0)
    sys.exit(cli.run(main))

"""Times one training step: `python benchmarks/step_time.py --config FILE --batch-size N --steps K [--peer mindcv-mae]`

Prints one JSON line: step_s (median), images_per_s, compile_s and peak_rss_mb; with a peer the same under `peer`,
`ratio`, our median by the peer's, and on a CPU `memory_ratio`, our peak by the peer's. Steps alternate in one run, so
that both meet the same noise. MindSpore's sides use this project's optimizer and finite check; inputs are random, made
before the clock starts. Each side is built and compiled in a process of its own, so that compile_s (the first step) and
peak_rss_mb are its own; the processes take turns.

`floor` tells how far our step is from what this machine could do (benchmarks/floor.py): the operations of its matrix
products (gflop) and the bytes it has to move (gbyte), counted in the graph that it compiled; the ceilings of products
and memory, measured between the steps; floor_s, the time that the work needs at these ceilings; matmul_share, the part
of the step that its products would take; distance, the step by the floor. `--no-floor` leaves it out.

Peers: `torch`, the recipe in plain, eager PyTorch (benchmarks/peers/torch_localmim.py), and `torch-tuned`, the same
with fused AdamW. `mindcv-mae`, mindcv's MAE ViT-B/16. For a Swin recipe `dense`, the same model with all visible tokens
of the first stage in one masked attention instead of packed windows, and `plain-swin`, the recipe in MindSpore's stock
layers with dense masked attention in every stage (benchmarks/peers/plain_swin.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time

import floor
import kernels

os.environ.setdefault("GLOG_v", "3")

# Nothing that imports MindSpore stands here: a side's process imports this file, and PyTorch's is to hold no other.

PEERS = ("torch", "torch-tuned", "mindcv-mae", "dense", "plain-swin")


def ours(argv: list[str], batch_size: int):
    """The recipe's model and inputs."""
    import numpy as np

    from localmim.config import load_config
    from localmim.training.build import build_masking, build_model

    model = build_model(load_config(argv))
    encoder = model.encoder
    masks = build_masking(load_config(argv), model)(0, np.arange(batch_size))
    images = np.random.default_rng(0).standard_normal((batch_size, encoder.in_chans, *encoder.image_size))
    return model, (images.astype(np.float32), *masks.arrays())


def dense_swin(argv: list[str], batch_size: int):
    """The recipe's Swin with one group of all visible tokens in its first stage: the same weights, losses and mask."""
    import numpy as np

    from localmim.config import load_config
    from localmim.errors import UserError
    from localmim.mim.unit_masking import UnitMasking
    from localmim.models.windows import Windows, pair_codes, pair_rows, window_labels
    from localmim.training.build import build_masking

    model, (images, *_) = ours(argv, batch_size)
    masking = build_masking(load_config(argv), model)
    if not isinstance(masking, UnitMasking):
        raise UserError("--peer dense needs a Swin recipe")
    mask = masking(0, np.arange(batch_size))
    stage, windows = masking.stages[0], list(mask.windows)
    seen = masking.coordinates[0][~mask.hidden].reshape(-1, 2)
    order = np.arange(len(seen), dtype=np.int32)
    for i, shift in enumerate(stage.shifts):
        labels = window_labels(seen, stage.grid, stage.window, shift)
        rows = pair_rows(pair_codes(seen, stage.window)[None], labels[None], stage.window)
        windows[i] = Windows(rows, order, order)
    mask = dataclasses.replace(mask, windows=tuple(windows))
    return model, (images, *mask.arrays())


def mindcv_mae(argv: list[str], batch_size: int):
    """mindcv's MAE ViT-B/16 at 224 px, 75 % masked; its factory fails (KeyError), so the class is used as it would."""
    from functools import partial

    import numpy as np
    from mindcv.models.mae import MAEForPretrain
    from mindspore import nn, ops

    class WithParts(nn.Cell):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def construct(self, images, mask):
            loss = self.model(images, mask)
            return loss, ops.stack((loss,))

    model = MAEForPretrain(
        image_size=224,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        decoder_embed_dim=512,
        decoder_depth=8,
        decoder_num_heads=16,
        act_layer=partial(nn.GELU, approximate=False),
        norm_layer=partial(nn.LayerNorm, epsilon=1e-6),
    )
    rng = np.random.default_rng(0)
    masks = np.argsort(rng.random((batch_size, 196)), axis=1) >= 49
    images = rng.standard_normal((batch_size, 3, 224, 224)).astype(np.float32)
    return WithParts(model), (images, masks.astype(np.float32))


def plain_swin(argv: list[str], batch_size: int):
    """The same loss in stock layers."""
    from peers.plain_swin import build

    return build(argv, batch_size)


def make_step(build, argv: list[str], batch_size: int, device: str):
    """What makes a training step each time it is called, and gives its loss; the first call compiles."""
    import mindspore as ms

    from localmim.config import load_config
    from localmim.device import compute_dtype, set_device
    from localmim.models.layers import set_compute_dtype
    from localmim.training.optimizer import AdamW
    from localmim.training.step import TrainStep

    set_device(device)
    ms.set_seed(0)
    model, inputs = build(argv, batch_size)
    set_compute_dtype(model, compute_dtype(load_config(argv).precision, device))
    parameters = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
    step, updates = TrainStep(model, AdamW(parameters)), itertools.count(1)
    return lambda: step([inputs], 1e-4, next(updates)).loss


def serve(pipe, build, argv: list[str], batch_size: int, device: str, graphs: str = "") -> None:
    """A side's process: builds, compiles with one step, then makes a step for every message.

    Args:
        graphs: A folder for the graphs that are compiled; "": they are not written.
    """
    if graphs:
        os.environ.update(kernels.WRITES_GRAPHS, MS_DEV_SAVE_GRAPHS_PATH=graphs)
    step = make_step(build, argv, batch_size, device)

    def timed() -> tuple[float, float]:
        begin = time.perf_counter()
        loss = step()
        return time.perf_counter() - begin, loss

    pipe.send(timed()[0])
    while pipe.recv():
        pipe.send(timed())
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def serve_ceilings(pipe, products, device: str) -> None:
    """The process of the ceilings."""
    from ceilings import serve

    serve(pipe, products, device)


class Side:
    """A process that works on demand: it says when it is ready, then answers each message.

    Args:
        serve, given: What it runs: `serve(pipe, *given)`.
    """

    def __init__(self, serve, *given):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *given), daemon=True)  # ends with this one
        self.process.start()
        theirs.close()
        self.first = self.pipe.recv()  # what it says when it is ready
        self.answers = []

    def turn(self, keep: bool = True) -> None:
        """One round of its work."""
        self.pipe.send(True)
        answer = self.pipe.recv()
        if keep:
            self.answers.append(answer)

    def end(self) -> None:
        """No more work."""
        self.pipe.send(False)

    @property
    def step_s(self) -> float:
        """Median of the steps that were kept; of a side that trains."""
        return statistics.median(seconds for seconds, _ in self.answers)

    def summary(self, batch_size: int) -> dict[str, float]:
        """What is printed of a side that trains; ends it."""
        self.end()
        return {
            "step_s": round(self.step_s, 4),
            "images_per_s": round(batch_size / self.step_s, 2),
            "compile_s": round(self.first, 1),
            "peak_rss_mb": round(self.pipe.recv()),
        }


def main(argv: list[str]) -> None:
    """Runs all sides and prints the result."""
    from localmim.config import load_config

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peer", choices=PEERS)
    parser.add_argument("--no-floor", action="store_true")
    parser.add_argument("--device-target", default="CPU")
    arguments, rest = parser.parse_known_args(argv)
    argv = ["--config", arguments.config, *rest]
    load_config(argv)  # a mistake in it is one line here, not a traceback of a side
    builders = {"mindcv-mae": mindcv_mae, "dense": dense_swin, "plain-swin": plain_swin}
    batch_size, device = arguments.batch_size, arguments.device_target

    case = None
    if (arguments.peer or "").startswith("torch"):
        from peers import torch_localmim

        case = torch_localmim.build(argv, batch_size)  # a mistake in it, too

    with tempfile.TemporaryDirectory() as graphs:
        sides = {"ours": Side(serve, ours, argv, batch_size, device, "" if arguments.no_floor else graphs)}
        work = None if arguments.no_floor else floor.work(kernels.read(graphs))
    if case is not None:
        sides["peer"] = Side(torch_localmim.serve, case, device, arguments.peer == "torch-tuned")
    elif arguments.peer:
        sides["peer"] = Side(serve, builders[arguments.peer], argv, batch_size, device)
    if work:
        sides["ceilings"] = Side(serve_ceilings, work.products, device)
    for i in range(arguments.steps + 2):
        for side in sides.values():
            side.turn(keep=i >= 2)  # the first ones still warm up

    line = sides["ours"].summary(batch_size)
    if arguments.peer:
        peer = sides["peer"].summary(batch_size)
        line["peer"] = {"name": arguments.peer, **peer}
        line["ratio"] = round(line["step_s"] / peer["step_s"], 4)
        if device == "CPU":  # elsewhere it is the host's memory, which says little
            line["memory_ratio"] = round(line["peak_rss_mb"] / peer["peak_rss_mb"], 4)
    if work:
        sides["ceilings"].end()
        line["floor"] = floor.report(work, floor.best(sides["ceilings"].answers), sides["ours"].step_s)
    for side in sides.values():
        side.process.join()
    print(json.dumps(line))


if __name__ == "__main__":
    from localmim import cli

    sys.exit(cli.run(main))

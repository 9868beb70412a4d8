"""Times one training step: `python benchmarks/step_time.py --config FILE --batch-size N --steps K [--peer mindcv-mae]`

Prints one JSON line: step_s (median), images_per_s, compile_s and peak_rss_mb; with a peer the same under `peer`,
`ratio`, our median by the peer's, and `memory_ratio`, our peak memory by the peer's. Steps alternate in one run, so
that both meet the same noise. MindSpore's sides use this project's optimizer and finite check; inputs are random, made
before the clock starts. Each side is built and compiled in a process of its own, so that compile_s (the first step) and
peak_rss_mb are its own; the processes take turns.

Peers: `torch`, the recipe in plain, eager PyTorch (benchmarks/peers/torch_localmim.py), and `torch-tuned`, the same
with fused AdamW. `mindcv-mae`, mindcv's MAE
ViT-B/16. For a Swin recipe `dense`, the same model with all visible tokens of the first stage in one masked attention
instead of packed windows, and `plain-swin`, the recipe in MindSpore's stock layers with dense masked attention in every
stage (benchmarks/peers/plain_swin.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time

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


def serve(pipe, build, argv: list[str], batch_size: int, device: str) -> None:
    """A side's process: builds, compiles with one step, then makes a step for every message."""
    import mindspore as ms

    from localmim.device import set_device
    from localmim.training.optimizer import AdamW
    from localmim.training.step import TrainStep

    set_device(device)
    ms.set_seed(0)
    model, inputs = build(argv, batch_size)
    parameters = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
    step = TrainStep(model, AdamW(parameters))
    begin = time.perf_counter()
    step([inputs], 1e-4, 1)
    pipe.send(time.perf_counter() - begin)
    update = 1
    while pipe.recv():
        update += 1
        begin = time.perf_counter()
        result = step([inputs], 1e-4, update)
        pipe.send((time.perf_counter() - begin, result.loss))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main(argv: list[str]) -> None:
    """Runs both sides and prints the result."""
    from localmim.config import load_config

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peer", choices=PEERS)
    parser.add_argument("--device-target", default="CPU")
    arguments, rest = parser.parse_known_args(argv)
    argv = ["--config", arguments.config, *rest]
    load_config(argv)  # a mistake in it is one line here, not a traceback of a side
    builders = {"ours": ours, "mindcv-mae": mindcv_mae, "dense": dense_swin, "plain-swin": plain_swin}

    def job(name: str):
        """What a side's process runs, and its arguments after the pipe."""
        if name.startswith("torch"):
            from peers import torch_localmim

            case = torch_localmim.build(argv, arguments.batch_size)
            return torch_localmim.serve, (case, arguments.device_target, name == "torch-tuned")
        return serve, (builders[name], argv, arguments.batch_size, arguments.device_target)

    sides = {"ours": job("ours")}
    if arguments.peer:
        sides["peer"] = job(arguments.peer)

    context = multiprocessing.get_context("spawn")
    pipes, processes, results = {}, [], {}
    for name, (target, given) in sides.items():
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, *given), daemon=True)  # ends with this one in any case
        process.start()
        theirs.close()
        processes.append(process)
        results[name] = {"compile_s": pipes[name].recv(), "times": []}
    for i in range(arguments.steps + 2):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds, _ = pipe.recv()
            if i >= 2:  # the first ones still warm up
                results[name]["times"].append(seconds)
    summary = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        median = statistics.median(results[name]["times"])
        summary[name] = {
            "step_s": round(median, 4),
            "images_per_s": round(arguments.batch_size / median, 2),
            "compile_s": round(results[name]["compile_s"], 1),
            "peak_rss_mb": round(pipe.recv()),
        }
    for process in processes:
        process.join()
    line = summary.pop("ours")
    if arguments.peer:
        line.update(peer={"name": arguments.peer, **summary["peer"]})
        line["ratio"] = round(line["step_s"] / summary["peer"]["step_s"], 4)
        line["memory_ratio"] = round(line["peak_rss_mb"] / summary["peer"]["peak_rss_mb"], 4)
    print(json.dumps(line))


if __name__ == "__main__":
    from localmim import cli

    sys.exit(cli.run(main))

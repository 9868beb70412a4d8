"""What grouped windows cost and need: `python benchmarks/packing.py --config SWIN_RECIPE [--batch-size 4] [--masks 50]`

Trains one step with each of `--masks` different masks and prints one JSON line: mask_ms, the median time to draw and
pack a mask; step_s, the median time of a step; share, one by the other; compilations, the graphs that all masks needed;
and for each stage and shift the groups of the graph (G), the most that packing filled over `--draws` masks, and slots.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault("GLOG_v", "3")

from localmim import cli
from localmim.config import load_config
from localmim.errors import UserError


def main(argv: list[str]) -> None:
    """Runs the steps and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--masks", type=int, default=50)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--device-target", default="CPU")
    arguments, rest = parser.parse_known_args(argv)
    config = load_config(["--config", arguments.config, *rest])

    import mindspore as ms
    import numpy as np

    from localmim.device import set_device
    from localmim.mim.unit_masking import UnitMasking
    from localmim.training.build import build_masking, build_model
    from localmim.training.optimizer import AdamW
    from localmim.training.step import TrainStep

    set_device(arguments.device_target)
    ms.set_seed(0)
    model = build_model(config)
    masking, encoder = build_masking(config, model), model.encoder
    if not isinstance(masking, UnitMasking):
        raise UserError("--config is no Swin recipe: only those pack windows")
    parameters = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
    step = TrainStep(model, AdamW(parameters))
    shape = (arguments.batch_size, encoder.in_chans, *encoder.image_size)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)

    packing, steps = [], []
    for i in range(arguments.masks):
        begin = time.perf_counter()
        mask = masking(0, np.arange(i, i + arguments.batch_size))
        packed = time.perf_counter()
        step([(images, *mask.arrays())], 1e-4, i + 1)
        packing.append(packed - begin)
        steps.append(time.perf_counter() - packed)

    filled: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    names = [f"stage {s + 1}, shift {shift}" for s, stage in enumerate(masking.stages) for shift in stage.shifts]
    for i in range(arguments.draws):
        for name, windows in zip(names, masking(1, np.array([i])).windows):
            shapes[name] = windows.pairs.shape
            filled[name] = max(filled.get(name, 0), int(windows.place.max()) // windows.pairs.shape[1] + 1)
    mask_s, step_s = statistics.median(packing), statistics.median(steps[1:])
    line = {
        "mask_ms": round(mask_s * 1e3, 2),
        "step_s": round(step_s, 3),
        "share": round(mask_s / step_s, 5),
        "compilations": len(step.whole.compile_cache),
        "groups": {n: {"G": shapes[n][0], "filled": filled[n], "slots": shapes[n][1]} for n in names},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""The authors' kind of code as a peer: a training step of LocalMIM with HOG in plain, eager PyTorch, float32.

What is compared is a step, forward to AdamW, of the recipe's model at the recipe's sizes, on the same images and mask.
The PyTorch side (peers/torch_model.py) is written from the method's description the way people write it: no
torch.compile, and all that the authors' code computes, whether the loss reads it or not. It gets the masks, and for a
Swin the groups of windows, ready made before the clock starts, as this project's side does; the authors' code draws and
groups in the step. PyTorch is an optional extra: `pip install -r requirements-torch.txt`.

    python benchmarks/step_time.py --config FILE --batch-size N --steps K --peer torch

times both sides, each in a process of its own, the PyTorch one without MindSpore. `--peer torch-tuned` differs in one
word: AdamW is asked for with `fused=True`, which few recipes do. That both sides compute the same is told by

    python benchmarks/peers/torch_localmim.py --config FILE [--batch-size N] [--key value]

which gives both the same weights and prints the losses (the sum, then one a scale), the largest difference of them, and
of the gradients' relative differences |a - b| / |b|, one a parameter, the largest. It ends with 1 when losses differ by
more than 1e-5 or gradients by more than 1e-3.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3


class Case(NamedTuple):
    """What the PyTorch side needs, in plain arrays and numbers.

    Attributes:
        net: "vit" or "swin".
        sizes: Of the model.
        images: float32 [B, C, H, W].
        mask: ViT: ids_keep int64 [B, K] and ids_restore int64 [B, L]. Swin: hidden units, bool [units].
    """

    net: str
    sizes: dict
    images: np.ndarray
    mask: tuple[np.ndarray, ...]


def check_installed() -> None:
    """UserError without PyTorch."""
    from localmim.errors import UserError

    if find_spec("torch") is None:
        raise UserError("the peer torch needs PyTorch, an optional extra: pip install -r requirements-torch.txt")


def check_recipe(config) -> None:
    """UserError for a recipe that the PyTorch side is not written for."""
    from localmim.errors import UserError

    name, kind = config.model.name, config.target.kind
    if config.task != "pretrain" or not name.startswith(("localmim_vit_", "localmim_swin_")) or kind != "hog":
        raise UserError(
            f"the peer torch is for pre-training of a LocalMIM ViT or Swin with target.kind hog, "
            f"this is task {config.task}, model.name {name}, target.kind {kind}"
        )
    if config.precision != "fp32":
        raise UserError(f"the peer torch computes in float32: precision is {config.precision}, must be fp32")
    if config.model.isolated_gradients:
        raise UserError("the peer torch has no isolated gradients: model.isolated_gradients must be false")
    if "_swin_" not in name:
        return
    if not config.reference_quirks:
        raise UserError("the peer torch masks and merges a Swin as the authors do: reference_quirks must be true")
    if config.model.taps is not None or config.model.scales is not None:
        raise UserError("the peer torch decodes every stage of a Swin: leave out model.taps and model.scales")


def sizes_of(theirs, net: str) -> dict:
    """The sizes of the package's model, "vit" or "swin", as plain numbers."""
    encoder, hog = theirs.encoder, theirs.target.hog
    decoders = []
    for width, decoder, out_dim in zip(encoder.tap_widths, theirs.decoders, theirs.target.dims):
        block = decoder.blocks[0]
        decoders.append(
            {
                "width": width,
                "grid": tuple(decoder.grid),
                "scale": decoder.scale,
                "dim": decoder.dim,
                "depth": len(decoder.blocks),
                "num_heads": block.attn.num_heads,
                "hidden": block.mlp.fc1.weight.shape[0],
                "out_dim": out_dim,
            }
        )
    sizes = {
        "patch": encoder.patch_size,
        "in_chans": encoder.in_chans,
        "taps": tuple(encoder.taps),
        "decoders": decoders,
        "nbins": hog.nbins,
        "cells": hog.cell_sizes,
        "hog_bias": hog.bias is not None,
    }
    if net == "swin":
        stages = []
        for place, layer in zip(encoder.stages, encoder.layers):
            block = layer.blocks[0]
            stages.append(
                {
                    "dim": block.attn.proj.weight.shape[0],
                    "depth": len(layer.blocks),
                    "num_heads": block.attn.num_heads,
                    "hidden": block.mlp.fc1.weight.shape[0],
                    "grid": tuple(place.grid),
                    "unit_side": place.grid[0] // encoder.mask_grid[0],
                    "window": place.window,
                    "shifts": place.shifts,
                }
            )
        return sizes | {"units": tuple(encoder.mask_grid), "stages": stages}
    block = encoder.blocks[0]
    return sizes | {
        "dim": encoder.embed_dim,
        "grid": tuple(encoder.grid),
        "depth": len(encoder.blocks),
        "num_heads": block.attn.num_heads,
        "hidden": block.mlp.fc1.weight.shape[0],
    }


def make_case(argv: list[str], batch_size: int):
    """The package's model with its inputs, and the case of the same sizes, images and mask.

    Pixels lie on a grid of 1/256, where gradients of HOG are exact in float32: else rounding, which differs between
    frameworks, chooses the bin where a gradient is zero.
    """
    from localmim.config import load_config
    from localmim.training.build import build_masking, build_model

    config = load_config(argv)
    theirs = build_model(config)
    mask = build_masking(config, theirs)(0, np.arange(batch_size))
    encoder = theirs.encoder
    images = np.random.default_rng(0).standard_normal((batch_size, encoder.in_chans, *encoder.image_size))
    images = (np.round(images * 256) / 256).astype(np.float32)
    net = "swin" if "_swin_" in config.model.name else "vit"
    arrays = (mask.hidden,) if net == "swin" else (mask.ids_keep.astype(np.int64), mask.ids_restore.astype(np.int64))
    return (theirs, (images, *mask.arrays())), Case(net, sizes_of(theirs, net), images, arrays)


def _case_alone(argv: list[str], batch_size: int) -> Case:
    return make_case(argv, batch_size)[1]


def build(argv: list[str], batch_size: int) -> Case:
    """The case of a recipe, made in a process of its own, which takes MindSpore and the model with it.

    Raises:
        UserError: PyTorch is not installed, or the recipe is not one of those the peer is for.
    """
    from localmim.config import load_config

    check_installed()
    check_recipe(load_config(argv))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_case_alone, argv, batch_size).result()


def swin_inputs(case: Case) -> tuple:
    """What the Swin takes after the images, as arrays, from the hidden units."""
    from peers.grouping import coordinates, group_windows, patches, restore

    (hidden,), sizes = case.mask, case.sizes
    units, stages = sizes["units"], sizes["stages"]
    visible = np.flatnonzero(~hidden)
    groups = []
    for s, stage in enumerate(stages):
        places = coordinates(visible, stage["unit_side"], stage["grid"], units, s == 0)
        groups.append([group_windows(places, stage["window"], shift) for shift in stage["shifts"]])
    sides = [decoder["grid"][0] // units[0] for decoder in sizes["decoders"]]
    numbers = patches(visible, stages[0]["unit_side"], units)
    weights = hidden.reshape(units).astype(np.float32)
    return weights, numbers, groups, [restore(hidden, side) for side in sides]


def torch_side(case: Case, device: str):
    """The PyTorch model of a case with fresh weights, and its inputs."""
    import torch

    from peers.torch_model import SwinModel, VitModel, initialise

    def tensors(value):
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value).to(device)
        return None if value is None else [tensors(v) for v in value]

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = (SwinModel if case.net == "swin" else VitModel)(case.sizes)
    initialise(model)
    arrays = swin_inputs(case) if case.net == "swin" else case.mask
    return model.to(device), tensors((case.images, *arrays))


def serve(pipe, case: Case, device: str, fused: bool) -> None:
    """The PyTorch side's process: builds, makes a first step, then a step for every message (see step_time.serve).

    Args:
        fused: Ask for PyTorch's fused AdamW.
    """
    import torch

    from peers.torch_model import Trainer

    if "mindspore" in sys.modules:
        raise RuntimeError("MindSpore is in the PyTorch side's process, so that its peak memory is not PyTorch's own")
    device = {"CPU": "cpu", "GPU": "cuda"}[device]
    model, inputs = torch_side(case, device)
    step = Trainer(model, fused=fused)

    def timed() -> tuple[float, float]:
        begin = time.perf_counter()
        loss = step(inputs, 1e-4)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin, loss

    pipe.send(timed()[0])
    while pipe.recv():
        pipe.send(timed())
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def check(argv: list[str], batch_size: int) -> dict:
    """Losses of both sides on the same weights, images and mask, and how far losses and gradients are apart."""
    import mindspore as ms
    import torch
    from mindspore import Tensor

    from localmim.config import load_config
    from localmim.convert.families import written_as
    from localmim.convert.load import weights_of

    check_recipe(load_config(argv))
    (theirs, inputs), case = make_case(argv, batch_size)
    model, tensors = torch_side(case, "cpu")
    family = written_as(theirs, load_config(argv))

    def by_their_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        named = family.to_torch(arrays, theirs, load_config(argv))
        return {n: a for n, a in named.items() if not n.endswith("relative_position_index")}

    weights = {n: torch.from_numpy(np.array(a)) for n, a in by_their_names(weights_of(theirs)).items()}
    model.load_state_dict(weights, strict=True)
    losses = model(*tensors)
    losses.sum().backward()
    losses = losses.detach().numpy()

    trained = {n: p for n, p in theirs.parameters_and_names() if p.requires_grad}
    differentiate = ms.value_and_grad(theirs, None, ms.ParameterTuple(trained.values()), has_aux=True)
    (loss, parts), gradients = differentiate(*map(Tensor, inputs))
    ours = [float(loss.asnumpy()), *parts.asnumpy().tolist()]
    peers = [float(losses.sum()), *losses.tolist()]
    named = by_their_names({n: g.asnumpy() for n, g in zip(trained, gradients)})
    apart = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = named[name]
            size = float(np.linalg.norm(wanted))
            apart[name] = float(np.linalg.norm(parameter.grad.numpy() - wanted)) / max(size, 1e-12)
    worst = max(apart, key=apart.get)
    return {
        "difference": max(abs(a - b) for a, b in zip(ours, peers)),
        "gradient_difference": apart[worst],
        "of": worst,
        "ours": ours,
        "torch": peers,
    }


def main(argv: list[str]) -> None:
    """Prints one JSON line.

    Raises:
        RunError: Losses or gradients differ.
    """
    import mindspore as ms

    from localmim.device import set_device
    from localmim.errors import RunError

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch-size", type=int, default=2)
    arguments, rest = parser.parse_known_args(argv)
    check_installed()
    set_device("CPU")
    ms.set_seed(0)
    result = check(["--config", arguments.config, *rest], arguments.batch_size)
    print(json.dumps(result))
    if not (result["difference"] <= TOLERANCE and result["gradient_difference"] <= GRADIENT_TOLERANCE):
        raise RunError(
            f"losses differ by {result['difference']:g} (at most {TOLERANCE:g}), "
            f"gradients by {result['gradient_difference']:g} (at most {GRADIENT_TOLERANCE:g})"
        )


if __name__ == "__main__":
    os.environ.setdefault("GLOG_v", "3")
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for `peers`
    from localmim import cli

    sys.exit(cli.run(main))

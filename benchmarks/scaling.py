"""What a recipe needs of 1, 8 and 64 devices: images a second, cores, disk, network, checkpoints, hours.

    python benchmarks/scaling.py --config RECIPE [--devices 8] [--nodes 8] [--images-per-s N] [--json] [--key value …]

Nothing is trained: the recipe's model is built and its parameters are counted, the rest is arithmetic on the options
below. One GPU's images a second are the authors' published hours on a V100 where the recipe has them; a run prints its
own as `images_per_s`. `needs` is the arithmetic. The result is a Markdown table, or one JSON object a column.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from typing import NamedTuple

os.environ.setdefault("GLOG_v", "3")

from localmim import cli
from localmim.config import Config, MaskConfig, ModelConfig, load_config
from localmim.errors import UserError
from localmim.training.layout import Layout, resumed_layout

IMAGENET = 1_281_167  # images
IMAGENET_KB = 138e6 / IMAGENET  # a JPEG file, mean of the published 138 GB
RECIPE_DEVICES = 8  # the recipes are written for so many: their headers
FLOAT32 = 4  # bytes; gradients are float32 in every precision
V100_HOURS = {  # published GPU hours an epoch of ImageNet: model and target
    ("localmim_vit_base_patch16_224", "hog"): 0.7,
    ("localmim_vit_large_patch16_224", "hog"): 1.0,
    ("localmim_swin_base_patch4_window7_224", "pixels"): 1.0,
    ("localmim_swin_base_patch4_window7_224", "hog"): 1.1,
    ("localmim_swin_large_patch4_window14_224", "hog"): 1.6,
}


@dataclass(frozen=True)
class Measured:
    """What the arithmetic takes as given.

    Attributes:
        images_per_s: Of one device, while it computes.
        input_per_core: Images a second that a core reads, decodes, crops and resizes.
        image_kb, packed_kb: Mean bytes of an image file, and of one packed with a short side of 256 pixels, in kB.
        network_gbit: Of a node's network, each way, Gb/s.
        save_mb_per_s: Rate at which a checkpoint is hashed, written and synced.
    """

    images_per_s: float
    input_per_core: float = 450.0
    image_kb: float = IMAGENET_KB
    packed_kb: float = 30.0
    network_gbit: float = 100.0
    save_mb_per_s: float = 300.0


class Model(NamedTuple):
    """Numbers of a recipe's model.

    Attributes:
        trained: Parameters that get gradients.
        stored: All parameters. A checkpoint holds them, their average if kept, and two moments of each trained one.
        image_values: Numbers in one input image.
    """

    trained: int
    stored: int
    image_values: int


class Needs(NamedTuple):
    """Of one number of devices. A node is a machine with `layout.world / nodes` devices.

    Attributes:
        images_per_s: Of all devices.
        steps_per_s: Optimizer steps, if nothing else than computing took time.
        cores: A node's, for its input.
        disk_mb_per_s, packed_mb_per_s: A node reads, from image files and from packed ones.
        to_device_mb_per_s: float32 pixels that go to each device.
        ring_mb: What each device sends, and receives, in the all-reduce of a step.
        ring_mb_per_s: The same a second.
        network_gbit: What leaves a node, and enters it; 0 on one node.
        reduce_s: Seconds of an all-reduce when the network between nodes is its limit; 0 on one node.
        batch_limit: Images a device and a step below which `reduce_s` is longer than computing; 0 on one node.
        checkpoint_mb, save_s: One checkpoint, and the seconds that all devices wait for it.
        hours: Of the whole recipe with its checkpoints, when the network is hidden behind computing.
        hours_network_apart: The same when nothing of it is hidden.
    """

    layout: Layout
    nodes: int
    images_per_s: float
    steps_per_s: float
    cores: int
    disk_mb_per_s: float
    packed_mb_per_s: float
    to_device_mb_per_s: float
    ring_mb: float
    ring_mb_per_s: float
    network_gbit: float
    reduce_s: float
    batch_limit: int
    checkpoint_mb: float
    save_s: float
    hours: float
    hours_network_apart: float


def needs(config: Config, model: Model, layout: Layout, nodes: int, images: int, given: Measured) -> Needs:
    """The arithmetic.

    Args:
        layout: How a step is spread over all devices of all nodes.
        images: In the data set.
    """
    total = layout.world * given.images_per_s
    a_node = total / nodes
    step_s = layout.images / total

    # ---- Network. A ring passes each piece of the gradients to all others twice: as sums, then as the result. It
    # crosses the border of a node once each way, however many devices the node has.
    gradients = FLOAT32 * model.trained
    ring = 2 * (layout.world - 1) / layout.world * gradients
    reduce_s = 0.0 if nodes == 1 else ring * 8 / (given.network_gbit * 1e9)

    # ---- Time
    steps_an_epoch = images // layout.effective_batch
    steps = config.epochs * steps_an_epoch
    copies = 1 if config.optimizer.ema_decay is None else 2  # the weights, and their moving average
    checkpoint = FLOAT32 * (copies * model.stored + 2 * model.trained)
    save_s = checkpoint / (given.save_mb_per_s * 1e6)
    every = config.checkpoint
    saves = (steps // every.every_steps if every.every_steps else 0) + (
        int(config.epochs / every.every_epochs) if every.every_epochs else 0
    )
    return Needs(
        layout=layout,
        nodes=nodes,
        images_per_s=total,
        steps_per_s=1 / step_s,
        cores=math.ceil(a_node / given.input_per_core),
        disk_mb_per_s=a_node * given.image_kb / 1e3,
        packed_mb_per_s=a_node * given.packed_kb / 1e3,
        to_device_mb_per_s=given.images_per_s * FLOAT32 * model.image_values / 1e6,
        ring_mb=ring / 1e6,
        ring_mb_per_s=ring / step_s / 1e6,
        network_gbit=0.0 if nodes == 1 else ring * 8 / step_s / 1e9,
        reduce_s=reduce_s,
        batch_limit=math.ceil(reduce_s * given.images_per_s),
        checkpoint_mb=checkpoint / 1e6,
        save_s=save_s,
        hours=(steps * max(step_s, reduce_s) + saves * save_s) / 3600,
        hours_network_apart=(steps * (step_s + reduce_s) + saves * save_s) / 3600,
    )


def count(config: Config) -> Model:
    """Builds the recipe's model on the CPU and counts."""
    from localmim.device import set_device
    from localmim.training.build import build_model

    set_device("CPU")
    model = build_model(config)
    encoder = model.encoder
    sizes = [(p.size, p.requires_grad) for p in model.get_parameters()]
    return Model(
        trained=sum(size for size, trained in sizes if trained),
        stored=sum(size for size, _ in sizes),
        image_values=encoder.in_chans * math.prod(encoder.image_size),
    )


ROWS = {  # of the table: its name and how a column's cell reads
    "devices x `batch_size` x `accumulate`": lambda n: str(n.layout),
    "images/s in all": lambda n: f"{n.images_per_s:,.0f}",
    "optimizer steps/s": lambda n: f"{n.steps_per_s:.2f}",
    "input: cores a node": lambda n: str(n.cores),
    "disk a node, image files / packed: MB/s": lambda n: f"{n.disk_mb_per_s:,.0f} / {n.packed_mb_per_s:,.0f}",
    "pixels to each device: MB/s": lambda n: f"{n.to_device_mb_per_s:,.0f}",
    "gradients that each device sends: MB a step / MB/s": lambda n: f"{n.ring_mb:,.0f} / {n.ring_mb_per_s:,.0f}",
    "network a node, each way: Gb/s": lambda n: "-" if n.nodes == 1 else f"{n.network_gbit:.1f}",
    "it is the limit below: images a device and a step": lambda n: "-" if n.nodes == 1 else str(n.batch_limit),
    "a checkpoint: MB / s of waiting": lambda n: f"{n.checkpoint_mb:,.0f} / {n.save_s:.1f}",
    "hours for the recipe, network hidden / not": lambda n: f"{n.hours:,.0f} / {n.hours_network_apart:,.0f}",
}


def table(columns: list[Needs]) -> str:
    """Markdown, a column for each number of devices."""
    heads = [
        f"{n.layout.world} device{'s' * (n.layout.world > 1)}, {n.nodes} node{'s' * (n.nodes > 1)}" for n in columns
    ]
    lines = [["", *heads], ["---"] * (len(columns) + 1)]
    lines += [[name, *map(read, columns)] for name, read in ROWS.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def published_rate(config: Config) -> float:
    """Images a second of one V100.

    Raises:
        UserError: Nothing is published for this model, mask and target.
    """
    hours = V100_HOURS.get((config.model.name, config.target.kind))
    changed = config.model != ModelConfig(name=config.model.name) or config.mask != MaskConfig()
    if hours is None or changed:
        raise UserError(
            f"--images-per-s is not given, and no speed is published for this {config.model.name} with target.kind "
            f"{config.target.kind}: expected images a second of one device, which a run prints as images_per_s"
        )
    return IMAGENET / (hours * 3600)


def main(argv: list[str]) -> None:
    """Counts, works out, prints."""
    parser = _Parser(prog="python benchmarks/scaling.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--devices", type=_whole, default=8, help="of one machine, a node")
    parser.add_argument("--nodes", type=_whole, default=8)
    parser.add_argument("--images", type=_whole, default=IMAGENET, help="in the data set; default: ImageNet's")
    parser.add_argument("--effective-batch", type=_whole, help="images of a step; default: 8 devices with the recipe")
    parser.add_argument("--images-per-s", type=_positive, help="of one device; default: published for one V100")
    helps = {
        "input_per_core": "images/s that a core makes; python benchmarks/data.py measures it",
        "image_kb": "mean size of an image file; default: ImageNet's",
        "packed_kb": "the same after `python -m localmim.data pack --short-side 256`",
        "network_gbit": "of a node's network, each way",
        "save_mb_per_s": "of writing a checkpoint",
    }
    for name, help in helps.items():
        default = getattr(Measured, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=_positive, default=default, help=help)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(argv)

    config = load_config(["--config", options.config, *rest])
    if config.task != "pretrain":
        raise UserError(f"{options.config} is of task {config.task}, expected a recipe of task pretrain")
    effective = options.effective_batch or RECIPE_DEVICES * config.batch_size * config.accumulate
    if options.images < effective:
        raise UserError(f"--images is {options.images}, expected at least the {effective} of a step")
    most = options.devices * options.nodes
    if effective < most:
        raise UserError(f"a step has {effective} images, too few for {most} devices: give a larger --effective-batch")
    rate = options.images_per_s or published_rate(config)
    given = Measured(rate, *(getattr(options, name) for name in helps))
    sizes = dict.fromkeys([(1, 1), (options.devices, 1), (most, options.nodes)])
    layouts = [(resumed_layout(config, world, effective, config), nodes) for world, nodes in sizes]
    model = count(config)
    columns = [needs(config, model, layout, nodes, options.images, given) for layout, nodes in layouts]
    if options.json:
        for c in columns:
            print(json.dumps({**c._asdict(), "layout": c.layout._asdict()}))
        return
    print(f"{config.model.name}: {model.trained / 1e6:.1f} M parameters are trained; {rate:.0f} images/s a device\n")
    print(table(columns))


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


if __name__ == "__main__":
    sys.exit(cli.run(main))

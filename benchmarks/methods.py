"""Every method side by side: one training step of each, on the same machine and batch, in one run.

    python benchmarks/methods.py [--batch-size 4] [--steps 5] [--rounds 2] [--only NAME …] [--scaling] [--out FILE.json]

A step is forward, backward and AdamW's update as the method's recipe has it, in fp32; images are random, masks are the
method's own, codebook ids are random. Each side is built and compiled in a process of its own. All together do not fit
into memory, so the first one, the reference, stays, and each of the others takes turns with it, step by step; then
comes the next, in several rounds, each in the other order than the one before. What slows the machine down meanwhile
slows both: a side's time is the median of its ratios to the reference's step just before, times the median of all the
reference's steps. Quartiles are of the same ratios.

Multiply-adds are counted for one forward pass as it really runs (benchmarks/multiply_adds.py). `--steps 0` counts
alone. `--scaling` runs other sides: LoMaR's cost with views and image size, against MAE's. The result is Markdown, and
with `--out` two files, FILE.json and FILE.md. What is compared, and what is published of it, stands in `SIDES` and
`PAIRS`; how the numbers become tables and sentences in benchmarks/compare.py.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")

from localmim import cli
from localmim.config import Config, load_config
from localmim.errors import RunError, UserError

RECIPES = Path(__file__).resolve().parents[1] / "config" / "pretrain"
WARM_UP = 2  # steps after the first, which compiles, that are not measured


@dataclass(frozen=True)
class Side:
    """What is timed, and what is published of it.

    Attributes:
        title: In tables.
        recipe: Of config/pretrain.
        keys: Recipe keys that differ.
        hours: Published GPU hours an epoch of ImageNet.
        results: Published: epochs and the ImageNet top-1 after fine-tuning that they led to.
        whole: Billions of multiply-adds of the authors' forward pass, as counted by others.
        beyond: What takes time in a step here and is no product.
        over, under: Why the published hours hold more, or less, than what is timed here.
    """

    title: str
    recipe: str
    keys: tuple[str, ...] = ()
    hours: float | None = None
    results: tuple[tuple[int, float], ...] = ()
    whole: float | None = None
    beyond: str = ""
    over: str = ""
    under: str = ""


@dataclass(frozen=True)
class Pair:
    """Two sides whose costs are divided: the first by the second.

    Attributes:
        step: Published ratio of a step's time; None: that of the hours an epoch, where both have them.
        to_accuracy: Published ratio of all hours to equal accuracy, which is no speed of a step.
        torch: Ratio of the authors' PyTorch code on one CPU thread, a step of 2 images.
    """

    first: str
    second: str
    step: float | None = None
    to_accuracy: float | None = None
    torch: float | None = None


def _sized(size: int, views: int | None = None) -> tuple[str, ...]:
    keys = ("--model.image_size", str(size))
    return keys if views is None else (*keys, "--mask.views", str(views))


_SWIN = "attention in windows, where gathers and small batched products wait for memory"
_BIASED = "softmax over the scores of all tokens, to which each block adds a bias of relative positions"
_MAE = "the eight decoder blocks' softmax and norms over all patches"
_IRPE = "iRPE, which makes a second set of scores by many small products"
_CONV = "norms, GELU and gathers for depth-wise convolution at 4 and 8 px, where tokens are many and narrow"
_FUSED = (
    "the decoder's attention over {} tokens was bound by memory on GPUs of that time, which operations do not count"
)
_OWN = "its authors compute HOG once a scale, and outputs that no loss reads; here neither is computed"

SIDES = {
    "localmim_vit": Side(
        "LocalMIM ViT-B",
        "localmim_vit_base_hog",
        hours=0.7,
        results=((1600, 84.0),),
        beyond="HOG, and four decoders whose rows are many and narrow",
        over=_OWN,
    ),
    "mae_vit": Side(
        "MAE ViT-B", "mae_vit_base", hours=1.1, results=((800, 83.3), (1600, 83.6)), whole=9.8, beyond=_MAE
    ),
    "lomar_vit": Side(
        "LoMaR ViT-B, 4 views", "lomar_vit_base", hours=1.4, results=((1600, 84.1),), whole=17.5, beyond=_IRPE
    ),
    "maskfeat_vit": Side(
        "MaskFeat ViT-B",
        "maskfeat_vit_base",
        hours=3.9,
        results=((1600, 84.0),),
        beyond="HOG, and softmax over the scores of all tokens",
        over="its published hours are those of a code of its own, which computes HOG by convolutions and scatters",
    ),
    "beit_vit": Side(
        "BEiT ViT-B",
        "beit_vit_base",
        hours=2.4,
        results=((800, 83.2),),
        beyond=_BIASED + ", and one over 8192 ids for each hidden patch",
        over="its published hours hold the tokenizer, a dVAE, which here runs before the step and is not timed",
    ),
    "lomar_beit_vit": Side("LoMaR in BEiT, 4 views", "lomar_beit_vit_base", beyond=_IRPE),
    "simmim_vit": Side("SimMIM ViT-B", "simmim_vit_base", results=((800, 83.8),), beyond=_BIASED),
    "convmae": Side("ConvMAE B", "convmae_convvit_base", results=((200, 84.4), (1600, 85.0)), beyond=_CONV),
    "fastconvmae": Side(
        "FastConvMAE B, 4 masks", "fastconvmae_convvit_base", results=((50, 84.4),), whole=45.1, beyond=_CONV
    ),
    "localmim_swin": Side(
        "LocalMIM Swin-B",
        "localmim_swin_base_hog",
        hours=1.1,
        results=((400, 84.1),),
        beyond=_SWIN + ", and HOG",
        over=_OWN,
    ),
    "simmim_swin": Side(
        "SimMIM Swin-B",
        "simmim_swin_base",
        ("--model.name", "simmim_swin_base_patch4_window7_224", *_sized(224)),
        hours=1.8,
        results=((800, 84.0),),
        beyond=_SWIN,
        under="its published hours are for 192 px, windows of 6; here are 224 px, 1.36 times the tokens, windows of 7",
    ),
    "greenmim_swin": Side("GreenMIM Swin-B", "greenmim_swin_base", hours=0.8, results=((800, 83.7),), beyond=_SWIN),
    "mae_vit_384": Side(
        "MAE ViT-B, 384 px", "mae_vit_base", _sized(384), whole=30.6, beyond=_MAE, over=_FUSED.format(577)
    ),
    "lomar_vit_384": Side("LoMaR ViT-B, 384 px, 6 views", "lomar_vit_base", _sized(384, 6), whole=26.4, beyond=_IRPE),
    "mae_vit_448": Side(
        "MAE ViT-B, 448 px", "mae_vit_base", _sized(448), whole=43.1, beyond=_MAE, over=_FUSED.format(785)
    ),
    "lomar_vit_448": Side("LoMaR ViT-B, 448 px, 9 views", "lomar_vit_base", _sized(448, 9), whole=39.6, beyond=_IRPE),
}
PAIRS = (
    Pair("mae_vit", "localmim_vit", to_accuracy=3.1),
    Pair("lomar_vit", "localmim_vit"),
    Pair("maskfeat_vit", "localmim_vit", to_accuracy=5.6),
    Pair("beit_vit", "localmim_vit", to_accuracy=27.4),
    Pair("simmim_vit", "localmim_vit"),
    Pair("convmae", "localmim_vit"),
    Pair("fastconvmae", "localmim_vit"),
    Pair("beit_vit", "lomar_beit_vit", to_accuracy=2.8),  # 35.8 % of BEiT's time
    Pair("simmim_swin", "localmim_swin", to_accuracy=3.6),
    Pair("greenmim_swin", "localmim_swin", to_accuracy=6.4),
    Pair("mae_vit", "lomar_vit", torch=0.64),
    Pair("mae_vit_384", "lomar_vit_384", step=2.5, torch=1.41),
    Pair("mae_vit_448", "lomar_vit_448", step=3.1, torch=1.67),
)
SCALING = {  # LoMaR with views at 224 px, with pixels at 4 views; MAE with pixels; then where they cross
    "lomar_vit_2_views": Side("LoMaR ViT-B, 2 views", "lomar_vit_base", _sized(224, 2)),
    "lomar_vit": SIDES["lomar_vit"],
    "lomar_vit_8_views": Side("LoMaR ViT-B, 8 views", "lomar_vit_base", _sized(224, 8)),
    "lomar_vit_384_4_views": Side("LoMaR ViT-B, 384 px, 4 views", "lomar_vit_base", _sized(384, 4)),
    "lomar_vit_448_4_views": Side("LoMaR ViT-B, 448 px, 4 views", "lomar_vit_base", _sized(448, 4)),
    **{name: SIDES[name] for name in ("mae_vit", "mae_vit_384", "mae_vit_448", "lomar_vit_384", "lomar_vit_448")},
}
TINY = {  # by a word of the model's name; for tests
    "localmim_vit_": ("--model.embed_dim", "24", "--model.depth", "7", "--model.num_heads", "2"),
    "_vit_": ("--model.embed_dim", "24", "--model.depth", "1", "--model.num_heads", "2"),
    "_swin_": ("--model.embed_dim", "8", "--model.depths", "[1,1,1,1]", "--model.num_heads", "[1,1,2,2]"),
    "_convvit_": ("--model.embed_dims", "[8,8,16]", "--model.depths", "[1,1,1]", "--model.num_heads", "2"),
}
TINY_DECODER = ("--model.decoder_dim", "16", "--model.decoder_depth", "1", "--model.decoder_heads", "2")
WITH_DECODER = ("localmim", "mae", "greenmim", "convmae", "fastconvmae")


def arguments(side: Side, tiny: bool = False) -> list[str]:
    """The side's recipe as load_config takes it.

    Raises:
        UserError: There is no such recipe.
    """
    argv = ["--config", str(RECIPES / f"{side.recipe}.yaml"), *side.keys]
    if tiny:
        name = load_config(argv).model.name
        argv += next(keys for word, keys in TINY.items() if word in name)
        argv += TINY_DECODER if name.partition("_")[0] in WITH_DECODER else ()
    return argv


def build(argv: list[str]):
    """A recipe, and its model with fresh weights."""
    import mindspore as ms

    from localmim.training.build import build_model

    ms.set_seed(0)
    config = load_config(argv)
    return config, build_model(config)


def random_inputs(config: Config, model, batch_size: int) -> tuple:
    """Images, the arrays of the model's own masks, and ids where the target is a codebook."""
    import numpy as np

    from localmim.training.build import build_masking

    rng = np.random.default_rng(0)
    encoder = model.encoder
    H, W = encoder.image_size
    images = rng.standard_normal((batch_size, encoder.in_chans, H, W)).astype(np.float32)
    ids = ()
    if config.target.kind == "codebook":
        grids = [(batch_size, H // cell, W // cell) for cell in model.cell_sides()]
        ids = tuple(rng.integers(0, config.target.vocab, grid, np.int32) for grid in grids)
    return images, *build_masking(config, model)(0, np.arange(batch_size)).arrays(), *ids


def serve(pipe, argv: list[str], batch_size: int, device: str) -> None:
    """A side's process. Every message is answered: "compile", "step" by seconds, "memory" by MB, "count", "end"."""
    import mindspore as ms

    from localmim.device import set_device
    from localmim.training.optimizer import AdamW, pretraining_groups
    from localmim.training.step import TrainStep
    from multiply_adds import multiply_adds

    device = set_device(device)
    config, model = build(argv)
    inputs = random_inputs(config, model, batch_size)
    step, updates = None, 0
    while (word := pipe.recv()) != "end":
        if word == "count":  # one image more costs `each`; the rest is done once a batch
            one, two = (multiply_adds(model, random_inputs(config, model, n)) for n in (1, 2))
            each = two - one
            pipe.send({"multiply_adds": each + (one - each) / batch_size})
        elif word == "memory":
            found = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
            if device != "CPU":
                found["peak_device_mb"] = ms.runtime.max_memory_allocated() / 2**20
            pipe.send(found)
        else:
            begin = time.perf_counter()
            if step is None:
                trained = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
                options = config.optimizer
                groups = pretraining_groups(trained, model.encoder.no_decay)
                adamw = AdamW(trained, options.betas, options.eps, options.weight_decay, groups)
                step = TrainStep(model, adamw, clip=options.clip_grad)
            updates += 1
            step([inputs], 1e-4, updates)
            pipe.send(time.perf_counter() - begin)


def run_side(*job) -> None:
    """A process's main function: `serve`, with one line for a mistake of the user."""
    sys.exit(cli.run(lambda argv: serve(*job), []))


class Process:
    """A side's process, seen from outside."""

    def __init__(self, name: str, argv: list[str], batch_size: int, device: str):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        job = (theirs, argv, batch_size, device)
        self.process = context.Process(target=run_side, args=job, daemon=True)  # ends with this one, whatever happens
        self.process.start()
        theirs.close()

    def ask(self, word: str):
        """The answer to a message.

        Raises:
            RunError: The process is gone.
        """
        try:
            self.pipe.send(word)
            return self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            raise RunError(
                f"the process of {self.name} ended with code {self.process.exitcode}: its own message is above, or "
                "memory was short; take a smaller --batch-size"
            ) from error

    def end(self) -> None:
        """Ends it, and waits for that."""
        self.pipe.send("end")
        self.process.join()


def measure(sides: dict[str, list[str]], options: argparse.Namespace) -> dict[str, dict]:
    """What was measured of each side, given by its recipe's arguments.

    Keys: multiply_adds; of timed sides times (s, each step), relative (each by the reference's step just before);
    step_s, low_s and high_s (median, quartiles), images_per_s, compile_s, peak_rss_mb, peak_device_mb but for a CPU.
    """
    found: dict[str, dict] = {name: {"times": [], "relative": [], "compile_s": []} for name in sides}
    first, *others = sides
    rounds = options.rounds if options.steps else 1
    reference = Process(first, sides[first], options.batch_size, options.device_target)
    if options.steps:
        found[first]["compile_s"].append(reference.ask("compile"))
    for turn in range(rounds):
        for name in others[:: -1 if turn % 2 else 1]:
            print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            side = Process(name, sides[name], options.batch_size, options.device_target)
            if options.steps:
                found[name]["compile_s"].append(side.ask("compile"))
                take_turns(reference, side, options.steps, found)
            if turn == 0:
                found[name].update(side.ask("count"))
            side.end()
    if options.steps and not others:
        take_turns(reference, None, options.steps * rounds, found)
    if options.steps:
        found[first].update(reference.ask("memory"))
    found[first].update(reference.ask("count"))
    reference.end()
    for row in found.values():
        summarise(row, found[first]["times"], options.batch_size)
    return found


def take_turns(reference: Process, side: Process | None, steps: int, found: dict[str, dict]) -> None:
    """Steps of the reference and of a side, if there is one, in turns; then the side's peak memory."""
    for i in range(WARM_UP + steps):
        base = reference.ask("step")
        seconds = side.ask("step") if side else None
        if i < WARM_UP:
            continue
        found[reference.name]["times"].append(base)
        if side:
            found[side.name]["times"].append(seconds)
            found[side.name]["relative"].append(seconds / base)
    if side:
        row = found[side.name]
        row.update({key: max(value, row.get(key, 0)) for key, value in side.ask("memory").items()})


def summarise(row: dict, reference: list[float], batch_size: int) -> None:
    """Medians and quartiles of a side; its seconds are those at the reference's median speed."""
    compile_s = row.pop("compile_s")
    if not row["times"]:
        return
    base = statistics.median(reference)
    values = reference if row["times"] is reference else [r * base for r in row["relative"]]
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    row["low_s"], row["step_s"], row["high_s"] = quarters
    row["images_per_s"] = batch_size / row["step_s"]
    row["compile_s"] = statistics.median(compile_s)


def machine(device: str) -> dict:
    """Where this runs."""
    import mindspore as ms

    return {
        "device": device,
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "mindspore": ms.__version__,
        "load": os.getloadavg()[0],
    }


def chosen(sides: dict[str, Side], patterns: list[str] | None) -> dict[str, Side]:
    """The sides whose names match one of the shell patterns; None: all.

    Raises:
        UserError: A pattern matches none.
    """
    for pattern in patterns or ():
        if not fnmatch.filter(sides, pattern):
            raise UserError(f"--only {pattern}: no such side, expected some of {', '.join(sides)}")
    return {
        name: side
        for name, side in sides.items()
        if patterns is None or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }


def heading(options: argparse.Namespace, begin: dict, end: dict) -> str:
    """A line that says how and where it was measured."""
    line = f"Multiply-adds alone, for batch {options.batch_size}."
    if options.steps:
        line = (
            f"{begin['device']}, {begin['cores']} cores, {begin['architecture']}, MindSpore {begin['mindspore']}; "
            f"fp32, batch {options.batch_size}; steps a round: {options.steps}, rounds: {options.rounds}; "
            f"load {begin['load']:.1f} before, {end['load']:.1f} after."
        )
    return line + (" Tiny models: published figures are not of these." if options.tiny else "")


def main(argv: list[str]) -> None:
    """Measures, prints, saves."""
    import compare

    parser = _Parser(prog="python benchmarks/methods.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--batch-size", type=_whole(1), default=4, help="images a step")
    parser.add_argument("--steps", type=_whole(0), default=5, help="that are timed in each round; 0: only count")
    parser.add_argument("--rounds", type=_whole(1), default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of a side, or a shell pattern")
    parser.add_argument("--scaling", action="store_true", help="LoMaR and MAE with views and image size")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try this script")
    parser.add_argument("--device-target", choices=("CPU", "GPU", "Ascend"), default="CPU")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args(argv)
    if options.out and (options.out.suffix != ".json" or not options.out.resolve().parent.is_dir()):
        raise UserError(f"--out {options.out}: expected a .json file in a folder that exists")

    sides = chosen(SCALING if options.scaling else SIDES, options.only)
    begin = machine(options.device_target)
    found = measure({name: arguments(side, options.tiny) for name, side in sides.items()}, options)
    text = compare.scaling(sides, found) if options.scaling else compare.report(sides, PAIRS, found)
    end = machine(options.device_target)
    text = f"{heading(options, begin, end)}\n\n{text}"
    print(text)
    if options.out:
        record = {
            "machine": {**begin, "load": [begin["load"], end["load"]]},
            "options": {k: v for k, v in vars(options).items() if k != "out"},
            "sides": {name: {"title": sides[name].title, **row} for name, row in found.items()},
            "ratios": [] if options.scaling else compare.ratios(sides, PAIRS, found),
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


def _whole(least: int):
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least {least}")
        return int(text)

    return read


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


if __name__ == "__main__":
    sys.exit(cli.run(main))

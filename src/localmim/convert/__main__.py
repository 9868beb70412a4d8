"""`python -m localmim.convert from-torch | to-torch`: weights between PyTorch and this project, both ways.

from-torch reads the authors' pre-training and fine-tuning of every method here, timm's ViT and Swin and the official
Swin, tells from names and shapes which it is (convert/families.py), and writes a weights file that every command here
reads (`--ckpt`, or `--init` of a run). to-torch writes the authors' names back. Names and shapes must all fit; what a
lone encoder leaves behind is listed.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from pathlib import Path
from typing import Literal, Optional, Union

from localmim import cli
from localmim.config import config_from_dict, load_config
from localmim.convert.encoder import encoder_weights, reorder_merging
from localmim.convert.families import (
    Arrays,
    Family,
    Method,
    Wanted,
    downstream_of,
    net_of,
    recipe,
    recognise,
    written_as,
)
from localmim.convert.load import LoadReport, load_weights, weights_of
from localmim.convert.names import official_names
from localmim.convert.shapes import Given
from localmim.convert.torch_file import read_torch
from localmim.device import set_device
from localmim.errors import UserError
from localmim.mim.model import MaskedImageModel
from localmim.models.classifier import LinearProbe, Pool
from localmim.training.build import build_model
from localmim.training.checkpoint import weights_header, write_weights
from localmim.training.restore import restore

Merging = Literal["as_is", "permute"]


def from_torch(
    src: str,
    out: str,
    config: str = "",
    wanted: Wanted | None = None,
    key: str = "",
    given: Given = Given(),  # noqa: B008 (frozen)
    merging: Merging = "as_is",
    overwrite: bool = False,
) -> LoadReport:
    """PyTorch weights as a weights file of this project.

    Args:
        src: A `.pth` or `.safetensors` file.
        out: The `.safetensors` file to write; its header holds the recipe.
        config: A recipe that the weights go with, instead of one made from what is found and `given`.
        wanted: What to make of them; None: pre-training weights stay that, classifiers too, and the rest are encoders.
        key: The entry of `src` that holds the weights; empty: the usual ones.
        given: What names and shapes do not tell.
        merging: For an encoder out of a Swin's pre-training: see convert/encoder.py.
        overwrite: Replace `out`.

    Raises:
        UserError: The file is refused, is of no known model, or does not fit; `out` is there already.
    """
    path = _free(out, overwrite)
    state = read_torch(src, key)
    family = recognise(state.arrays)
    wanted = wanted or family.natural
    family.check(wanted)
    if merging == "permute" and not ("localmim" in family.methods and family.net == "swin" and wanted == "encoder"):
        raise UserError("merging permute is for the encoder out of a Swin's pre-training by the authors: --as encoder")
    if config and given != Given():
        raise UserError("--config says all sizes: leave out the options that tell sizes, pooling and method")
    if config:
        settings, text = load_config(["--config", config]), f"sizes of {config}"
        task = "pretrain" if wanted == "pretrain" else "finetune"
        if settings.task != task:
            raise UserError(f"{config} is a recipe of task {settings.task}, expected {task} for {wanted} weights")
        if wanted == "encoder" or (wanted == "classifier" and settings.model.num_classes is None):
            classes = 0 if wanted == "encoder" else len(official_names(state.arrays)["head.weight"])
            settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, num_classes=classes))
    else:
        values, text = recipe(family, state.arrays, wanted, given, merging)
        settings = config_from_dict(values)
    where = f" under {state.key!r} (left there: {', '.join(state.others) or 'nothing'})" if state.key else ""
    print(f"{src}: {len(state.arrays)} tensors{where}\nfound: {family}: {text}")
    model = build_model(settings)
    arrays = family.from_torch(state.arrays, list(weights_of(model)), model)
    if merging == "permute":
        arrays = {n: reorder_merging(n, a) for n, a in arrays.items()}
    report = load_weights(model, arrays, family.left_behind(wanted))
    _print_report(report, family, wanted, state.arrays)
    write_weights(path, weights_of(model), weights_header(0, settings.as_dict()))
    print(f"{path}: {wanted} weights of {settings.model.name}")
    return report


def to_torch(
    ckpt: str,
    out: str,
    encoder_only: bool = False,
    merging: Merging = "as_is",
    spelling: str = "",
    overwrite: bool = False,
) -> list[str]:
    """Weights of this project as a `.safetensors` file with the authors' names, in float32; returns these.

    Args:
        ckpt: A run's folder, one of its checkpoints, or a weights file.
        encoder_only: Without decoders, norm and head, by the names of their fine-tuning model: what timm's ViT and the
            official Swin take, too. A table of relative positions that all blocks share becomes one a block.
        merging: For an encoder out of a Swin's pre-training with reference_quirks: see convert/encoder.py.
        spelling: Of models whose names are spelled in several ways: slowfast or mmpretrain (MaskFeat), mmpretrain or
            unilm (BEiT), authors or easycv (ConvMAE, FastConvMAE); empty: the first.

    Raises:
        UserError: The checkpoint cannot be read, or has no counterpart; `out` is there already.
    """
    path = _free(out, overwrite)
    config, model, step = restore(ckpt)
    pretrained = isinstance(model, MaskedImageModel)
    quirky = pretrained and net_of(model) == "swin" and model.encoder.rows_first
    if merging == "permute" and not (quirky and encoder_only):
        raise UserError(
            "merging permute is for the encoder of a LocalMIM Swin trained with reference_quirks: --encoder-only"
        )
    if isinstance(model, LinearProbe) and not encoder_only:
        raise UserError(
            f"{ckpt} is a linear probe, which the authors do not have: its encoder goes with --encoder-only"
        )
    if spelling and encoder_only:
        raise UserError("--spelling is for whole models: an encoder is written by the names of fine-tuning")
    arrays = weights_of(model)
    if encoder_only:
        family = downstream_of(model)
        arrays = {f"encoder.{n}": a for n, a in encoder_weights(arrays, merging).items()}
    else:
        family = written_as(model, config, spelling)
    if family.quirks and not config.reference_quirks:
        print(
            f"note: trained without reference_quirks; the authors' code pre-trains on in another way: {family.quirks}"
        )
    theirs = family.to_torch(arrays, model, config)
    write_weights(path, theirs, {"format": "pt"})
    print(f"{path}: {len(theirs)} tensors after {step} steps, by the authors' names")
    return list(theirs)


def _print_report(report: LoadReport, family: Family, wanted: Wanted, theirs: Arrays) -> None:
    """What became of every tensor."""
    constants = [n for n in theirs if family.constants(n) and n not in report.unexpected]
    print(f"{len(report.matched)} weights loaded, none missing, none of another shape")
    for pattern in family.left_behind(wanted):
        count = len(fnmatch.filter(report.unexpected, pattern))
        if count:
            print(f"{count} left behind, {pattern}: {wanted} weights have no place for them")
    if constants:
        print(f"{len(constants)} constants left out: they follow from the sizes, and to-torch writes them again")


def _free(out: str, overwrite: bool) -> Path:
    """`out` as a path that may be written.

    Raises:
        UserError: It is no .safetensors file, or there already.
    """
    path = Path(out)
    if path.suffix != ".safetensors":
        raise UserError(f"--out is {out}, expected a file that ends in .safetensors")
    if path.exists() and (path.is_dir() or not overwrite):
        raise UserError(f"{out} is there already: give another --out, or --overwrite true")
    return path


def main(argv: list[str]) -> None:
    """The command line."""
    parser, add = cli.commands("python -m localmim.convert", "Weights between PyTorch and this project.")
    command = add("from-torch", "weights of PyTorch models into a file of this project")
    command.add_argument("--src", metavar="FILE", type=str, required=True, help=".pth or .safetensors")
    command.add_argument("--out", metavar="FILE", type=str, required=True, help="the .safetensors file to write")
    command.add_argument("--config", metavar="RECIPE", type=str, default="", help="the recipe they go with; else made")
    command.add_argument("--as", type=Optional[Wanted], default=None, help="what to make of them; else what they are")
    command.add_argument("--key", type=str, default="", help="the entry of FILE with the weights; else the usual ones")
    command.add_argument("--pool", type=Optional[Pool], default=None, help="what becomes of tokens before the head")
    command.add_argument(
        "--image-size", metavar="PX", type=Optional[Union[int, list[int]]], default=None, help="a number, or [H, W]"
    )
    command.add_argument("--num-heads", metavar="N", type=Optional[int], default=None, help="a ViT's attention heads")
    command.add_argument("--decoder-heads", metavar="N", type=Optional[int], default=None, help="of decoders")
    command.add_argument("--method", type=Optional[Method], default=None, help="whose masks ConvMAE's weights go with")
    _add_shared(command)
    command = add("to-torch", "weights of this project into a .safetensors file with the authors' PyTorch names")
    command.add_argument("--ckpt", metavar="RUN", type=str, required=True, help="a run, a checkpoint or a weights file")
    command.add_argument("--out", metavar="FILE", type=str, required=True, help="the .safetensors file to write")
    command.add_argument("--encoder-only", action="store_true", help="without decoders, norm and head")
    command.add_argument("--spelling", type=str, default="", help="of MaskFeat's, BEiT's or ConvMAE's names; see above")
    _add_shared(command)
    parsed = cli.parse(parser, argv)
    set_device("CPU")  # nothing is computed
    options = parsed[parsed.command].as_dict()
    if parsed.command == "to-torch":
        to_torch(**options)
        return
    given = Given(**{f.name: options.pop(f.name) for f in dataclasses.fields(Given)})
    from_torch(wanted=options.pop("as"), given=given, **options)


def _add_shared(command) -> None:
    command.add_argument("--merging", type=Merging, default="as_is", help="of a Swin's encoder: as_is or permute")
    command.add_argument("--overwrite", type=bool, default=False, help="replace --out")


if __name__ == "__main__":
    sys.exit(cli.run(main))

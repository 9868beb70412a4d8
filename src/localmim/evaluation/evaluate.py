"""What eval.py does: a checkpoint to its accuracy, as a line and as a JSON file."""

from __future__ import annotations

import json
from pathlib import Path

from mindspore import nn

from localmim import cli
from localmim.config import Config, config_from_dict, merged, read_recipe
from localmim.convert.load import load_weights
from localmim.data.sources import open_source
from localmim.device import set_device
from localmim.distributed import Ranks, join
from localmim.errors import UserError
from localmim.evaluation.accuracy import accuracy, class_numbers
from localmim.evaluation.features import pooled
from localmim.evaluation.neighbours import neighbours, open_pair
from localmim.files import replace_text
from localmim.models.resize import fit_to_size
from localmim.training.build import build_model
from localmim.training.checkpoint import AVERAGE, Checkpoint, read_checkpoint
from localmim.training.classification import labelled


def evaluate(
    ckpt: str,
    data_dir: str = "",
    config: str = "",
    batch_size: int = 64,
    average: bool = False,
    out: str = "",
    device: str = "auto",
) -> dict:
    """Evaluates a checkpoint.

    Args:
        ckpt: A run's folder, one of its checkpoints, or a weights file.
        data_dir: Images with labels; empty: the recipe's.
        config: A recipe whose keys replace the checkpoint's own.
        batch_size: Images a forward pass on a device.
        average: Take the moving average of the weights.
        out: JSON file for the result; empty: beside the checkpoint.
        device: auto, CPU, GPU or Ascend.

    Raises:
        UserError: No checkpoint, no labelled images, or classes that the checkpoint does not know.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}, expected at least 1")
    chosen = set_device(device)
    ranks = join()
    checkpoint = read_checkpoint(ckpt)
    if average and not checkpoint.has_average:
        raise UserError(f"{checkpoint.path} holds no moving average of the weights: its recipe has no ema_decay")
    recipe = config_from_dict(merged(checkpoint.config, read_recipe(Path(config)) if config else {}))
    if recipe.task == "pretrain" or recipe.model.num_classes == 0:
        result = neighbours_of(checkpoint, recipe, data_dir, batch_size, average, ranks)
        line = f"weighted 20-NN of frozen features: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %"
    else:
        result = accuracy_of(checkpoint, recipe, data_dir, batch_size, average, ranks)
        line = f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % of {result['images']} images"
    result |= {"ckpt": str(checkpoint.path), "step": checkpoint.step, "task": recipe.task, "model": recipe.model.name}
    result |= {"device": chosen, "devices": ranks.world}
    if ranks.rank == 0:
        path = Path(out) if out else beside(checkpoint.path, "_average" if average else "")
        replace_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"{line}; {path}")
    return result


def accuracy_of(
    checkpoint: Checkpoint, recipe: Config, data_dir: str, batch_size: int, average: bool, ranks: Ranks
) -> dict:
    """Accuracy of a classifier on `data_dir`, or on the recipe's data.val_dir."""
    path = data_dir or recipe.data.val_dir
    if not path:
        raise UserError("no images to evaluate on: give --data-dir, the recipe has no data.val_dir")
    model = model_of(checkpoint, recipe, average)
    format, called = ("auto", "--data-dir") if data_dir else (recipe.data.format, "data.val_dir")
    source = open_source(path, format, model.encoder.in_chans, evaluation=True, called=called)
    names = labelled(source, called, path)
    classes = checkpoint.classes
    if not classes and len(names) != model.num_classes:
        raise UserError(f"{path} has {len(names)} classes, the classifier {model.num_classes}, and knows no names")
    numbers = class_numbers(source, classes or names, path)
    result = accuracy(model, source, recipe.data, batch_size, numbers, ranks)
    return {**result, "data_dir": path, "average": average}


def model_of(checkpoint: Checkpoint, recipe: Config, average: bool) -> nn.Cell:
    """The recipe's model with the checkpoint's weights, resized if the recipe asks for another image size."""
    model = build_model(recipe)
    weights = checkpoint.average() if average else checkpoint.weights()
    size = checkpoint.config["model"].get("image_size")
    load_weights(model, fit_to_size(weights, model, size).arrays)
    return model.set_train(False)


def neighbours_of(
    checkpoint: Checkpoint, recipe: Config, data_dir: str, batch_size: int, average: bool, ranks: Ranks
) -> dict:
    """Weighted 20-NN of a model without classes."""
    if ranks.world > 1:
        raise UserError("k-NN of a model without classes runs on one device")
    if data_dir:
        folders, format = [str(Path(data_dir) / part) for part in ("train", "val")], "auto"
    elif recipe.data.val_dir:
        folders, format = [recipe.data.dir, recipe.data.val_dir], recipe.data.format
    else:
        raise UserError(
            "a model without classes is evaluated by k-NN: give --data-dir with class folders in train/ and val/"
        )
    model = model_of(checkpoint, recipe, average)
    called = ("--data-dir",) * 2 if data_dir else ("data.dir", "data.val_dir")
    pair = open_pair(*folders, model.encoder.in_chans, format, called)
    return {**neighbours(pooled(model.encoder), *pair, recipe.data, batch_size=batch_size), "average": average}


def beside(path: Path, which: str) -> Path:
    """Where the result of a checkpoint goes: beside its run, or beside a weights file."""
    if path.suffix == ".safetensors" and not (path.parent / "manifest.json").exists():
        return path.with_suffix(".eval.json")
    which = "_average" if path.name == AVERAGE else which
    folder = path if path.is_dir() else path.parent  # a step of a run's checkpoints/
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    return run / f"eval_{folder.name}{which}.json"


def main(argv: list[str]) -> None:
    """The command line."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="eval.py", description="Evaluates what a checkpoint is.", exit_on_error=False)
    parser.add_argument("--ckpt", metavar="RUN", type=str, required=True, help="a run, a checkpoint or a weights file")
    parser.add_argument("--data-dir", metavar="DIR", type=str, default="", help="labelled images")
    parser.add_argument("--config", metavar="FILE", type=str, default="", help="its keys replace the checkpoint's own")
    parser.add_argument("--batch-size", metavar="N", type=int, default=64, help="images a forward pass on a device")
    parser.add_argument("--average", type=bool, default=False, help="true: the moving average of the weights")
    parser.add_argument("--out", metavar="FILE", type=str, default="", help="JSON file for the result")
    parser.add_argument("--device", type=str, default="auto", help="auto, CPU, GPU or Ascend")
    evaluate(**cli.parse(parser, argv).as_dict())

"""The weights that a run starts from: another pre-training's, a pre-trained encoder, or another classifier's."""

from __future__ import annotations

import mindspore as ms
from mindspore import nn
from mindspore.common.initializer import TruncatedNormal, initializer

from localmim.config import Config, config_from_dict
from localmim.convert.encoder import PRETRAINING_ONLY, reorder_merging
from localmim.convert.load import load_weights
from localmim.errors import UserError
from localmim.mim.greenmim import ShuffledUnitMasking
from localmim.mim.model import MaskedImageModel
from localmim.models.classifier import Classifier
from localmim.models.layers import Attention, LayerNorm, Linear
from localmim.models.resize import fit_to_size
from localmim.training.build import build_model
from localmim.training.checkpoint import read_checkpoint

_NORM = "encoder.tap_norms.{}.{}"
FRESH = ("norm.*", "head.*")  # a classifier's own
DROPPED = (*(f"encoder.{n}*" for n in PRETRAINING_ONLY), "decoders.*", "target.*")  # of pre-training alone


def go_on_pretraining(model: MaskedImageModel, config: Config) -> list[str]:
    """Gives `model` all weights of another pre-training, published ones for example; returns what was done, in lines.

    Raises:
        UserError: The file is no checkpoint of pre-training, its model is another one, was trained at another size that
            its weights follow, or with other `reference_quirks` where they decide what the weights compute.
    """
    if not config.init:
        return []
    checkpoint = read_checkpoint(config.init)
    saved = config_from_dict(checkpoint.config)
    if saved.task != "pretrain":
        raise UserError(f"init: {checkpoint.path} is of task {saved.task}, pre-training goes on from pre-training only")
    before = build_model(saved)
    if quirks_of(before) != quirks_of(model):
        raise UserError(
            f"init: {checkpoint.path} was trained with reference_quirks {str(saved.reference_quirks).lower()}: "
            "set the same here"
        )
    (h, w), (H, W) = before.encoder.image_size, model.encoder.image_size
    placed = [n for n, _ in model.parameters_and_names() if n.endswith(("pos_embed", "encoder.relative.table"))]
    if placed and (h, w) != (H, W):  # turned round, an oblong image has codes of the same shape
        raise UserError(
            f"init: {checkpoint.path} was trained at {h}x{w} px, which {placed[0]} follows; this is {H}x{W}"
        )
    lines = compare(before, model)
    return [
        f"weights of {checkpoint.path}, step {checkpoint.step}: {load_weights(model, checkpoint.weights())}",
        *lines,
    ]


def merges_rows_first(model: nn.Cell) -> bool:
    """Whether the encoder joins patches in the order of LocalMIM's pre-training (docs/quirks.md, Q3)."""
    return getattr(model.encoder, "rows_first", False)


def quirks_of(model: MaskedImageModel) -> tuple:
    """Of the authors' peculiarities those that decide what weights mean: the merging (Q3), the decoder's order (G1)."""
    return merges_rows_first(model), getattr(model.masking, "func", None) is ShuffledUnitMasking


def compare(before: nn.Cell, now: nn.Cell) -> list[str]:
    """What shapes do not tell, where both models have the same cells; returns what differs, in lines.

    Raises:
        UserError: Attention has another number of heads, so the weights would compute something else.
    """
    there, norms = dict(before.cells_and_names()), []
    for name, cell in now.cells_and_names():
        other = there.get(name)
        if isinstance(cell, Attention) and isinstance(other, Attention) and cell.num_heads != other.num_heads:
            raise UserError(f"init: {name} was trained with {other.num_heads} heads, this recipe has {cell.num_heads}")
        if isinstance(cell, LayerNorm) and isinstance(other, LayerNorm) and cell.eps != other.eps:
            norms.append((other.eps, cell.eps))
    lines = [f"{norms.count(pair)} norms had eps {pair[0]:g} and have {pair[1]:g}" for pair in dict.fromkeys(norms)]
    pools = [getattr(model, "pool", None) for model in (before, now)]
    if all(pools) and pools[0] != pools[1]:
        lines.append(f"pooling was {pools[0]} and is {pools[1]}")
    if hasattr(before, "decoders") and before.encoder.idle() and not hasattr(now, "decoders"):
        lines.append(f"{before.encoder.idle()} were not pre-trained: they lay above the last tap")
    return lines


def set_initial_weights(model: Classifier, config: Config, classes: list[str]) -> list[str]:
    """Gives `model` the weights that the recipe names, or fresh ones; returns what was done, in lines.

    An encoder that was pre-trained with `reference_quirks` merges patches in another order (docs/quirks.md, Q3): with
    the same switch here its merging weights are taken as they are, without it they are put into the official order.
    Everything of the encoder must be there. Norm and head of a classifier come along if the classes are the same ones.

    Raises:
        UserError: The file is no checkpoint, or its encoder is another one.
    """
    path = config.init
    if not path:
        if config.task == "linear_probe":
            raise UserError("init is empty: a linear probe needs the encoder of a run or a weights file")
        draw_fresh(model)
        return ["fresh weights: init is empty"]
    checkpoint = read_checkpoint(path)
    saved = config_from_dict(checkpoint.config)
    arrays = checkpoint.weights()
    same = (saved.task, saved.model.num_classes) == (config.task, config.model.num_classes)
    same = same and checkpoint.classes == classes
    if not same:
        arrays = {n: a for n, a in arrays.items() if not n.startswith(("norm.", "head."))}
    lines = []
    before = build_model(saved)
    if merges_rows_first(before) and not config.reference_quirks:
        arrays = {n: reorder_merging(n, a) for n, a in arrays.items()}
        lines.append("merging weights put into the official order (Q3)")
    kept = saved.task != "pretrain" and saved.reference_quirks and not config.reference_quirks
    if kept and hasattr(model.encoder, "layers"):
        lines.append("merging weights taken as they are, from a classifier or encoder with reference_quirks (Q3)")
    arrays, resized = fit_to_size(arrays, model, saved.model.image_size)
    lines += [f"resized: {what}" for what in resized]
    lines += compare(before, model)
    wanted = config.task == "finetune" and model.pool in ("token", "normed_mean")
    if wanted and _NORM.format("1", "gamma") not in arrays:
        for part in ("gamma", "beta"):  # where pre-training has one norm, it is the one that stood after the last block
            if _NORM.format("0", part) in arrays:
                arrays[f"norm.{part}"] = arrays[_NORM.format("0", part)]
    if config.task == "finetune":  # no output depends on the classes yet
        model.head.weight.set_data(initializer(TruncatedNormal(2e-5), model.head.weight.shape).init_data())
    report = load_weights(model, arrays, FRESH + DROPPED)
    return [f"encoder of {checkpoint.path}, step {checkpoint.step}: {report}", *lines]


def draw_fresh(model: Classifier) -> None:
    """The authors' start from nothing: N(0, 0.02), for every matrix."""
    for _, cell in model.cells_and_names():
        if isinstance(cell, Linear):
            shape = cell.weight.shape
            cell.weight.set_data(initializer(TruncatedNormal(0.02), shape, ms.float32).init_data())

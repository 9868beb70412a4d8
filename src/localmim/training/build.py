"""From a config to the parts of a run."""

from __future__ import annotations

import dataclasses

from mindspore import nn

from localmim.config import Config
from localmim.errors import UserError
from localmim.mim.masking import Masking
from localmim.mim.model import MaskedImageModel
from localmim.mim.reconstructors import FeatureNetworks
from localmim.mim.tokenizers import Tokenizer, open_tokenizer
from localmim.models.classifier import Classifier
from localmim.models.convvit import ConvBlock
from localmim.models.layers import Block
from localmim.models.registry import create_model, list_models, takes
from localmim.models.swin import SwinBlock


def build_model(config: Config) -> MaskedImageModel | Classifier:
    """The recipe's model with fresh weights; seed the framework first.

    Raises:
        UserError: Unknown name, a name that does not fit the task, or sizes that do not fit together.
    """
    given = {k: v for k, v in dataclasses.asdict(config.model).items() if v is not None}
    name = given.pop("name")
    recompute = given.pop("recompute")
    build = build_pretraining_model if config.task == "pretrain" else build_classifier
    model = build(name, given, config)
    if recompute:
        recompute_blocks(model)
    return model


def build_classifier(name: str, given: dict, config: Config) -> Classifier:
    """The model of a classifier's recipe; `given` are the keys of `model` that are set."""
    given.pop("isolated_gradients")  # of pre-training; its default says nothing
    if config.task == "linear_probe":
        given["probe"] = True
    check_keys(name, {k: f"model.{k}" for k in given if k != "probe"})
    model = create_model(name, reference_quirks=config.reference_quirks, **given)
    if not isinstance(model, Classifier):
        known = ", ".join(list_models(classifiers=True))
        raise UserError(f"model.name {name} is a model for pre-training, task {config.task} needs one of {known}")
    return model


def build_pretraining_model(name: str, given: dict, config: Config) -> MaskedImageModel:
    """The model of a pre-training recipe; `given` are the keys of `model` that are set."""
    target = config.target
    if not given["isolated_gradients"]:
        del given["isolated_gradients"]  # not every method has it
    if target.feature_dims:
        given["feature_dims"] = target.feature_dims
    mask = {k: v for k, v in dataclasses.asdict(config.mask).items() if v is not None and k != "ratio"}
    check_keys(name, {k: "target.features" if k == "feature_dims" else f"model.{k}" for k in given})
    check_keys(name, {k: f"mask.{k}" for k in mask})
    model = create_model(
        name,
        target=target.kind,
        nbins=target.nbins,
        hog_bias=target.bias,
        norm_pix=target.norm_pix,
        vocab=target.vocab,
        reference_quirks=config.reference_quirks,
        seed=config.seed,
        **given,
        **mask,
    )
    if not isinstance(model, MaskedImageModel):
        known = ", ".join(list_models(classifiers=False))
        raise UserError(f"model.name {name} is a classifier, task pretrain needs one of {known}")
    return model


def check_keys(name: str, keys: dict[str, str]) -> None:
    """UserError for the first key of a recipe, given by the argument that it becomes, that a model does not have."""
    for argument, key in keys.items():
        if not takes(name, argument):
            raise UserError(f"{key} is set, but {name} has no such key: leave it out")


def recompute_blocks(model: nn.Cell) -> None:
    """Drops the activations inside each transformer block and computes them again when gradients need them."""
    for _, cell in model.cells_and_names():
        if isinstance(cell, (Block, ConvBlock, SwinBlock)):
            cell.recompute()


def build_tokenizer(config: Config, model: MaskedImageModel) -> Tokenizer | FeatureNetworks | None:
    """What makes a batch's targets that are data: codebook ids, or features of frozen networks. None: there are none.

    Raises:
        UserError: Its files do not fit the recipe.
    """
    target, encoder = config.target, model.encoder
    if target.features:
        return FeatureNetworks(target.features, target.feature_dims, encoder.grid)
    if target.kind != "codebook":
        return None
    return open_tokenizer(target.codebook, model.cell_sides(), target.vocab, encoder.in_chans, encoder.image_size)


def build_masking(config: Config, model: MaskedImageModel) -> Masking:
    """The recipe's masks.

    Raises:
        UserError: The ratio leaves nothing visible or hides nothing.
    """
    return model.masking(config.mask.ratio, config.seed)

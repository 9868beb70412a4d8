"""From a config to the parts of a run."""

from __future__ import annotations

import dataclasses

from localmim.config import Config
from localmim.mim.masking import RandomMasking
from localmim.mim.model import MaskedImageModel
from localmim.mim.tokenizers import Tokenizer, open_tokenizer
from localmim.mim.unit_masking import UnitMasking
from localmim.models.registry import create_model
from localmim.models.swin import SwinTransformer


def build_model(config: Config) -> MaskedImageModel:
    """The recipe's model with fresh weights; seed the framework first.

    Raises:
        UserError: Unknown name, or sizes that do not fit together.
    """
    given = {k: v for k, v in dataclasses.asdict(config.model).items() if v is not None}
    name = given.pop("name")
    target = config.target
    return create_model(
        name,
        target=target.kind,
        nbins=target.nbins,
        hog_bias=target.bias,
        norm_pix=target.norm_pix,
        vocab=target.vocab,
        reference_quirks=config.reference_quirks,
        seed=config.seed,
        **given,
    )


def build_tokenizer(config: Config, model: MaskedImageModel) -> Tokenizer | None:
    """What makes the codebook ids of a batch; None for targets that are not a codebook.

    Raises:
        UserError: Its files do not fit the recipe.
    """
    if config.target.kind != "codebook":
        return None
    target, encoder = config.target, model.encoder
    return open_tokenizer(target.codebook, model.cell_sides(), target.vocab, encoder.in_chans, encoder.image_size)


def build_masking(config: Config, model: MaskedImageModel) -> RandomMasking | UnitMasking:
    """The recipe's masks.

    Raises:
        UserError: The ratio leaves nothing visible or hides nothing.
    """
    if isinstance(model.encoder, SwinTransformer):
        return UnitMasking(model.encoder, config.mask.ratio, config.seed)
    h, w = model.encoder.grid
    return RandomMasking(h * w, config.mask.ratio, config.seed)

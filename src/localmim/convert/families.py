"""The models whose PyTorch weights are known here: one table, and the recipe that builds a state dict's model.

An entry of the table says how names tell the family, what its names are in both directions, what can be made of it and
what an encoder leaves behind. Shapes tell all sizes (convert/shapes.py) but these, which can be given: the heads of a
ViT without tables of relative positions (a registered model's of that width, else 64 wide each), the heads of decoders
(the published ones), and the image size of a model that is not square or stores nothing that depends on it. Names do
not tell the order of norm and mean before a head, nor ConvMAE from FastConvMAE, which differ in masks alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from mindspore import nn

from localmim.config import Config
from localmim.convert import convmae, greenmim, mae, mask_token_names, names, simmim
from localmim.convert.mask_token_names import SPELLINGS, classifier_spelling
from localmim.convert.shapes import (
    Given,
    Predicted,
    Shapes,
    Sizes,
    codebook_head,
    convvit_sizes,
    localmim_swin_decoders,
    localmim_vit_decoders,
    lomar_head,
    mae_decoder,
    maskfeat_head,
    patch_side,
    pixel_head,
    square_side,
    swin_sizes,
    swin_stages,
    vit_sizes,
)
from localmim.errors import UserError
from localmim.mim.model import MaskedImageModel
from localmim.models.convvit import ConvViT
from localmim.models.swin import SwinTransformer

Wanted = Literal["pretrain", "classifier", "encoder"]
Method = Literal["convmae", "fastconvmae"]
Arrays = Mapping[str, np.ndarray]

_NOTHING = Given()
_OFFICIAL_EPS = 1e-5  # of LayerNorm in the official Swin, timm's and SimMIM's
_SHARED_TABLE = "encoder.relative.table"  # of relative positions, in pre-training
_NETS = {"vit": "ViT", "irpe": "ViT with iRPE", "beit": "ViT with BEiT's tables", "swin": "Swin", "convvit": "ConvViT"}
_DOWNSTREAM = {"irpe": "vit_irpe_", "beit": "beit_"}  # what such classifiers' names have for `vit_`


@dataclass(frozen=True)
class Family:
    """What a state dict is the weights of.

    Attributes:
        whose: The authors, in words.
        net: The encoder's kind, a key of _NETS.
        marks: What names begin with: each of these must be there.
        from_torch: PyTorch's arrays, our names, the model -> arrays by our names; other names stay as they are.
        to_torch: Our arrays, the model, its config -> PyTorch's arrays, constants included.
        torch_name: Their name of our parameter, as far as sizes are told by it.
        left: Patterns of names that an encoder leaves behind.
        methods: Pre-training: what the names of our models begin with; the first unless --method says another.
        above: Pre-training: decoders and target out of shapes, what is given, and the encoder's keys of `model`.
        side: Pixels a side of a Swin's square images, told by what is above the encoder.
        spelling: Which of several spellings of a model's names this is; empty: the only one.
        constants: Whether a name is of a constant, which has no counterpart here.
        ballast: Patterns of names that are left behind in any case.
        downstream: Keys of `model` that an encoder out of pre-training has.
        head: Downstream: whether there is one.
        timm: Downstream: whether this is timm's spelling of a Swin.
        quirks: What the authors' pre-training computes otherwise than ours without reference_quirks, in words.
    """

    whose: str
    net: str
    marks: tuple[str, ...]
    from_torch: Callable[[Arrays, list[str], nn.Cell], dict[str, np.ndarray]]
    to_torch: Callable[[Arrays, nn.Cell, Config], dict[str, np.ndarray]]
    torch_name: Callable[[str], str]
    left: tuple[str, ...]
    methods: tuple[str, ...] = ()
    above: Callable[[Shapes, Given, dict], Predicted] | None = None
    side: Callable[[Shapes, Given], int | None] = lambda shapes, given: None
    spelling: str = ""
    constants: Callable[[str], bool] = names.is_constant
    ballast: tuple[str, ...] = ()
    downstream: Mapping | None = None
    head: bool = False
    timm: bool = False
    quirks: str = ""

    def __str__(self) -> str:
        if self.methods:
            net = "ViT" if self.net in _DOWNSTREAM else _NETS[self.net]
            return f"a {net} of {self.whose}'s pre-training" + (f" ({self.spelling})" if self.spelling else "")
        whose = "timm's" if self.timm else self.whose
        return f"a {_NETS[self.net]} {'classifier' if self.head else 'encoder without head'} ({whose})"

    @property
    def natural(self) -> Wanted:
        """What it becomes here unless asked otherwise."""
        return "pretrain" if self.methods else "classifier" if self.head else "encoder"

    @property
    def tables(self) -> bool:
        """Whether tables of relative positions tell the heads."""
        return self.net in ("swin", "beit", "irpe")

    def check(self, wanted: Wanted) -> None:
        """UserError when `wanted` cannot be made of it."""
        possible = list(dict.fromkeys((self.natural, "encoder")))
        if wanted not in possible:
            raise UserError(f"{wanted} weights cannot be made of {self}: expected {' or '.join(possible)}")

    def left_behind(self, wanted: Wanted) -> tuple[str, ...]:
        """Patterns of PyTorch names that `wanted` has no place for, and need not have."""
        return (*self.left, *self.ballast) if wanted == "encoder" else self.ballast


def _localmim_from_torch(arrays: Arrays, ours: list[str], model: nn.Cell) -> dict[str, np.ndarray]:
    """LocalMIM's pre-training or, out of it, an encoder."""
    if isinstance(model.encoder, SwinTransformer):
        names.check_buffers(arrays)
    if isinstance(model, MaskedImageModel):
        return names.from_torch(arrays, ours, [d.scale for d in model.decoders])
    if isinstance(model.encoder, SwinTransformer):
        arrays = names.without_prefix(arrays, "encoder.")
    return names.classifier_from_torch(arrays, ours, model.pool)


def _localmim_to_torch(arrays: Arrays, model: nn.Cell, config: Config) -> dict[str, np.ndarray]:
    return names.to_torch(arrays, [d.scale for d in model.decoders], config.target.kind == "hog")


def _swin_pretraining(from_torch: Callable) -> Callable:
    """Whose index buffers are checked first."""

    def checked(arrays: Arrays, ours: list[str], model: nn.Cell) -> dict[str, np.ndarray]:
        names.check_buffers(arrays)
        return from_torch(arrays, ours)

    return checked


def _classifier_from_torch(arrays: Arrays, ours: list[str], model: nn.Cell) -> dict[str, np.ndarray]:
    if isinstance(model.encoder, SwinTransformer):
        names.check_buffers(arrays)
    return names.classifier_from_torch(arrays, ours, model.pool)


def _classifier_to_torch(arrays: Arrays, model: nn.Cell, config: Config) -> dict[str, np.ndarray]:
    stages = model.encoder.stages if isinstance(model.encoder, SwinTransformer) else ()
    return names.classifier_to_torch(arrays, getattr(model, "pool", "mean"), stages)


def _beit_from_torch(arrays: Arrays, ours: list[str], model: nn.Cell) -> dict[str, np.ndarray]:
    return _spread(arrays, ours, classifier_spelling(model.pool), model)


def _beit_to_torch(arrays: Arrays, model: nn.Cell, config: Config) -> dict[str, np.ndarray]:
    """Blocks that shared a table in pre-training get one each, as fine-tuning has it."""
    arrays = dict(arrays)
    table = arrays.pop(_SHARED_TABLE, None)
    if table is not None:
        arrays.update({f"encoder.blocks.{i}.attn.relative.table": table for i in range(model.encoder.depth)})
    spelling = classifier_spelling(getattr(model, "pool", "mean"))
    return mask_token_names.to_torch(arrays, spelling, model.encoder.grid)


def _spread(arrays: Arrays, ours: list[str], spelling, model: nn.Cell) -> dict[str, np.ndarray]:
    """Arrays by our names; a table that blocks share there becomes one a block where `ours` have that."""
    found = mask_token_names.from_torch(arrays, [*ours, _SHARED_TABLE], spelling, model.encoder.grid)
    own = [n for n in ours if re.fullmatch(r"encoder\.blocks\.\d+\.attn\.relative\.table", n) and n not in found]
    if own and _SHARED_TABLE in found:
        table = found.pop(_SHARED_TABLE)
        found.update({n: table for n in own})
    return found


def _mask_token_family(key: str, whose: str, net: str, method: str, above: Callable, spelling: str = "") -> Family:
    """A ViT that was pre-trained with mask tokens, in one of SPELLINGS."""
    s = SPELLINGS[key]
    return Family(
        whose,
        net,
        (f"{s.encoder}{'layers' if s.openmmlab else 'blocks'}.0.", f"{s.head}.weight"),
        lambda arrays, ours, model: _spread(arrays, ours, s, model),
        lambda arrays, model, config: mask_token_names.to_torch(
            arrays, s, model.encoder.grid, config.target.kind == "hog"
        ),
        lambda name: mask_token_names.torch_name(name, s),
        (f"{s.norm}.*", f"{s.encoder}mask_token", f"{s.head}.*"),
        (method,),
        above,
        spelling=spelling,
        constants=lambda name: mask_token_names.is_constant(name, s),
        ballast=("target_generator.*",) if key == "beit_mmpretrain" else (),  # the tokenizer
    )


def _convmae_family(whose: str, easycv: bool) -> Family:
    """ConvMAE or FastConvMAE, whose names are alike."""
    encoder, decoder = ("encoder.", "decoder.*") if easycv else ("", "decoder_*")
    return Family(
        whose,
        "convvit",
        (f"{encoder}patch_embed1.", "decoder." if easycv else "decoder_embed."),
        lambda arrays, ours, model: convmae.from_torch(arrays, ours),
        lambda arrays, model, config: convmae.to_torch(arrays, easycv),
        lambda name: convmae.torch_name(name, easycv),
        (f"{encoder}norm.*", f"{encoder}stage[12]_output_decode.*", "mask_token", decoder),
        ("fastconvmae", "convmae") if easycv else ("convmae", "fastconvmae"),
        lambda shapes, given, model: mae_decoder(shapes, given, 16),
        spelling="easycv" if easycv else "authors",
    )


def _downstream_family(net: str, whose: str, marks: tuple[str, ...], **own) -> Family:
    """A classifier, or an encoder without a head."""
    functions = {"from_torch": _classifier_from_torch, "to_torch": _classifier_to_torch}
    pyramid = net == "swin"
    functions["torch_name"] = lambda name: names.classifier_torch_name(name, "mean", pyramid)
    return Family(whose, net, marks, left=("norm.*", "fc_norm.*", "head.*"), **{**functions, **own})


FAMILIES = (  # the first whose marks are all there
    Family(
        "SimMIM",
        "swin",
        ("encoder.layers.0.", "decoder.0.weight"),
        _swin_pretraining(simmim.from_torch),
        lambda arrays, model, config: simmim.to_torch(arrays, model.encoder.stages),
        simmim.torch_name,
        ("encoder.norm.*", "encoder.mask_token", "decoder.*"),
        ("simmim",),
        lambda shapes, given, model: pixel_head(shapes, _last_side(shapes)),
        downstream={"norm_eps": _OFFICIAL_EPS},
    ),
    Family(
        "GreenMIM",
        "swin",
        ("encoder.layers.0.", "decoder_embed."),
        _swin_pretraining(greenmim.from_torch),
        lambda arrays, model, config: greenmim.to_torch(arrays),
        greenmim.torch_name,
        ("encoder.norm.*", "mask_token", "decoder_*"),
        ("greenmim",),
        lambda shapes, given, model: mae_decoder(shapes, given, _last_side(shapes), depth=1),
        side=lambda shapes, given: square_side(shapes, given, "decoders.0.pos_embed", 2 ** (swin_stages(shapes) - 1)),
        quirks="the decoder's order of visible tokens",
    ),
    Family(
        "LocalMIM",
        "swin",
        ("encoder.layers.0.", "decoder.0."),
        _localmim_from_torch,
        _localmim_to_torch,
        lambda name: names.torch_name(name, [], pyramid=True),
        ("norm.[0-9]*", "decoder.*", "hog_enc.*"),
        ("localmim",),
        localmim_swin_decoders,
        side=lambda shapes, given: square_side(shapes, given, "decoders.0.pos_embed", min(swin_stages(shapes), 2)),
        quirks="Q1 to Q3",
    ),
    _mask_token_family(
        "simmim_vit", "SimMIM", "beit", "simmim", lambda shapes, given, model: pixel_head(shapes, patch_side(shapes))
    ),
    _mask_token_family(
        "beit_mmpretrain", "BEiT", "beit", "beit", lambda shapes, given, model: codebook_head(shapes), "mmpretrain"
    ),
    _mask_token_family(
        "beit_unilm", "BEiT", "beit", "beit", lambda shapes, given, model: codebook_head(shapes), "unilm"
    ),
    _mask_token_family(
        "maskfeat_slowfast",
        "MaskFeat",
        "vit",
        "maskfeat",
        lambda shapes, given, model: maskfeat_head(shapes, patch_side(shapes)),
        "slowfast",
    ),
    _mask_token_family(
        "maskfeat_mmpretrain",
        "MaskFeat",
        "vit",
        "maskfeat",
        lambda shapes, given, model: maskfeat_head(shapes, patch_side(shapes)),
        "mmpretrain",
    ),
    Family(
        "LoMaR",
        "irpe",
        ("blocks.0.", "encoder_pred."),
        lambda arrays, ours, model: mae.lomar_from_torch(arrays, ours),
        lambda arrays, model, config: mae.lomar_to_torch(arrays, model.encoder.grid),
        mae.lomar_torch_name,
        ("norm.*", "mask_token", "encoder_pred.*"),
        ("lomar",),
        lambda shapes, given, model: lomar_head(shapes, patch_side(shapes), model),
        constants=lambda name: name == "pos_embed",
    ),
    _convmae_family("ConvMAE", easycv=False),
    _convmae_family("FastConvMAE", easycv=True),
    Family(
        "LocalMIM",
        "vit",
        ("blocks.0.", "patch_embed.proj.weight", "decoder.0."),
        _localmim_from_torch,
        _localmim_to_torch,
        lambda name: names.torch_name(name, []),
        ("norm.[0-9]*", "decoder.*", "hog_enc.*"),
        ("localmim",),
        localmim_vit_decoders,
    ),
    Family(
        "MAE",
        "vit",
        ("blocks.0.", "patch_embed.proj.weight", "decoder_embed."),
        lambda arrays, ours, model: mae.from_torch(arrays, ours),
        lambda arrays, model, config: mae.to_torch(arrays),
        mae.torch_name,
        ("norm.*", "mask_token", "decoder_*"),
        ("mae",),
        lambda shapes, given, model: mae_decoder(shapes, given, patch_side(shapes)),
    ),
    _downstream_family("swin", "LocalMIM's, the official or timm's", ("layers.0.blocks.0.norm1.weight",)),
    _downstream_family("irpe", "LoMaR's", ("patch_embed.proj.weight", "blocks.0.attn.rpe_k.")),
    _downstream_family(
        "beit",
        "BEiT's, SimMIM's or timm's",
        ("patch_embed.proj.weight", "blocks.0.attn.q_bias"),
        from_torch=_beit_from_torch,
        to_torch=_beit_to_torch,
        torch_name=lambda name: mask_token_names.torch_name(name, classifier_spelling("mean")),
        constants=lambda name: mask_token_names.is_constant(name, classifier_spelling("mean")),
    ),
    _downstream_family("convvit", "ConvMAE's", ("patch_embed1.proj.weight",)),
    _downstream_family("vit", "LocalMIM's, MAE's or timm's", ("patch_embed.proj.weight", "blocks.0.norm1.weight")),
)


def recognise(arrays: Arrays) -> Family:
    """The family of a state dict with PyTorch's names.

    Raises:
        UserError: It is none that is known here.
    """
    for family in FAMILIES:
        if all(any(n.startswith(mark) for n in arrays) for mark in family.marks):
            if family.methods:
                return family
            official = names.official_names(arrays)
            return replace(family, head="head.weight" in official, timm=official.keys() != arrays.keys())
    shown = ", ".join(list(arrays)[:3])
    known = ", ".join(dict.fromkeys(f.whose for f in FAMILIES if f.methods))
    raise UserError(
        f"these weights ({shown}, …) are of no model that is known here: expected pre-training of {known}, or a ViT, "
        "Swin or ConvViT classifier or encoder by their authors' or timm's names"
    )


def written_as(model: nn.Cell, config: Config, spelling: str = "") -> Family:
    """The family in whose names the weights of `model` are written.

    Args:
        spelling: One of several, where there are; empty: the first.

    Raises:
        UserError: The model has no counterpart, or not in that spelling.
    """
    pretrained = isinstance(model, MaskedImageModel)
    method = re.sub(r"_(vit|swin|convvit)_.*", "", config.model.name)
    fitting = [f for f in FAMILIES if f.net == net_of(model) and (method in f.methods if pretrained else not f.methods)]
    if not fitting:
        raise UserError(
            f"the authors have published no weights of a {config.model.name}, so that there are no names to write: its "
            "encoder goes with --encoder-only"
        )
    spellings = {f.spelling: f for f in fitting}
    if not spelling:
        return fitting[0]
    if spelling not in spellings:
        known = " or ".join(filter(None, spellings))
        raise UserError(
            f"--spelling {spelling}: {config.model.name} is written as {known}"
            if known
            else f"--spelling {spelling}: the names of {config.model.name} have one spelling only"
        )
    return spellings[spelling]


def downstream_of(model: nn.Cell) -> Family:
    """The family of classifiers on the encoder of `model`."""
    return next(f for f in FAMILIES if f.net == net_of(model) and not f.methods)


def net_of(model: nn.Cell) -> str:
    """The kind of a model's encoder, a key of _NETS."""
    encoder = model.encoder
    if isinstance(encoder, (SwinTransformer, ConvViT)):
        return "swin" if isinstance(encoder, SwinTransformer) else "convvit"
    return {"none": "vit", "contextual": "irpe"}.get(encoder.relative_kind, "beit")


def recipe(
    family: Family, arrays: Arrays, wanted: Wanted, given: Given = _NOTHING, merging: str = "as_is"
) -> tuple[dict, str]:
    """The recipe that builds the model, a config as a nested dict, and its sizes in words.

    Args:
        wanted: What to make of the weights.
        given: What shapes do not tell.
        merging: For an encoder out of a Swin's pre-training: see convert/encoder.py.

    Raises:
        UserError: It cannot be made of them, a name is missing, or a size must be given.
    """
    family.check(wanted)
    _refuse_idle(family, wanted, given)
    shapes = Shapes(names.official_names(arrays) if family.timm else arrays, family.torch_name)
    encoder, model, text = _encoder_sizes(family, shapes, given)
    if wanted == "pretrain":
        own, target, told, mask = family.above(shapes, given, model)
        model = {**model, **own, "name": f"{given.method or family.methods[0]}_{encoder}"}
        settings = {"task": "pretrain", "reference_quirks": True, "model": model, "target": target}
        if len(family.methods) > 1:
            told += f"; masks of {given.method or family.methods[0]} (other: --method)"
        return {**settings, **({"mask": mask} if mask else {})}, f"{text}; {told}"
    model = {**model, **(family.downstream or {})}
    model["name"] = encoder.replace("vit_", _DOWNSTREAM.get(family.net, "vit_"))
    swin = family.net == "swin"
    official = swin and (family.timm or given.pool == "normed_mean")
    if official:
        model["norm_eps"] = _OFFICIAL_EPS
    if wanted == "encoder":
        model["num_classes"] = 0
    else:
        usual = "normed_mean" if official else "token" if "norm.weight" in arrays and not swin else "mean"
        model["pool"], model["num_classes"] = given.pool or usual, shapes.of("head.weight", 2)[0]
        text = f"{text}; {model['num_classes']} classes, pool {model['pool']}"
        if swin and not official:
            text += " (LocalMIM's; the official one, SimMIM's and timm's: --pool normed_mean)"
    authors = swin and not official and (not family.methods or "localmim" in family.methods)
    return {"task": "finetune", "reference_quirks": authors and merging == "as_is", "model": model}, text


def _encoder_sizes(family: Family, shapes: Shapes, given: Given) -> Sizes:
    """Of the encoder, by its kind."""
    if family.net == "swin":
        return swin_sizes(shapes, given, family.side(shapes, given))
    return convvit_sizes(shapes, given) if family.net == "convvit" else vit_sizes(shapes, given, family.net)


def _last_side(shapes: Shapes) -> int:
    """Pixels a side of a token of a Swin's last stage."""
    return patch_side(shapes) * 2 ** (swin_stages(shapes) - 1)


def _refuse_idle(family: Family, wanted: Wanted, given: Given) -> None:
    """UserError for what is given and would change nothing, or cannot be."""
    if given.num_heads is not None and family.tables:
        raise UserError("--num-heads is for a ViT without tables of relative positions: these tell the heads")
    decoders = wanted == "pretrain" and {"localmim", "mae", "greenmim", "convmae"} & set(family.methods)
    if given.decoder_heads is not None and not decoders:
        raise UserError(f"--decoder-heads is for pre-training weights with a decoder, not for {wanted} weights here")
    pools = wanted == "classifier" or (family.net == "swin" and not family.methods)
    if given.pool is not None and not pools:
        raise UserError(f"--pool is for a classifier: {wanted} weights of {family} have no norm that it would choose")
    if given.method is not None and (wanted != "pretrain" or given.method not in family.methods):
        raise UserError(f"--method is for the pre-training of ConvMAE or FastConvMAE, not for {wanted} weights here")

"""What a PyTorch state dict is the weights of, told from names and shapes, and the recipe that builds that model here.

Shapes tell all sizes but three: the heads of a ViT's attention (a registered model's of that width, else 64 wide each),
the heads of LocalMIM's decoders (the published 8 and 4), and the image size of a model that is not square or stores
nothing that depends on it. Names do not tell the order of norm and mean before a head. All of these can be given.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from localmim.convert.names import official_names
from localmim.errors import UserError
from localmim.models.sizes import SWIN, VIT

Wanted = Literal["pretrain", "classifier", "encoder"]

_VIT = {sizes["embed_dim"]: name for name, sizes in VIT.items()}
_SWIN = {(sizes["embed_dim"], sizes["depths"], sizes["window_size"]): name for name, sizes in SWIN.items()}
_SCALE_OF_LAYERS = {"0134": 4.0, "01": 2.0, "0": 1.0, "1": 0.5}  # the layers with weights in a ViT decoder's head
_OFFICIAL_EPS = 1e-5  # of LayerNorm in the official Swin and timm's

# What a lone encoder leaves behind: names that only pre-training or a head has.
_LEFT_BEHIND = {
    "localmim": ("norm.[0-9]*", "decoder.*", "hog_enc.*"),
    "mae": ("norm.*", "mask_token", "decoder_*"),
    "classifier": ("norm.*", "fc_norm.*", "head.*"),
    "encoder": ("norm.*", "fc_norm.*"),
}


@dataclass(frozen=True)
class Given:
    """What the user says where shapes do not tell; None: nothing."""

    image_size: int | list[int] | None = None
    num_heads: int | None = None
    decoder_heads: int | None = None
    pool: str | None = None


@dataclass(frozen=True)
class Family:
    """What a state dict is, by its names alone.

    Attributes:
        kind: "localmim" or "mae" (pre-training), "classifier", or "encoder", which has no head.
        pyramid: Whether it is a Swin.
        timm: Whether it is a Swin in timm's spelling.
    """

    kind: str
    pyramid: bool
    timm: bool = False

    def __str__(self) -> str:
        net = "Swin" if self.pyramid else "ViT"
        if self.kind in ("localmim", "mae"):
            return f"a {net} of {'LocalMIM' if self.kind == 'localmim' else 'MAE'}'s pre-training"
        whose = (
            "timm's"
            if self.timm
            else "LocalMIM's, the official or timm's"
            if self.pyramid
            else "LocalMIM's, MAE's or timm's"
        )
        return f"a {net} {'classifier' if self.kind == 'classifier' else 'encoder without head'} ({whose})"

    @property
    def natural(self) -> Wanted:
        """What it becomes here unless asked otherwise."""
        return {"localmim": "pretrain", "classifier": "classifier"}.get(self.kind, "encoder")

    def check(self, wanted: Wanted) -> None:
        """UserError when `wanted` cannot be made of it."""
        possible = list(dict.fromkeys((self.natural, "encoder")))
        if wanted not in possible:
            raise UserError(f"{wanted} weights cannot be made of {self}: expected {' or '.join(possible)}")

    def left_behind(self, wanted: Wanted) -> tuple[str, ...]:
        """Patterns of PyTorch names that `wanted` has no place for, and need not have."""
        return _LEFT_BEHIND[self.kind] if wanted == "encoder" else ()


def recognise(arrays: Mapping[str, np.ndarray]) -> Family:
    """The family of a state dict with PyTorch's names.

    Raises:
        UserError: It is none that is known here.
    """
    decoders = any(n.startswith("decoder.0.") for n in arrays)
    if "encoder.layers.0.blocks.0.norm1.weight" in arrays and decoders:
        return Family("localmim", True)
    if "layers.0.blocks.0.norm1.weight" in arrays:
        official = official_names(arrays)
        timm = official.keys() != arrays.keys()
        return Family("classifier" if "head.weight" in official else "encoder", True, timm)
    if "blocks.0.norm1.weight" in arrays and "patch_embed.proj.weight" in arrays:
        if decoders:
            return Family("localmim", False)
        if "decoder_embed.weight" in arrays:
            return Family("mae", False)
        return Family("classifier" if "head.weight" in arrays else "encoder", False)
    shown = ", ".join(list(arrays)[:3])
    raise UserError(
        f"these weights ({shown}, …) are of no model that is known here: expected LocalMIM's, MAE's or timm's ViT, or "
        "LocalMIM's, the official or timm's Swin"
    )


def recipe(
    family: Family, arrays: Mapping[str, np.ndarray], wanted: Wanted, given: Given = Given(), merging: str = "as_is"
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
    if family.kind == "localmim" and family.pyramid:
        encoder = {n.removeprefix("encoder."): a for n, a in arrays.items() if n.startswith("encoder.")}
        model, text = _swin_sizes(encoder, given, _pretraining_side(arrays, given))
    elif family.pyramid:
        arrays = official_names(arrays)
        model, text = _swin_sizes(arrays, given, None)
    else:
        model, text = _vit_sizes(arrays, given)
    if wanted == "pretrain":
        own, target, told = (_swin_decoders if family.pyramid else _vit_decoders)(arrays, given, model)
        model = {**model, **own, "name": f"localmim_{model['name']}"}
        return {"task": "pretrain", "reference_quirks": True, "model": model, "target": target}, f"{text}; {told}"
    official = family.pyramid and (family.timm or given.pool == "normed_mean")
    if official:
        model["norm_eps"] = _OFFICIAL_EPS
    if wanted == "encoder":
        model["num_classes"] = 0
    else:
        usual = "normed_mean" if official else "token" if "norm.weight" in arrays and not family.pyramid else "mean"
        model["pool"], model["num_classes"] = given.pool or usual, _shape(arrays, "head.weight", 2)[0]
        text = f"{text}; {model['num_classes']} classes, pool {model['pool']}"
        if family.pyramid and not official:
            text += " (LocalMIM's; the official one and timm's: --pool normed_mean)"
    quirks = family.pyramid and not official and merging == "as_is"
    return {"task": "finetune", "reference_quirks": quirks, "model": model}, text


def _refuse_idle(family: Family, wanted: Wanted, given: Given) -> None:
    """UserError for what is given and would change nothing."""
    if given.num_heads is not None and family.pyramid:
        raise UserError("--num-heads is for a ViT: a Swin's bias tables tell its heads")
    if given.decoder_heads is not None and wanted != "pretrain":
        raise UserError(f"--decoder-heads is for pre-training weights, not for {wanted} weights")
    pools = wanted == "classifier" or (family.pyramid and family.kind != "localmim")
    if given.pool is not None and not pools:
        raise UserError(f"--pool is for a classifier: {wanted} weights of {family} have no norm that it would choose")


def _vit_decoders(arrays, given: Given, model: dict) -> tuple[dict, dict, str]:
    """Keys of `model` for the decoders and of `target`, and both in words; `model` has the encoder's keys."""
    scales = []
    for k in range(_count(arrays, r"decoder\.(\d+)\.")):
        layers = {m[1] for n in arrays if (m := re.match(rf"decoder\.{k}\.pred\.(\d+)\.weight$", n))}
        if "".join(sorted(layers)) not in _SCALE_OF_LAYERS:
            raise UserError(f"decoder.{k}.pred has weights in layers {sorted(layers)}, which no scale's head has")
        scales.append(_SCALE_OF_LAYERS["".join(sorted(layers))])
    last = {4.0: 4, 2.0: 1, 1.0: 0, 0.5: 1}
    outputs = [_shape(arrays, f"decoder.{k}.pred.{last[s]}.weight", 4)[0] for k, s in enumerate(scales)]
    cells = [int(model.get("patch_size", 16) / s) for s in scales]
    target, told = _target(arrays, outputs, cells, model.get("in_chans", 3))
    own = _decoder_sizes(arrays, given, dim=256, heads=8)
    if scales != [4.0, 2.0, 1.0, 0.5]:
        own["scales"] = scales
    shown = ", ".join(f"{s:g}" for s in scales)
    return own, target, f"{told} at scales {shown}, at the published depths; {_said(given, 8)}"


def _swin_decoders(arrays, given: Given, model: dict) -> tuple[dict, dict, str]:
    """The same for a Swin."""
    stages, decoders = _count(arrays, r"encoder\.layers\.(\d+)\."), _count(arrays, r"decoder\.(\d+)\.")
    if decoders != stages:
        raise UserError(
            f"there are {decoders} decoders for {stages} stages: give the recipe that they go with: --config"
        )
    outputs = [_shape(arrays, f"decoder.{k}.pred.weight", 2)[0] for k in range(decoders)]
    size = model.get("image_size", 224)
    height = size if isinstance(size, int) else size[0]
    grid = height // model.get("patch_size", 4)
    cells = [height // max(grid // 2 ** min(k + 1, stages - 1), 1) for k in range(stages)]
    target, told = _target(arrays, outputs, cells, model.get("in_chans", 3))
    own = _decoder_sizes(arrays, given, dim=128, heads=4, first_half=True)
    return own, target, f"{told} at every stage; {_said(given, 4)}"


def _pretraining_side(arrays, given: Given) -> int:
    """Pixels a side of the square images of a Swin's pre-training: its decoders store a code a place.

    Raises:
        UserError: They are not square, and how they lie is not given.
    """
    codes = _shape(arrays, "decoder.0.pos_embed", 3)[1]  # at the grid after the first merging
    if given.image_size is None and math.isqrt(codes) ** 2 != codes:
        raise UserError(
            f"decoder.0.pos_embed holds {codes} places, no square: say how they lie with --image-size [H, W]"
        )
    merged = 2 if _count(arrays, r"encoder\.layers\.(\d+)\.") > 1 else 1
    return math.isqrt(codes) * merged * _shape(arrays, "encoder.patch_embed.proj.weight", 4)[2]


def _vit_sizes(arrays, given: Given) -> tuple[dict, str]:
    """Keys of `model` that are not the registered model's, and all sizes in words."""
    dim, chans, patch, _ = _shape(arrays, "patch_embed.proj.weight", 4)
    depth = _count(arrays, r"blocks\.(\d+)\.")
    tokens = _shape(arrays, "pos_embed", 3)[1] - 1
    side = math.isqrt(tokens)
    if given.image_size is None and side * side != tokens:
        raise UserError(
            f"pos_embed holds {tokens} patches, which is no square: say how they lie with --image-size [H, W]"
        )
    size = side * patch if given.image_size is None else given.image_size
    name = _VIT.get(dim, "vit_base_patch16_224")
    heads = given.num_heads or (VIT[name]["num_heads"] if dim in _VIT else dim // 64 if dim % 64 == 0 else None)
    if heads is None:
        raise UserError(f"a ViT of width {dim} may have any number of heads: say how many with --num-heads")
    model = _different(
        {
            "image_size": size,
            "patch_size": patch,
            "in_chans": chans,
            "embed_dim": dim,
            "depth": depth,
            "num_heads": heads,
        },
        {
            "image_size": 224,
            "patch_size": 16,
            "in_chans": 3,
            **VIT[name],
        },
    )
    text = f"{dim} wide, {depth} blocks, {heads} heads, patches of {patch}, {_pixels(size)}"
    return {"name": name, **model}, text


def _swin_sizes(arrays, given: Given, side: int | None) -> tuple[dict, str]:
    """The same for a Swin's names without `encoder.`; `side` of its square image where that is known."""
    dim, chans, patch, _ = _shape(arrays, "patch_embed.proj.weight", 4)
    depths, heads, windows = [], [], []
    for s in range(_count(arrays, r"layers\.(\d+)\.")):
        depths.append(_count(arrays, rf"layers\.{s}\.blocks\.(\d+)\."))
        rows, nh = _shape(arrays, f"layers.{s}.blocks.0.attn.relative_position_bias_table", 2)
        heads.append(nh)
        windows.append((math.isqrt(rows) + 1) // 2)
    unit = patch * 2 ** (len(depths) - 1)
    mask = arrays.get("layers.0.blocks.1.attn_mask")
    if side is None and mask is not None:
        side = math.isqrt(len(mask)) * windows[0] * patch
    size = given.image_size or side or windows[-1] * unit  # as published: the last stage is one window
    sizes = (dim, tuple(depths), windows[0])
    name = _SWIN.get(sizes, "swin_base_patch4_window7_224")  # what another size is told as a variation of
    model = _different(
        {
            "image_size": size,
            "patch_size": patch,
            "in_chans": chans,
            "embed_dim": dim,
            "depths": depths,
            "num_heads": heads,
            "window_size": windows[0],
        },
        {
            "image_size": 224,
            "patch_size": 4,
            "in_chans": 3,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in SWIN[name].items()},
        },
    )
    blocks = "-".join(map(str, depths))
    text = f"{dim} wide, {blocks} blocks, windows of {windows[0]}, patches of {patch}, {_pixels(size)}"
    return {"name": name, **model}, text


def _decoder_sizes(arrays, given: Given, dim: int, heads: int, first_half: bool = False) -> dict:
    """Keys of `model` for LocalMIM's decoders; a Swin's first decoder has half the width."""
    wide = _shape(arrays, "decoder.0.embed.weight", 2)[0] * (2 if first_half else 1)
    depth = _count(arrays, r"decoder\.0\.blocks\.(\d+)\.")
    sizes = {"decoder_dim": wide, "decoder_depth": depth, "decoder_heads": given.decoder_heads or heads}
    return _different(sizes, {"decoder_dim": dim, "decoder_depth": 1, "decoder_heads": heads})


def _target(arrays, outputs: list[int], cells: list[int], chans: int) -> tuple[dict, str]:
    """Keys of `target`, and the same in words: told by the values that the decoders predict a cell.

    Raises:
        UserError: They are neither HOG nor pixels.
    """
    hog = any(n.startswith("hog_enc.") for n in arrays)
    if not hog and outputs == [chans * side * side for side in cells]:
        return {"kind": "pixels"}, "pixels"
    if hog and len(set(outputs)) == 1 and outputs[0] % chans == 0:
        bins, bias = outputs[0] // chans, any(re.match(r"hog_enc\.\d+\.conv\.bias", n) for n in arrays)
        return {"kind": "hog", "nbins": bins, "bias": bias}, f"HOG of {bins} bins{' with bias' if bias else ''}"
    raise UserError(
        f"the decoders predict {outputs} values a cell, which is neither HOG nor pixels: give the recipe: --config"
    )


def _said(given: Given, usual: int) -> str:
    """The decoders' heads, which nothing in the weights tells."""
    if given.decoder_heads:
        return f"decoders of {given.decoder_heads} heads"
    return f"decoders of {usual} heads as published (other: --decoder-heads)"


def _different(sizes: dict, usual: dict) -> dict:
    return {key: value for key, value in sizes.items() if value != usual[key]}


def _pixels(size) -> str:
    h, w = (size, size) if isinstance(size, int) else size
    return f"{h}x{w} px"


def _count(arrays, pattern: str) -> int:
    """How many numbers, from 0 on, names have where the pattern has its group.

    Raises:
        UserError: One is left out.
    """
    numbers = {int(m[1]) for n in arrays if (m := re.match(pattern, n))}
    if numbers != set(range(len(numbers))):
        raise UserError(
            f"of the names {pattern.replace(chr(92), '')} some numbers are missing: there are {sorted(numbers)}"
        )
    return len(numbers)


def _shape(arrays, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that tells a size.

    Raises:
        UserError: It is missing, or has another number of axes.
    """
    if name not in arrays:
        near = difflib.get_close_matches(name, arrays, 1)
        raise UserError(f"{name} is missing from these weights" + (f"; is it {near[0]}?" if near else ""))
    if arrays[name].ndim != rank or 0 in arrays[name].shape:
        raise UserError(f"{name} is of shape {list(arrays[name].shape)}, expected {rank} axes")
    return arrays[name].shape

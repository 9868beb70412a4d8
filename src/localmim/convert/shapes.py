"""Sizes of a model out of the shapes of its state dict: what a recipe says about encoders, decoders and targets.

Everything is asked for by our names, which each family of weights spells in its own way.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from localmim.errors import UserError
from localmim.models.sizes import CONVVIT, SWIN, VIT

_VIT = {sizes["embed_dim"]: name for name, sizes in VIT.items()}
_SWIN = {(sizes["embed_dim"], sizes["depths"], sizes["window_size"]): name for name, sizes in SWIN.items()}
_CONVVIT = {(sizes["embed_dims"], sizes["depths"]): name for name, sizes in CONVVIT.items()}
_CONV_PATCH = 16  # pixels a side of a ConvViT's patch
_HOG_CELL = 8  # pixels a side of a histogram of MaskFeat's
_SCALE_OF_LAYERS = {"0134": 4.0, "01": 2.0, "0": 1.0, "1": 0.5}  # the layers with weights in a ViT decoder's head
_HEAD, _HEAD_BIAS = "decoders.0.pred.weight", "decoders.0.pred.bias"  # the first is a convolution's with some authors
CODEBOOK = "codebook.safetensors"  # the name of a codebook that is not known
_UNTOLD = 224  # pixels, where nothing in the weights depends on the image


@dataclass(frozen=True)
class Given:
    """What the user says where shapes do not tell; None: nothing."""

    image_size: int | list[int] | None = None
    num_heads: int | None = None
    decoder_heads: int | None = None
    pool: str | None = None
    method: str | None = None


class Sizes(NamedTuple):
    """An encoder: the registered one it is told as a variation of, the keys of `model` that differ, all in words."""

    name: str
    model: dict
    text: str


class Predicted(NamedTuple):
    """What is above an encoder: keys of a recipe's `model`, `target` and `mask`, and the same in words."""

    model: dict
    target: dict
    text: str
    mask: dict | None = None


class Shapes:
    """The shapes of a state dict with PyTorch's names, asked for by ours.

    Args:
        arrays: Their names to arrays.
        torch_name: Their name of one of our parameters.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], torch_name: Callable[[str], str]):
        self.arrays, self.torch_name = arrays, torch_name

    def __contains__(self, name: str) -> bool:
        return self.torch_name(name) in self.arrays

    def of(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor that tells a size.

        Raises:
            UserError: It is missing, or has another number of axes.
        """
        return shape_of(self.arrays, self.torch_name(name), rank)

    def count(self, pattern: str) -> int:
        """How many numbers, from 0 on, names have where `pattern` has its `#`."""
        return count(self.arrays, re.escape(self.torch_name(pattern)).replace(r"\#", r"(\d+)"))


def shape_of(arrays: Mapping[str, np.ndarray], name: str, rank: int) -> tuple[int, ...]:
    """The same by PyTorch's name."""
    if name not in arrays:
        near = difflib.get_close_matches(name, arrays, 1)
        raise UserError(f"{name} is missing from these weights" + (f"; is it {near[0]}?" if near else ""))
    if arrays[name].ndim != rank or 0 in arrays[name].shape:
        raise UserError(f"{name} is of shape {list(arrays[name].shape)}, expected {rank} axes")
    return arrays[name].shape


def count(arrays: Mapping[str, np.ndarray], pattern: str) -> int:
    """How many numbers, from 0 on, names have where the regular expression `pattern` has its group.

    Raises:
        UserError: One is left out.
    """
    numbers = {int(m[1]) for n in arrays if (m := re.match(pattern, n))}
    if numbers != set(range(len(numbers))):
        shown = re.sub(r"\(.*?\)", "#", pattern).replace(chr(92), "")
        raise UserError(f"of the names {shown} some numbers are missing: there are {sorted(numbers)}")
    return len(numbers)


def vit_sizes(shapes: Shapes, given: Given, net: str) -> Sizes:
    """Of a ViT. Its position codes or bias tables tell the image; tables of relative positions tell the heads.

    Args:
        net: "vit"; "beit", with a table of offsets; "irpe", with iRPE's vectors, and codes that nothing reads or none.

    Raises:
        UserError: A size must be given.
    """
    dim, chans, patch, _ = shapes.of("encoder.patch_embed.weight", 4)
    depth = shapes.count("encoder.blocks.#.norm1.gamma")
    size, told = _vit_image(shapes, given, patch, net)
    name = _VIT.get(dim, "vit_base_patch16_224")
    model = _different(
        {
            "image_size": size,
            "patch_size": patch,
            "in_chans": chans,
            "embed_dim": dim,
            "depth": depth,
            "num_heads": _vit_heads(shapes, given, dim, VIT[name]["num_heads"] if dim in _VIT else None, net),
        },
        {"image_size": 224, "patch_size": 16, "in_chans": 3, **VIT[name]},
    )
    heads = model.get("num_heads", VIT[name]["num_heads"])
    text = f"{dim} wide, {depth} blocks, {heads} heads, patches of {patch}, {_pixels(size)}{told}"
    return Sizes(name, model, text)


def _vit_image(shapes: Shapes, given: Given, patch: int, net: str):
    """The image size, and what must be said of it."""
    name = "encoder.pos_embed"
    if net == "irpe" and name not in shapes:
        if given.image_size is None and _UNTOLD % patch:
            raise UserError(f"no weight tells the image size, and {_UNTOLD} px are no patches of {patch}: --image-size")
        return given.image_size or _UNTOLD, "" if given.image_size else " (no weight tells: else --image-size)"
    if net == "beit":
        name = _table_name(shapes)
        rows = shapes.of(name, 2)[0] - 3
        offsets = math.isqrt(max(rows, 0))
        side, fits, held = (offsets + 1) // 2, offsets**2 == rows and offsets % 2, f"{rows} offsets of patches"
    else:
        patches = shapes.of(name, 3)[1] - 1
        side = math.isqrt(patches)
        fits, held = side * side == patches, f"{patches} patches"
    if given.image_size is None and not fits:
        raise UserError(
            f"{shapes.torch_name(name)} holds {held}, which is no square: say how they lie with --image-size [H, W]"
        )
    return side * patch if given.image_size is None else given.image_size, ""


def _table_name(shapes: Shapes) -> str:
    """The table of relative positions, the first block's own or the one that all share."""
    own = "encoder.blocks.0.attn.relative.table"
    return own if own in shapes else "encoder.relative.table"


def _vit_heads(shapes: Shapes, given: Given, dim: int, registered: int | None, net: str = "vit") -> int:
    """Heads of attention; `registered` are those of the model of that width, if there is one.

    Raises:
        UserError: They must be given.
    """
    if net == "beit":
        return shapes.of(_table_name(shapes), 2)[1]
    if net == "irpe":
        return dim // shapes.of(_table_name(shapes), 3)[1]
    heads = given.num_heads or registered or (dim // 64 if dim % 64 == 0 else None)
    if heads is None:
        raise UserError(f"blocks of width {dim} may have any number of heads: say how many with --num-heads")
    return heads


def swin_sizes(shapes: Shapes, given: Given, side: int | None = None) -> Sizes:
    """Of a Swin; `side` of its square image where that is known.

    Raises:
        UserError: A name is missing.
    """
    dim, chans, patch, _ = shapes.of("encoder.patch_embed.weight", 4)
    depths, heads, windows = [], [], []
    for s in range(swin_stages(shapes)):
        depths.append(shapes.count(f"encoder.layers.{s}.blocks.#.norm1.gamma"))
        rows, nh = shapes.of(f"encoder.layers.{s}.blocks.0.attn.relative_position_bias_table", 2)
        heads.append(nh)
        windows.append((math.isqrt(rows) + 1) // 2)
    unit = patch * 2 ** (len(depths) - 1)
    mask = shapes.arrays.get(shapes.torch_name("encoder.layers.0.blocks.1.attn_mask"))
    if side is None and mask is not None:
        side = math.isqrt(len(mask)) * windows[0] * patch
    size = given.image_size or side or windows[-1] * unit  # as published: the last stage is one window
    name = _SWIN.get((dim, tuple(depths), windows[0]), "swin_base_patch4_window7_224")
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
        {"image_size": 224, "patch_size": 4, "in_chans": 3, **_lists(SWIN[name])},
    )
    blocks = "-".join(map(str, depths))
    text = f"{dim} wide, {blocks} blocks, windows of {windows[0]}, patches of {patch}, {_pixels(size)}"
    return Sizes(name, model, text)


def swin_stages(shapes: Shapes) -> int:
    """How many stages a Swin has."""
    return shapes.count("encoder.layers.#.blocks.0.norm1.gamma")


def square_side(shapes: Shapes, given: Given, codes: str, merged: int) -> int:
    """Pixels a side of the square images of a Swin's pre-training: its decoders store a code a place.

    Args:
        codes: Our name of these codes.
        merged: Tokens of the first stage a side of a place.

    Raises:
        UserError: They are not square, and how they lie is not given.
    """
    places = shapes.of(codes, 3)[1]
    if given.image_size is None and math.isqrt(places) ** 2 != places:
        raise UserError(
            f"{shapes.torch_name(codes)} holds {places} places, no square: say how they lie with --image-size [H, W]"
        )
    return math.isqrt(places) * merged * shapes.of("encoder.patch_embed.weight", 4)[2]


def convvit_sizes(shapes: Shapes, given: Given) -> Sizes:
    """Of a ConvViT.

    Raises:
        UserError: A size must be given.
    """
    dims = [shapes.of(f"encoder.patch_embed{s}.proj.weight", 4)[0] for s in (1, 2, 3)]
    chans = shapes.of("encoder.patch_embed1.proj.weight", 4)[1]
    depths = [shapes.count(f"encoder.blocks{s}.#.norm1.gamma") for s in (1, 2, 3)]
    patches = shapes.of("encoder.pos_embed", 3)[1]
    if given.image_size is None and math.isqrt(patches) ** 2 != patches:
        raise UserError(
            f"{shapes.torch_name('encoder.pos_embed')} holds {patches} patches, which is no square: say how they lie "
            "with --image-size [H, W]"
        )
    size = given.image_size or math.isqrt(patches) * _CONV_PATCH
    known = _CONVVIT.get((tuple(dims), tuple(depths)))
    name = known or "convvit_base_patch16_224"
    heads = _vit_heads(shapes, given, dims[2], CONVVIT[name]["num_heads"] if known else None)
    model = _different(
        {"image_size": size, "in_chans": chans, "embed_dims": dims, "depths": depths, "num_heads": heads},
        {"image_size": 224, "in_chans": 3, **_lists(CONVVIT[name])},
    )
    widths, blocks = ("-".join(map(str, numbers)) for numbers in (dims, depths))
    return Sizes(name, model, f"{widths} wide, {blocks} blocks, {heads} heads, {_pixels(size)}")


def localmim_vit_decoders(shapes: Shapes, given: Given, model: dict) -> Predicted:
    """LocalMIM's decoders on a ViT and their target; `model` has the encoder's keys.

    Raises:
        UserError: They are of no known form.
    """
    arrays, scales = shapes.arrays, []
    for k in range(count(arrays, r"decoder\.(\d+)\.")):
        layers = {m[1] for n in arrays if (m := re.match(rf"decoder\.{k}\.pred\.(\d+)\.weight$", n))}
        if "".join(sorted(layers)) not in _SCALE_OF_LAYERS:
            raise UserError(f"decoder.{k}.pred has weights in layers {sorted(layers)}, which no scale's head has")
        scales.append(_SCALE_OF_LAYERS["".join(sorted(layers))])
    last = {4.0: 4, 2.0: 1, 1.0: 0, 0.5: 1}
    outputs = [shape_of(arrays, f"decoder.{k}.pred.{last[s]}.weight", 4)[0] for k, s in enumerate(scales)]
    cells = [int(model.get("patch_size", 16) / s) for s in scales]
    target, told = _localmim_target(arrays, outputs, cells, model.get("in_chans", 3))
    own = _decoder_sizes(shapes, given, dim=256, depth=1, heads=8)
    if scales != [4.0, 2.0, 1.0, 0.5]:
        own["scales"] = scales
    shown = ", ".join(f"{s:g}" for s in scales)
    return Predicted(own, target, f"{told} at scales {shown}, at the published depths; {_said(given, 8)}")


def localmim_swin_decoders(shapes: Shapes, given: Given, model: dict) -> Predicted:
    """The same on a Swin."""
    arrays, stages = shapes.arrays, swin_stages(shapes)
    decoders = count(arrays, r"decoder\.(\d+)\.")
    if decoders != stages:
        raise UserError(
            f"there are {decoders} decoders for {stages} stages: give the recipe that they go with: --config"
        )
    outputs = [shape_of(arrays, f"decoder.{k}.pred.weight", 2)[0] for k in range(decoders)]
    size = model.get("image_size", 224)
    height = size if isinstance(size, int) else size[0]
    grid = height // model.get("patch_size", 4)
    cells = [height // max(grid // 2 ** min(k + 1, stages - 1), 1) for k in range(stages)]
    target, told = _localmim_target(arrays, outputs, cells, model.get("in_chans", 3))
    own = _decoder_sizes(shapes, given, dim=128, depth=1, heads=4, first_half=True)
    return Predicted(own, target, f"{told} at every stage; {_said(given, 4)}")


def _localmim_target(arrays, outputs: list[int], cells: list[int], chans: int) -> tuple[dict, str]:
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


def mae_decoder(shapes: Shapes, given: Given, side: int, depth: int = 8) -> Predicted:
    """MAE's decoder, which predicts pixels of cells of `side`; `depth` is the published one."""
    own = _decoder_sizes(shapes, given, dim=512, depth=depth, heads=16)
    target, text = _pixels_of(shapes, side)
    return Predicted(own, target, f"{text}; {_said(given, 16)}")


def pixel_head(shapes: Shapes, side: int) -> Predicted:
    """A layer that predicts pixels of cells of `side`."""
    return Predicted({}, *_pixels_of(shapes, side))


def lomar_head(shapes: Shapes, side: int, model: dict) -> Predicted:
    """LoMaR's layer, and its windows, which no weight tells: 7 patches a side as published, fewer on a smaller grid."""
    size = model.get("image_size", 224)
    window = min(7, *(pixels // side for pixels in ((size,) if isinstance(size, int) else size)))
    target, text = _pixels_of(shapes, side)
    return Predicted(
        {}, target, f"{text}; windows of {window} patches (no weight tells: else --config)", {"window": window}
    )


def maskfeat_head(shapes: Shapes, side: int) -> Predicted:
    """MaskFeat's layer, which predicts the HOG of patches of `side`.

    Raises:
        UserError: It predicts something else.
    """
    outputs, chans = shapes.of(_HEAD, 2)[0], _chans(shapes)
    split = side // _HOG_CELL
    if not split or side % _HOG_CELL or outputs % (chans * split * split):
        raise UserError(
            f"{shapes.torch_name(_HEAD)} predicts {outputs} values a patch, which is no HOG: give the recipe: --config"
        )
    bins = outputs // (chans * split * split)
    return Predicted({}, {"kind": "hog", "nbins": bins}, f"HOG of {bins} bins at cells of {_HOG_CELL} px")


def codebook_head(shapes: Shapes) -> Predicted:
    """BEiT's layer, which predicts ids of a codebook."""
    vocab = shapes.of(_HEAD, 2)[0]
    text = f"ids of a codebook of {vocab}, which is not in these weights: the recipe names it {CODEBOOK}"
    return Predicted({}, {"kind": "codebook", "codebook": [CODEBOOK], "vocab": vocab}, text)


def patch_side(shapes: Shapes) -> int:
    """Pixels a side of what the patch embedding takes."""
    return shapes.of("encoder.patch_embed.weight", 4)[2]


def _chans(shapes: Shapes) -> int:
    """Channels of the images."""
    name = "encoder.patch_embed.weight"
    return shapes.of(name if name in shapes else "encoder.patch_embed1.proj.weight", 4)[1]


def _pixels_of(shapes: Shapes, side: int) -> tuple[dict, str]:
    """Keys of `target`, and the same in words.

    Raises:
        UserError: It is not pixels: then nothing tells HOG from the ids of a codebook.
    """
    outputs, pixels = shapes.of(_HEAD_BIAS, 1)[0], _chans(shapes) * side * side
    if outputs != pixels:
        raise UserError(
            f"{shapes.torch_name(_HEAD_BIAS)} is of {outputs} values a patch, and pixels would be {pixels}: give the "
            "recipe: --config"
        )
    return {"kind": "pixels"}, f"pixels of {side} px cells"


def _decoder_sizes(shapes: Shapes, given: Given, dim: int, depth: int, heads: int, first_half: bool = False) -> dict:
    """Keys of `model` for decoders that differ from these; LocalMIM's first decoder on a Swin has half the width.

    Raises:
        UserError: The heads must be given.
    """
    own = shapes.of("decoders.0.embed.weight", 2)[0]
    if given.decoder_heads is None and own % heads:
        raise UserError(
            f"decoders {own} wide cannot have the published number of heads, {heads}: say how many with --decoder-heads"
        )
    wide = own * (2 if first_half else 1)
    sizes = {
        "decoder_dim": wide,
        "decoder_depth": shapes.count("decoders.0.blocks.#.norm1.gamma"),
        "decoder_heads": given.decoder_heads or heads,
    }
    return _different(sizes, {"decoder_dim": dim, "decoder_depth": depth, "decoder_heads": heads})


def _said(given: Given, usual: int) -> str:
    """The decoders' heads, which nothing in the weights tells."""
    if given.decoder_heads:
        return f"decoders of {given.decoder_heads} heads"
    return f"decoders of {usual} heads as published (other: --decoder-heads)"


def _different(sizes: dict, usual: dict) -> dict:
    return {key: value for key, value in sizes.items() if value != usual[key]}


def _lists(sizes: dict) -> dict:
    """As a recipe has them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in sizes.items()}


def _pixels(size) -> str:
    h, w = (size, size) if isinstance(size, int) else size
    return f"{h}x{w} px"

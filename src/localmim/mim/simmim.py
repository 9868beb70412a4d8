"""SimMIM presets: "SimMIM: A Simple Framework for Masked Image Modeling" (Xie et al., CVPR 2022).

Squares of 32 pixels are hidden: a learned token replaces what was embedded of them, the encoder sees the whole image,
and one linear layer predicts the raw pixels of each hidden token; the loss is their mean absolute error. Deviations
from the authors' code: their 1e-5 in the loss's denominator is left out (below rounding), and `reference_quirks`
decides whether a Swin's bias tables decay (docs/quirks.md, S1). On a Swin squares are whole tokens of the last stage
(S7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from mindspore import nn
from mindspore.common.initializer import initializer

from localmim.mim.beit import beit_encoder
from localmim.mim.heads import TokenHead
from localmim.mim.init import draw
from localmim.mim.losses import absolute_error
from localmim.mim.model import MaskedImageModel
from localmim.mim.replaced_masking import SquareMasking
from localmim.mim.targets import PixelTarget, build_target
from localmim.models.layers import torch_default_init
from localmim.models.registry import register
from localmim.models.sizes import SWIN, VIT
from localmim.models.swin import SwinTransformer, last_stage

SQUARE = 32  # pixels


def pixel_shuffle_target(
    kind: str, side: int, in_chans: int, nbins, hog_bias, norm_pix, vocab, seed
) -> tuple[nn.Cell, Callable]:
    """The target of a kind for tokens of so many pixels, and the error that goes with it.

    Pixels are in the order in which the authors' head predicts them, and their error is absolute; HOG and codebook ids,
    which theirs does not have, are LocalMIM's.

    Raises:
        ValueError: There is no such kind.
    """
    if kind == "pixels":
        return PixelTarget([side], in_chans, norm_pix, channels_first=True), absolute_error
    return build_target(kind, [side], in_chans, nbins, hog_bias, norm_pix, vocab, seed)


def hide_squares(encoder: nn.Cell, side: int) -> partial:
    """The masking that hides squares of so many pixels, from (ratio, seed); the encoder's `mask_grid` becomes theirs.

    Raises:
        ValueError: The squares do not hold whole tokens of the last stage, or do not divide the image.
    """
    (H, W), (h, w) = encoder.image_size, encoder.tap_grids[0]
    if side < 1 or H % side or W % side or side % (H // h):
        raise ValueError(f"mask_size {side} must be a multiple of {H // h} px, a token's, and divide the {H}x{W} px")
    encoder.mask_grid, encoder.mask_unit = (H // side, W // side), side
    tokens = H // encoder.patch_size, W // encoder.patch_size
    return partial(SquareMasking, encoder.mask_grid, tokens, (h, w))


def simmim_swin(
    image_size=192,
    patch_size: int = 4,
    in_chans: int = 3,
    embed_dim: int = 128,
    depths: Sequence[int] = (2, 2, 18, 2),
    num_heads: Sequence[int] = (4, 8, 16, 32),
    window_size: int = 6,
    mlp_ratio: float = 4.0,
    mask_size: int = SQUARE,
    norm_eps: float = 1e-5,
    target: str = "pixels",
    nbins: int = 9,
    hog_bias: bool = False,
    norm_pix: bool = False,
    vocab: int = 512,
    drop_path: float = 0.0,
    reference_quirks: bool = False,
    seed: int = 0,
) -> MaskedImageModel:
    """SimMIM on a Swin.

    Args:
        mask_size: Pixels a side of the squares that are hidden as one.
        norm_eps: Of every LayerNorm.
        target, nbins, hog_bias, norm_pix, vocab, seed: As in `localmim_vit`.
        drop_path: As in MaskedImageModel. Published: 0.
        reference_quirks: The bias tables decay, which the authors meant to exclude (docs/quirks.md).

    Raises:
        ValueError: Sizes that do not fit together.
    """
    encoder = SwinTransformer(
        image_size,
        patch_size,
        in_chans,
        embed_dim,
        depths,
        num_heads,
        window_size,
        mlp_ratio,
        taps=(last_stage(depths, num_heads, window_size),),
        norm_eps=norm_eps,
        mask_token=True,
    )
    encoder.no_decay = ("mask_token",) if reference_quirks else ("position_bias", "mask_token")
    masking = hide_squares(encoder, mask_size)
    side = encoder.image_size[0] // encoder.tap_grids[0][0]
    targets, error = pixel_shuffle_target(target, side, in_chans, nbins, hog_bias, norm_pix, vocab, seed)
    head = TokenHead(encoder.embed_dim, encoder.tap_grids[0], targets.dims[0])
    draw(encoder)
    draw_convolution(encoder.patch_embed)
    draw_convolution(head.pred)
    return MaskedImageModel(encoder, [head], targets, masking, error, drop_path)


def simmim_vit(
    image_size=224,
    patch_size: int = 16,
    in_chans: int = 3,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    mask_size: int = SQUARE,
    target: str = "pixels",
    nbins: int = 9,
    hog_bias: bool = False,
    norm_pix: bool = False,
    vocab: int = 512,
    drop_path: float = 0.0,
    reference_quirks: bool = False,
    seed: int = 0,
) -> MaskedImageModel:
    """SimMIM on a ViT, which is BEiT's (mim/beit.py) but for narrower draws of the first weights.

    Args:
        mask_size, target, nbins, hog_bias, norm_pix, vocab, seed: As in `simmim_swin`.
        drop_path: As in MaskedImageModel. Published: 0.1.
        reference_quirks: Changes nothing here: the ViT has no quirk that is switched.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    encoder = beit_encoder(image_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, cut=1.0)
    masking = hide_squares(encoder, mask_size)
    targets, error = pixel_shuffle_target(target, patch_size, in_chans, nbins, hog_bias, norm_pix, vocab, seed)
    head = TokenHead(embed_dim, encoder.grid, targets.dims[0], class_tokens=1)
    draw_convolution(head.pred)
    return MaskedImageModel(encoder, [head], targets, masking, error, drop_path)


def draw_convolution(layer: nn.Cell) -> None:
    """PyTorch's default for a convolution, which the authors keep for theirs: weight and bias by the inputs."""
    law = torch_default_init(layer.weight.size // len(layer.weight))
    for p in (layer.weight, layer.bias):
        p.set_data(initializer(law, p.shape).init_data())


for _name, _sizes in SWIN.items():
    register(f"simmim_{_name}", simmim_swin, _sizes)
for _name, _sizes in VIT.items():
    register(f"simmim_{_name}", simmim_vit, _sizes)

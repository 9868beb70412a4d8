"""LocalMIM presets: "Masked Image Modeling with Local Multi-Scale Reconstruction" (Wang et al., CVPR 2023).

Four taps, fine cells low and coarse cells high; the loss is the plain sum of their masked errors. Deviations from the
authors' code: none in the numbers; depth below 7 is refused, where theirs silently trains three decoders of four.
"""

from __future__ import annotations

from collections.abc import Sequence

from localmim.mim.cells import cell_pixels
from localmim.mim.decoders import Decoder
from localmim.mim.model import MaskedImageModel
from localmim.mim.targets import HogTarget, PixelTarget
from localmim.models.registry import register
from localmim.models.vit import VisionTransformer

MIN_DEPTH = 7


def default_taps(depth: int, scales: Sequence[float]) -> list[int]:
    """The published depth of each scale: blocks 1, 3, depth-3, depth-1 for 4, 2, 1, 1/2."""
    place = {4.0: 1, 2.0: 3, 1.0: depth - 3, 0.5: depth - 1}
    return [place[s] for s in scales]


def localmim_vit(
    image_size=224,
    patch_size: int = 16,
    in_chans: int = 3,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    taps: Sequence[int] | None = None,
    scales: Sequence[float] = (4, 2, 1, 0.5),
    decoder_dim: int = 256,
    decoder_depth: int = 1,
    decoder_heads: int = 8,
    target: str = "hog",
    nbins: int = 9,
    hog_bias: bool = False,
    norm_pix: bool = True,
    seed: int = 0,
) -> MaskedImageModel:
    """LocalMIM on a ViT.

    Args:
        taps: Blocks (from 0), ascending, one a scale; None: the published ones for `scales`.
        scales: Cells a patch side at each tap.
        target: "hog" or "pixels".
        seed: Of the HOG bias's draw, the only random number that is not a trained weight.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    scales = [float(s) for s in scales]
    if not scales:
        raise ValueError("scales is empty: name at least one of 4, 2, 1, 0.5")
    cells = [cell_pixels(patch_size, s) for s in scales]
    if depth < MIN_DEPTH:
        raise ValueError(
            f"LocalMIM needs an encoder of at least {MIN_DEPTH} blocks, got depth {depth}: "
            "its four taps 1, 3, depth-3, depth-1 would meet"
        )
    taps = default_taps(depth, scales) if taps is None else list(taps)
    if len(taps) != len(scales):
        raise ValueError(f"taps {taps} and scales {scales} must be of one length")
    if len(set(taps)) != len(taps) or taps != sorted(taps):
        raise ValueError(f"taps {taps} must ascend: give the scales in the order of their depth")
    if target == "hog":
        targets = HogTarget(cells, in_chans, nbins, hog_bias, seed)
    elif target == "pixels":
        targets = PixelTarget(cells, in_chans, norm_pix)
    else:
        raise ValueError(f"target {target!r} is none of 'hog', 'pixels'")
    encoder = VisionTransformer(image_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, tuple(taps))
    decoders = [
        Decoder(embed_dim, encoder.grid, s, d, decoder_dim, decoder_depth, decoder_heads, mlp_ratio)
        for s, d in zip(scales, targets.dims)
    ]
    for block in list(encoder.blocks)[taps[-1] + 1 :]:  # no loss reads them: without gradient, not even decayed
        for parameter in block.get_parameters():
            parameter.requires_grad = False
    return MaskedImageModel(encoder, decoders, targets)


@register
def localmim_vit_tiny_patch16_224(**kwargs) -> MaskedImageModel:
    """ViT-T/16: 192 wide, 12 blocks, 3 heads. Not in the paper."""
    return localmim_vit(**{"embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs})


@register
def localmim_vit_small_patch16_224(**kwargs) -> MaskedImageModel:
    """ViT-S/16: 384 wide, 12 blocks, 6 heads."""
    return localmim_vit(**{"embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs})


@register
def localmim_vit_base_patch16_224(**kwargs) -> MaskedImageModel:
    """ViT-B/16: 768 wide, 12 blocks, 12 heads."""
    return localmim_vit(**{"embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs})


@register
def localmim_vit_large_patch16_224(**kwargs) -> MaskedImageModel:
    """ViT-L/16: 1024 wide, 24 blocks, 16 heads."""
    return localmim_vit(**{"embed_dim": 1024, "depth": 24, "num_heads": 16, **kwargs})

"""LocalMIM presets: "Masked Image Modeling with Local Multi-Scale Reconstruction" (Wang et al., CVPR 2023).

Four taps, fine cells low and coarse cells high; the loss is the plain sum of their masked errors. Deviations from the
authors' code: on a ViT none in the numbers, but depth below 7 is refused, where theirs silently trains three decoders
of four. On a Swin `reference_quirks` decides (docs/quirks.md), and image sizes are free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from localmim.mim.cells import cell_pixels, check_scale
from localmim.mim.decoders import Decoder
from localmim.mim.masking import RandomMasking
from localmim.mim.model import MaskedImageModel
from localmim.mim.targets import build_target
from localmim.mim.unit_masking import UnitMasking
from localmim.models.registry import register
from localmim.models.sizes import SWIN, VIT
from localmim.models.swin import SwinTransformer, last_stage
from localmim.models.vit import VisionTransformer

MIN_DEPTH = 7


def default_taps(depth: int, scales: Sequence[float]) -> list[int]:
    """The published depth of each scale on a ViT: blocks 1, 3, depth-3, depth-1 for 4, 2, 1, 1/2."""
    place = {4.0: 1, 2.0: 3, 1.0: depth - 3, 0.5: depth - 1}
    return [place[s] for s in scales]


def checked(scales: Sequence[float], taps: Sequence[int] | None, default: Callable) -> tuple[list[float], list[int]]:
    """Scales as floats, and taps to go with them: `default(scales)` where none are given.

    Raises:
        ValueError: No scale, taps of another length or not ascending.
    """
    scales = [float(s) for s in scales]
    if not scales:
        raise ValueError("scales is empty: name at least one of 4, 2, 1, 0.5")
    for scale in scales:
        check_scale(scale)
    taps = default(scales) if taps is None else list(taps)
    if len(taps) != len(scales):
        raise ValueError(f"taps {taps} and scales {scales} must be of one length")
    if len(set(taps)) != len(taps) or taps != sorted(taps):
        raise ValueError(f"taps {taps} must ascend: give the scales in the order of their depth")
    return scales, taps


def freeze(cells) -> None:
    """What no loss reads is left without gradient, so that it is not even decayed."""
    for cell in cells:
        for parameter in cell.get_parameters():
            parameter.requires_grad = False


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
    isolated_gradients: bool = False,
    target: str = "hog",
    nbins: int = 9,
    hog_bias: bool = False,
    norm_pix: bool = True,
    vocab: int = 512,
    reference_quirks: bool = False,
    seed: int = 0,
) -> MaskedImageModel:
    """LocalMIM on a ViT.

    Args:
        taps: Blocks (from 0), ascending, one a scale; None: the published ones for `scales`.
        scales: Cells a patch side at each tap.
        isolated_gradients: Each segment that ends at a tap learns from its own decoder alone.
        target: "hog", "pixels" or "codebook".
        nbins, hog_bias: HOG's; norm_pix: of pixels; vocab: entries of the codebook.
        reference_quirks: Changes nothing here: the ViT has no quirk that is switched.
        seed: Of the HOG bias's draw, the only random number that is not a trained weight.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    if depth < MIN_DEPTH:
        raise ValueError(
            f"LocalMIM needs an encoder of at least {MIN_DEPTH} blocks, got depth {depth}: "
            "its four taps 1, 3, depth-3, depth-1 would meet"
        )
    scales, taps = checked(scales, taps, lambda scales: default_taps(depth, scales))
    cells = [cell_pixels(patch_size, s) for s in scales]
    targets, error = build_target(target, cells, in_chans, nbins, hog_bias, norm_pix, vocab, seed)
    encoder = VisionTransformer(
        image_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, tuple(taps), isolated_gradients
    )
    decoders = [
        Decoder(embed_dim, encoder.grid, s, d, decoder_dim, decoder_depth, decoder_heads, mlp_ratio)
        for s, d in zip(scales, targets.dims)
    ]
    freeze(list(encoder.blocks)[taps[-1] + 1 :])
    h, w = encoder.grid
    return MaskedImageModel(encoder, decoders, targets, partial(RandomMasking, h * w), error)


def localmim_swin(
    image_size=224,
    patch_size: int = 4,
    in_chans: int = 3,
    embed_dim: int = 128,
    depths: Sequence[int] = (2, 2, 18, 2),
    num_heads: Sequence[int] = (4, 8, 16, 32),
    window_size: int = 7,
    mlp_ratio: float = 4.0,
    taps: Sequence[int] | None = None,
    scales: Sequence[float] | None = None,
    decoder_dim: int = 128,
    decoder_depth: int = 1,
    decoder_heads: int = 4,
    isolated_gradients: bool = False,
    target: str = "hog",
    nbins: int = 18,
    hog_bias: bool = False,
    norm_pix: bool = True,
    vocab: int = 512,
    reference_quirks: bool = False,
    seed: int = 0,
) -> MaskedImageModel:
    """LocalMIM on a Swin.

    Args:
        taps: Stages (from 0), ascending, whose outputs after their merging are decoded; None: all.
        scales: Cells a token side at each tap; None: 1 at all. At 224 px the published cells are of 8, 16, 32, 32 px.
        decoder_dim: Width of the decoders; that of stage 0 has half of it.
        reference_quirks: Pre-train as the authors' code does (docs/quirks.md, Q1 to Q3).
        isolated_gradients, target, nbins, hog_bias, norm_pix, vocab, seed: As in `localmim_vit`.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    if isinstance(taps, int):
        raise ValueError(f"taps {taps} must be a list for a Swin, one number a stage")
    stages = last_stage(depths, num_heads, window_size) + 1
    taps = list(range(stages)) if taps is None else taps
    scales, taps = checked([1] * len(taps) if scales is None else scales, taps, list)
    encoder = SwinTransformer(
        image_size,
        patch_size,
        in_chans,
        embed_dim,
        depths,
        num_heads,
        window_size,
        mlp_ratio,
        tuple(taps),
        rows_first=reference_quirks,
        isolated=isolated_gradients,
    )
    cells = [cell_pixels(encoder.image_size[0] // grid[0], s) for grid, s in zip(encoder.tap_grids, scales)]
    targets, error = build_target(target, cells, in_chans, nbins, hog_bias, norm_pix, vocab, seed)
    decoders = []
    for k, tap in enumerate(taps):
        dim = decoder_dim // 2 if tap == 0 else decoder_dim
        sizes = encoder.tap_widths[k], encoder.tap_grids[k], scales[k], targets.dims[k]
        decoders.append(
            Decoder(*sizes, dim, decoder_depth, decoder_heads, mlp_ratio, class_token=False, linear_head=True)
        )
    freeze(list(encoder.layers)[taps[-1] + 1 :])
    return MaskedImageModel(encoder, decoders, targets, partial(UnitMasking, encoder), error)


for _name, _sizes in VIT.items():
    register(f"localmim_{_name}", localmim_vit, _sizes)
for _name, _sizes in SWIN.items():
    register(f"localmim_{_name}", localmim_swin, _sizes)

"""MaskFeat on a ViT: "Masked Feature Prediction for Self-Supervised Visual Pre-Training" (Wei et al., CVPR 2022).

Blocks of patches are replaced by a token, and one linear layer predicts the HOG of each: 2 x 2 histograms of 8 px, of
every channel, as the authors' code has them on images. `hog_window` 16 is mmpretrain's target. `reference_quirks`
(docs/quirks.md): masks may stop short, and biases in the blocks start at 0.02.
"""

from __future__ import annotations

from functools import partial

from localmim.mim.block_masking import BlockMasking
from localmim.mim.heads import TokenHead
from localmim.mim.init import draw, fill
from localmim.mim.losses import squared_error
from localmim.mim.model import MaskedImageModel
from localmim.mim.targets import HogTarget, build_target
from localmim.models.registry import register
from localmim.models.sizes import VIT
from localmim.models.vit import VisionTransformer


def maskfeat_vit(
    image_size=224,
    patch_size: int = 16,
    in_chans: int = 3,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    min_block: int | None = None,
    target: str = "hog",
    nbins: int = 9,
    hog_bias: bool = False,
    hog_cell: int = 8,
    hog_window: int = 0,
    norm_pix: bool = True,
    vocab: int = 512,
    reference_quirks: bool = False,
    seed: int = 0,
) -> MaskedImageModel:
    """MaskFeat on a ViT.

    Args:
        min_block: The least area of a hidden rectangle, in patches; None: a fifth of what is hidden.
        target: "hog", "pixels" or "codebook".
        hog_cell: Pixels a side of a histogram.
        hog_window: Pixels a side of a Gaussian that weighs magnitudes, repeated over the image; 0: all count alike.
        nbins, hog_bias, norm_pix, vocab, seed: As in `localmim_vit`.
        reference_quirks: Mask and begin as the authors' code does.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    if hog_cell < 1 or patch_size % hog_cell:
        raise ValueError(f"a patch of {patch_size} px does not divide into histograms of {hog_cell} px")
    sizes = image_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio
    encoder = VisionTransformer(*sizes, taps=(depth - 1,), mask_token=True, position="learned")
    if target == "hog":
        split = patch_size // hog_cell
        targets, error = HogTarget([patch_size], in_chans, nbins, hog_bias, seed, split, hog_window), squared_error
    else:
        targets, error = build_target(target, [patch_size], in_chans, nbins, hog_bias, norm_pix, vocab, seed)
    head = TokenHead(embed_dim, encoder.grid, targets.dims[0], class_tokens=1)
    draw(encoder)
    draw(head)
    if reference_quirks:
        for block in encoder.blocks:
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                fill(layer.bias, 0.02)
            fill(block.norm1.beta, 0.02)
            fill(block.norm2.beta, 0.02)
    rule = "slowfast" if reference_quirks else "exact"
    masking = partial(BlockMasking, encoder.grid, min_block=min_block, rule=rule)
    return MaskedImageModel(encoder, [head], targets, masking, error)


for _name, _sizes in VIT.items():
    register(f"maskfeat_{_name}", maskfeat_vit, _sizes)

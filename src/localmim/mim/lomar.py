"""LoMaR presets: "Efficient Self-supervised Vision Pretraining with Local Masked Reconstruction" (Chen et al., 2022).

The encoder sees small windows, each by itself, hidden patches as mask tokens; a linear layer predicts these from their
own tokens. Attention knows places by iRPE's contextual product alone, so the same weights serve any image size, and the
cost follows the number of windows. With codebook ids for a target it is the paper's transplant into BEiT.

Deviations: the paper's head is an "MLP", the authors' code has one linear layer, and so have we. Windows and images are
paired as the paper describes it (docs/quirks.md, L1).
"""

from __future__ import annotations

from functools import partial

from localmim.mim.heads import TokenHead
from localmim.mim.model import MaskedImageModel
from localmim.mim.targets import build_target
from localmim.mim.window_masking import WindowMasking
from localmim.models.registry import register
from localmim.models.sizes import VIT
from localmim.models.vit import VisionTransformer


def lomar_vit(
    image_size=224,
    patch_size: int = 16,
    in_chans: int = 3,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    window: int = 7,
    views: int = 4,
    target: str = "pixels",
    nbins: int = 9,
    hog_bias: bool = False,
    norm_pix: bool = True,
    vocab: int = 512,
    reference_quirks: bool = False,
    seed: int = 0,
) -> MaskedImageModel:
    """LoMaR on a ViT.

    Args:
        window: Patches a side of a window.
        views: Windows of an image; published: 4 at 224 px, 6 at 384, 9 at 448.
        target, nbins, hog_bias, norm_pix, vocab, seed: As in `localmim_vit`.
        reference_quirks: One draw of windows a batch, paired with images as in the authors' code.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    encoder = VisionTransformer(
        image_size,
        patch_size,
        in_chans,
        embed_dim,
        depth,
        num_heads,
        mlp_ratio,
        taps=(depth - 1,),
        mask_token=True,
        window=window,
        position="none",
        relative="contextual",
    )
    targets, error = build_target(target, [patch_size], in_chans, nbins, hog_bias, norm_pix, vocab, seed)
    head = TokenHead(embed_dim, encoder.grid, targets.dims[0], encoder.class_tokens)
    masking = partial(WindowMasking, encoder.grid, window, views, reference_quirks)
    return MaskedImageModel(encoder, [head], targets, masking, error)


for _name, _sizes in VIT.items():
    register(f"lomar_{_name}", lomar_vit, _sizes)

"""BEiT on a ViT: "BEiT: BERT Pre-Training of Image Transformers" (Bao et al., ICLR 2022), version 1.

Blocks of patches are replaced by a token, and one linear layer predicts the codebook's id of each. Ids come from any
tokenizer (mim/tokenizers.py); DALL-E's, which the authors use, is not here. Tokens know their places by a table of
relative positions that all blocks share. Queries, keys and values have one bias, whose key part starts at 0 and cannot
change a softmax; the references have none for keys. `reference_quirks`: masks are mmpretrain's, which never reach the
last row and column (docs/quirks.md). The references pre-train with stochastic depth, `drop_path` of 0.1.
"""

from __future__ import annotations

from functools import partial

from localmim.mim.block_masking import BlockMasking
from localmim.mim.heads import TokenHead
from localmim.mim.init import draw, fill, shrink_branches
from localmim.mim.losses import cross_entropy
from localmim.mim.model import MaskedImageModel
from localmim.mim.targets import CodebookTarget
from localmim.models.registry import register
from localmim.models.sizes import VIT
from localmim.models.vit import VisionTransformer

LAYER_SCALE = 0.1


def beit_encoder(
    image_size, patch_size: int, in_chans: int, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float, cut=None
) -> VisionTransformer:
    """BEiT's encoder, which is SimMIM's on a ViT as well, with its start of the weights.

    Args:
        cut: Of the normal distribution that weights are drawn from (mim/init.py).

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
        position="none",
        relative="shared",
        layer_scale=LAYER_SCALE,
    )
    encoder.no_decay = ("cls_token",)
    draw(encoder, cut=cut)
    fill(encoder.patch_embed.bias, 0.0)
    shrink_branches(encoder.blocks)
    return encoder


def beit_vit(
    image_size=224,
    patch_size: int = 16,
    in_chans: int = 3,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    min_block: int | None = None,
    target: str = "codebook",
    nbins: int = 9,
    hog_bias: bool = False,
    norm_pix: bool = True,
    vocab: int = 512,
    drop_path: float = 0.0,
    reference_quirks: bool = False,
    seed: int = 0,
) -> MaskedImageModel:
    """BEiT on a ViT.

    Args:
        min_block: The least area of a hidden rectangle, in patches; None: a fifth of what is hidden. Published: 16.
        target: "codebook".
        nbins, hog_bias, norm_pix, seed: Change nothing: they are of other targets.
        vocab: Entries of the codebook. Published: 8192.
        drop_path: As in MaskedImageModel. Published: 0.1.
        reference_quirks: Mask as mmpretrain does.

    Raises:
        ValueError: Another target, or sizes that do not fit together.
    """
    if target != "codebook":
        raise ValueError(f"target is {target!r}: BEiT predicts ids of a codebook, expected 'codebook'")
    encoder = beit_encoder(image_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio)
    head = TokenHead(embed_dim, encoder.grid, vocab, class_tokens=1)
    draw(head)
    rule = "mmpretrain" if reference_quirks else "exact"
    masking = partial(BlockMasking, encoder.grid, min_block=min_block, rule=rule)
    return MaskedImageModel(encoder, [head], CodebookTarget(1, vocab), masking, cross_entropy, drop_path)


for _name, _sizes in VIT.items():
    register(f"beit_{_name}", beit_vit, _sizes)

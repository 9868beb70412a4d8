"""MAE presets: "Masked Autoencoders Are Scalable Vision Learners" (He et al., CVPR 2022).

The encoder sees visible patches; a decoder of eight blocks predicts the normalised pixels of the rest from its last
tokens. No deviation in the numbers.
"""

from __future__ import annotations

from functools import partial

from localmim.mim.decoders import Decoder
from localmim.mim.masking import RandomMasking
from localmim.mim.model import MaskedImageModel
from localmim.mim.targets import build_target
from localmim.models.registry import register
from localmim.models.sizes import VIT
from localmim.models.vit import VisionTransformer


def mae_vit(
    image_size=224,
    patch_size: int = 16,
    in_chans: int = 3,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    decoder_dim: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
    target: str = "pixels",
    nbins: int = 9,
    hog_bias: bool = False,
    norm_pix: bool = True,
    vocab: int = 512,
    reference_quirks: bool = False,
    seed: int = 0,
) -> MaskedImageModel:
    """MAE on a ViT.

    Args:
        target, nbins, hog_bias, norm_pix, vocab, seed: As in `localmim_vit`.
        reference_quirks: Changes nothing here.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    encoder = VisionTransformer(
        image_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, taps=(depth - 1,)
    )
    targets, error = build_target(target, [patch_size], in_chans, nbins, hog_bias, norm_pix, vocab, seed)
    sizes = decoder_dim, decoder_depth, decoder_heads, mlp_ratio
    decoder = Decoder(embed_dim, encoder.grid, 1.0, targets.dims[0], *sizes, linear_head=True)
    h, w = encoder.grid
    return MaskedImageModel(encoder, [decoder], targets, partial(RandomMasking, h * w), error)


for _name, _sizes in VIT.items():
    register(f"mae_{_name}", mae_vit, _sizes)

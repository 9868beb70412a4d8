"""ConvMAE and FastConvMAE presets.

ConvMAE: Gao et al., "MCMAE: Masked Convolution Meets Masked Autoencoders" (NeurIPS 2022): patches of the coarsest stage
are hidden, convolutions are masked, three stages are fused, and MAE's decoder predicts pixels. FastConvMAE (the same
authors) trains on four masks of each image that see every patch once: the same model under another masking.

Deviations from the authors' code: none in the numbers; image sizes are free, and what is hidden is not computed
(models/convvit.py). EasyCV's FastConvMAE computes the same; it pre-trains with stochastic depth, `drop_path` of 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from localmim.mim.complementary_masking import ComplementaryMasking
from localmim.mim.decoders import Decoder
from localmim.mim.masking import Masking, RandomMasking
from localmim.mim.model import MaskedImageModel
from localmim.mim.reconstructors import Branch, MixtureModel, MixtureTarget, Trunk
from localmim.mim.targets import build_target
from localmim.models.convvit import ConvViT, check_sizes
from localmim.models.registry import register
from localmim.models.sizes import CONVVIT


def convmae(
    image_size=224,
    in_chans: int = 3,
    embed_dims: Sequence[int] = (256, 384, 768),
    depths: Sequence[int] = (2, 2, 11),
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
    drop_path: float = 0.0,
    reference_quirks: bool = False,
    seed: int = 0,
    masking: Callable[[int, float, int], Masking] = RandomMasking,
) -> MaskedImageModel:
    """ConvMAE.

    Args:
        embed_dims, depths: Of the three stages, see ConvViT.
        target: "pixels", "hog" or "codebook", of 16 px cells.
        nbins, hog_bias: HOG's; norm_pix: of pixels; vocab: entries of the codebook.
        drop_path: As in MaskedImageModel. Published: 0; EasyCV's FastConvMAE: 0.1.
        reference_quirks: Changes nothing here: what differs from the authors' code does not change a number.
        seed: Of the HOG bias's draw, the only random number that is not a trained weight.
        masking: (patches, ratio, seed) -> what draws the masks.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    check_sizes(embed_dims, depths, num_heads)
    encoder = ConvViT(image_size, in_chans, tuple(embed_dims), tuple(depths), num_heads, mlp_ratio, fused=True)
    targets, error = build_target(target, [encoder.patch_size], in_chans, nbins, hog_bias, norm_pix, vocab, seed)
    decoder = Decoder(
        encoder.embed_dim,
        encoder.grid,
        1.0,
        targets.dims[0],
        decoder_dim,
        decoder_depth,
        decoder_heads,
        mlp_ratio,
        class_token=False,
        linear_head=True,
    )
    h, w = encoder.grid
    return MaskedImageModel(encoder, [decoder], targets, partial(masking, h * w), error, drop_path)


fastconvmae = partial(convmae, masking=ComplementaryMasking)  # FastConvMAE differs in its masks alone


def fastconvmae_mixture(
    image_size=224,
    in_chans: int = 3,
    embed_dims: Sequence[int] = (256, 384, 768),
    depths: Sequence[int] = (2, 2, 11),
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    decoder_dim: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
    branch_depth: int = 1,
    teacher: bool = True,
    teacher_decay: float = 0.999,
    feature_dims: Sequence[int] = (),
    target: str = "pixels",
    nbins: int = 9,
    hog_bias: bool = False,
    norm_pix: bool = True,
    vocab: int = 512,
    reference_quirks: bool = False,
    seed: int = 0,
) -> MixtureModel:
    """FastConvMAE with a mixture of reconstructors, as far as it has been described (mim/reconstructors.py).

    Args:
        decoder_depth: Blocks from the encoder to a prediction, of which the last `branch_depth` are each target's own.
        teacher: Whether a moving average of the encoder is a target; teacher_decay: of this average, an update.
        feature_dims: Widths of the features of frozen networks, which the model takes as data after the mask.
        target: "pixels" or "hog"; the other arguments are those of `convmae`.

    Raises:
        ValueError: Sizes that do not fit together.
    """
    check_sizes(embed_dims, depths, num_heads)
    if target == "codebook":
        raise ValueError("a mixture of reconstructors regresses features: target is 'pixels' or 'hog'")
    sizes = (image_size, in_chans, tuple(embed_dims), tuple(depths), num_heads, mlp_ratio)
    encoder = ConvViT(*sizes, fused=True)
    follower = ConvViT(*sizes, fused=True) if teacher else None
    own, _ = build_target(target, [encoder.patch_size], in_chans, nbins, hog_bias, norm_pix, vocab, seed)
    targets = MixtureTarget(own, follower, feature_dims, encoder.grid)
    shared = decoder_depth - branch_depth
    if shared < 0:
        raise ValueError(f"branch_depth {branch_depth} is more than decoder_depth {decoder_depth}")
    trunk = Trunk(encoder.embed_dim, encoder.grid, decoder_dim, shared, decoder_heads, mlp_ratio)
    branches = [
        Branch(encoder.grid, decoder_dim, branch_depth, decoder_heads, dim, mlp_ratio, trunk if k == 0 else None)
        for k, dim in enumerate(targets.dims)
    ]
    h, w = encoder.grid
    return MixtureModel(encoder, branches, targets, partial(ComplementaryMasking, h * w), teacher_decay)


for _name, _sizes in CONVVIT.items():
    register(f"convmae_{_name}", convmae, _sizes)
    register(f"fastconvmae_{_name}", fastconvmae, _sizes)
    register(f"fastconvmae_mixture_{_name}", fastconvmae_mixture, _sizes)

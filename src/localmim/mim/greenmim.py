"""GreenMIM presets: "Green Hierarchical Vision Transformer for Masked Image Modeling" (Huang et al., NeurIPS 2022).

A Swin sees visible tokens only, and MAE's decoder at its last stage predicts normalised pixels of hidden 32 px squares.
Deviations from the authors' code: windows are packed in another way (the result is equal), image sizes are free, and
`reference_quirks` decides the order in which the decoder takes the visible tokens (docs/quirks.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np

from localmim.mim.decoders import Decoder
from localmim.mim.masking import mask_from_shuffle
from localmim.mim.model import MaskedImageModel
from localmim.mim.targets import build_target
from localmim.mim.unit_masking import UnitMask, UnitMasking
from localmim.models.registry import register
from localmim.models.sizes import SWIN
from localmim.models.swin import SwinTransformer, last_stage


class ShuffledUnitMasking(UnitMasking):
    """The authors' masks: the decoder takes the visible tokens for those in the order of the noise.

    They come row by row, so each one gets another's position code. What is hidden is the same.
    """

    def of_order(self, order: np.ndarray, batch: int) -> UnitMask:
        """As of UnitMasking, for an encoder whose only tap is the last stage."""
        tap = mask_from_shuffle(np.repeat(order[None], batch, axis=0), self.keep)
        return dataclasses.replace(super().of_order(order, batch), taps=(tap,))


def greenmim_swin(
    image_size=224,
    patch_size: int = 4,
    in_chans: int = 3,
    embed_dim: int = 128,
    depths: Sequence[int] = (2, 2, 18, 2),
    num_heads: Sequence[int] = (4, 8, 16, 32),
    window_size: int = 7,
    mlp_ratio: float = 4.0,
    decoder_dim: int = 512,
    decoder_depth: int = 1,
    decoder_heads: int = 16,
    target: str = "pixels",
    nbins: int = 9,
    hog_bias: bool = False,
    norm_pix: bool = True,
    vocab: int = 512,
    reference_quirks: bool = False,
    seed: int = 0,
) -> MaskedImageModel:
    """GreenMIM on a Swin.

    Args:
        target, nbins, hog_bias, norm_pix, vocab, seed: As in `localmim_vit`.
        reference_quirks: Visible tokens land on one another's places in the decoder, as in the authors' code.

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
    )
    cells = [encoder.mask_unit]
    targets, error = build_target(target, cells, in_chans, nbins, hog_bias, norm_pix, vocab, seed)
    sizes = encoder.embed_dim, encoder.tap_grids[0], 1.0, targets.dims[0]
    decoder = Decoder(*sizes, decoder_dim, decoder_depth, decoder_heads, mlp_ratio, class_token=False, linear_head=True)
    masking = ShuffledUnitMasking if reference_quirks else UnitMasking
    return MaskedImageModel(encoder, [decoder], targets, partial(masking, encoder), error)


for _name, _sizes in SWIN.items():
    register(f"greenmim_{_name}", greenmim_swin, _sizes)

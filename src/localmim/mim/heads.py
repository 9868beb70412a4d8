"""Heads for encoders that see mask tokens: no decoder, one linear layer from a token to what is predicted for it.

A hidden token has been through the encoder already, so its own output is enough (SimMIM, MaskFeat, BEiT, LoMaR).
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from localmim.mim.cells import target_rows
from localmim.models.layers import Linear, take_rows


class TokenHead(nn.Cell):
    """Predicts hidden tokens, each by a linear layer from its own latent.

    Args:
        encoder_dim: Width of the tap.
        grid: The tap's tokens (h, w).
        out_dim: Values D of a token's target.
        class_tokens: Tokens before those of patches.
    """

    scale = 1.0

    def __init__(self, encoder_dim: int, grid: tuple[int, int], out_dim: int, class_tokens: int = 0):
        super().__init__()
        self.grid, self.class_tokens = grid, class_tokens
        self.pred = Linear(encoder_dim, out_dim)

    def construct(self, latent: Tensor, rows: Tensor, ids_mask: Tensor) -> Tensor:
        """Latents [B', n + N, D_enc] of images or views -> [B', M, D].

        Args:
            rows: [B', M] place of each predicted token among the N, or -1 where there is none.
            ids_mask: [B', M] the patch of the image that it is.
        """
        return self.pred(take_rows(latent, ops.maximum(rows, 0) + self.class_tokens))

    def expected(self, target: Tensor, rows: Tensor, ids_mask: Tensor):
        """What the predictions should be, out of a target [B, h, w, D], and the weight of each row: 0 where none is."""
        wanted = target_rows(target, self.scale, ops.maximum(ids_mask, 0))
        return wanted, (ids_mask >= 0).astype(ms.float32)

"""The vision transformer encoder, one class for pre-training (visible tokens, taps) and downstream (all tokens).

Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021), with MAE's fixed sine-cosine position code.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops

from localmim.models.layers import (
    Block,
    LayerNorm,
    PatchEmbed,
    parameter,
    sincos_position_code,
    to_pair,
    token_parameter,
)


class VisionTransformer(nn.Cell):
    """ViT encoder with a class token and taps.

    Args:
        image_size: Pixels, one number or (height, width); each a multiple of `patch_size`.
        patch_size: Pixels.
        in_chans: Image channels.
        embed_dim: Width D.
        depth: Blocks.
        num_heads: Attention heads.
        taps: Blocks (from 0) whose outputs are read; each has its own LayerNorm.
        isolated: No gradient flows from one tap's segment into the one below.

    Raises:
        ValueError: Sizes that do not divide, or a tap outside the depth.
    """

    no_decay: tuple[str, ...] = ()  # in pre-training tokens decay, as the authors have it (docs/quirks.md, Q11)
    class_tokens = 1  # tokens before those of the patches

    def __init__(
        self,
        image_size=224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        taps: tuple[int, ...] = (),
        isolated: bool = False,
    ):
        super().__init__()
        H, W = to_pair(image_size)
        if min(H, W, patch_size) < 1 or H % patch_size or W % patch_size:
            raise ValueError(f"image_size {H}x{W} is not a multiple of patch_size {patch_size}")
        if list(taps) != sorted(set(taps)) or any(not 0 <= t < depth for t in taps):
            raise ValueError(f"taps {list(taps)} must be ascending block indices from 0 to {depth - 1}")
        self.image_size, self.patch_size, self.in_chans = (H, W), patch_size, in_chans
        self.grid = (H // patch_size, W // patch_size)
        self.mask_grid, self.mask_unit, self.mask_inputs = self.grid, patch_size, 3
        self.embed_dim, self.depth, self.taps, self.isolated = embed_dim, depth, tuple(taps), isolated
        self.tap_grids, self.tap_widths = [self.grid] * len(taps), [embed_dim] * len(taps)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = token_parameter(embed_dim)
        code = np.concatenate([np.zeros((1, embed_dim), np.float32), sincos_position_code(embed_dim, self.grid)])
        self.pos_embed = parameter(code[None], requires_grad=False)  # [1, 1+L, D], zero for the class token
        self.blocks = nn.CellList([Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.tap_norms = nn.CellList([LayerNorm(embed_dim) for _ in taps])

    def tap_mask(self, mask: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
        """ids_keep, ids_mask, ids_restore at the grid of tap k: the same at all."""
        return mask

    def tap_name(self, k: int) -> str:
        """Tap k in words."""
        return f"block {self.taps[k] + 1}"

    def idle(self) -> str:
        """What lies above the last tap, which no loss reads, in words; empty when nothing does."""
        count = self.depth - 1 - self.taps[-1]
        return f"the top {count} of {self.depth} blocks" if count else ""

    def embed(self, images: Tensor, *mask: Tensor) -> Tensor:
        """images [B, C, H, W], a mask's arrays -> tokens with position code [B, 1+K, D], class token first."""
        codes = self.pos_embed[0, 1:]  # [L, D]
        if mask:
            x = self.patch_embed(images, mask[0]) + ops.gather(codes, mask[0], 0)  # [B, K, D]
        else:
            x = self.patch_embed(images) + codes
        first = self.cls_token + self.pos_embed[:, :1]  # [1, 1, D]
        ones = ops.ones_like(images[:, 0, :1, :1])  # [B, 1, 1]: broadcast_to an open batch size has no form in ONNX
        return ops.concat((ones * first, x), 1)

    def construct(self, images: Tensor, *mask: Tensor) -> list[Tensor]:
        """Normed tokens at each tap, class token first: a list of [B, 1+K, D]. Blocks above the last tap do not run.

        Args:
            mask: The arrays of mim/masking.py; none: all patches are visible.
        """
        x = self.embed(images, *mask)
        latents = []
        for i in range(self.taps[-1] + 1):
            x = self.blocks[i](x)
            if i in self.taps:
                latents.append(self.tap_norms[len(latents)](x))
                if self.isolated:
                    x = ops.stop_gradient(x)
        return latents

    def named_outputs(self, images: Tensor, *mask: Tensor):
        """Names and values along the way, for finding errors; not in a graph."""
        yield "embed", self.embed(images, *mask)
        for i, x in enumerate(self.block_outputs(images, *mask)):
            yield f"blocks.{i}", x

    def block_outputs(self, images: Tensor, *mask: Tensor) -> list[Tensor]:
        """The un-normed output of every block, a list of `depth` tensors [B, 1+K, D]."""
        x = self.embed(images, *mask)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs

    def tokens(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """Whole images: tokens after the top tap's block (without taps the last one), [B, 1+L, D], class token first.

        No LayerNorm: the taps' norms belong to pre-training.

        Args:
            drop: [depth, 2, B], factors of stochastic depth (training/drop_path.py).
        """
        x = self.embed(images)
        for i in range(self.taps[-1] + 1 if self.taps else self.depth):
            x = self.blocks[i](x, 0, None if drop is None else drop[i])
        return x

    def features(self, images: Tensor) -> Tensor:
        """Mean of the patch tokens, every patch visible, no LayerNorm: [B, C, H, W] -> [B, D]."""
        return self.tokens(images)[:, 1:].mean(axis=1)

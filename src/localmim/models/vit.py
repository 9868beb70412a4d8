"""The vision transformer encoder, one class for pre-training (with masks and taps) and downstream (all tokens).

Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021), with MAE's fixed sine-cosine position code. What
methods vary is chosen by arguments: what becomes of hidden patches, how tokens know their place, and layer scale.
"""

from __future__ import annotations

from typing import Literal

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import TruncatedNormal

from localmim.models.layers import (
    Attended,
    Block,
    LayerNorm,
    PatchEmbed,
    parameter,
    replace_tokens,
    sincos_position_code,
    to_pair,
    token_parameter,
)
from localmim.models.relative import ContextualBias, TableBias, buckets, offset_classes

Position = Literal["fixed", "learned", "none"]
Relative = Literal["none", "shared", "block", "contextual"]


@ops.constexpr
def relation_classes(contextual: bool, grid: tuple[int, int]) -> Tensor:
    """The class of each pair of tokens as a constant of a graph."""
    return Tensor(buckets(grid) if contextual else offset_classes(grid))


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
        mask_token: Hidden patches are replaced by a learned token. Else they are left out.
        window: With `mask_token`: the encoder sees windows of so many patches a side, each by itself, instead of the
            whole image (LoMaR). Downstream it sees whole images all the same.
        position: Code of a patch's place that is added to its embedding: fixed, learned or none.
        relative: What attention adds for relative places: "shared", a table that all blocks share (BEiT); "block", a
            table a block; "contextual", iRPE's product with the query, a table a block, for any grid.
        layer_scale: Start of learned factors of each block's branches; None: none.

    Raises:
        ValueError: Sizes that do not divide, or a tap outside the depth.
    """

    no_decay: tuple[str, ...] = ()  # in pre-training tokens decay, as the authors have it (docs/quirks.md, Q11)
    class_tokens = 1  # tokens before those of the patches
    shared_blocks = 0  # first blocks that drop all views of an image together (training/drop_path.py)

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
        mask_token: bool = False,
        window: int | None = None,
        position: Position = "fixed",
        relative: Relative = "none",
        layer_scale: float | None = None,
    ):
        super().__init__()
        if not isinstance(num_heads, int):
            raise ValueError(f"num_heads {num_heads} must be one number for a ViT")
        if depth < 1:
            raise ValueError(f"depth is {depth}, expected at least 1")
        H, W = to_pair(image_size)
        if min(H, W, patch_size) < 1 or H % patch_size or W % patch_size:
            raise ValueError(f"image_size {H}x{W} is not a multiple of patch_size {patch_size}")
        if list(taps) != sorted(set(taps)) or any(not 0 <= t < depth for t in taps):
            raise ValueError(f"taps {list(taps)} must be ascending block indices from 0 to {depth - 1}")
        self.image_size, self.patch_size, self.in_chans = (H, W), patch_size, in_chans
        self.grid = (H // patch_size, W // patch_size)
        if window is not None and not (mask_token and 1 <= window <= min(self.grid)):
            raise ValueError(f"window {window} must lie between 1 and the {min(self.grid)} patches of a side")
        self.window = window
        self.mask_grid, self.mask_unit = self.grid, patch_size
        self.mask_inputs = 4 if window else 2 if mask_token else 3
        self.embed_dim, self.depth, self.taps, self.isolated = embed_dim, depth, tuple(taps), isolated
        self.trained_depth = taps[-1] + 1 if taps else depth  # blocks above the top tap are not trained
        self.tap_grids, self.tap_widths = [self.grid] * len(taps), [embed_dim] * len(taps)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = token_parameter(embed_dim)
        self.mask_token = token_parameter(embed_dim) if mask_token else None
        self.pos_embed = None
        if position == "fixed":
            code = np.concatenate([np.zeros((1, embed_dim), np.float32), sincos_position_code(embed_dim, self.grid)])
            self.pos_embed = parameter(code[None], requires_grad=False)  # [1, 1+L, D], zero for the class token
        elif position == "learned":
            self.pos_embed = parameter(TruncatedNormal(0.02), (1, 1 + self.grid[0] * self.grid[1], embed_dim))
        self.relative_kind = relative
        self.relative = TableBias(self.grid, num_heads) if relative == "shared" else None
        self.blocks = nn.CellList(
            [Block(embed_dim, num_heads, mlp_ratio, self._own_relative(num_heads), layer_scale) for _ in range(depth)]
        )
        self.tap_norms = nn.CellList([LayerNorm(embed_dim) for _ in taps])

    def _own_relative(self, num_heads: int) -> nn.Cell | None:
        """What a block's attention adds by itself."""
        if self.relative_kind == "block":
            return TableBias(self.grid, num_heads)
        return ContextualBias(self.embed_dim // num_heads) if self.relative_kind == "contextual" else None

    def relation(self, grid: tuple[int, int]) -> Tensor | None:
        """What each block is told about pairs of tokens on a grid: their classes, the shared bias, or nothing."""
        if self.relative_kind == "none":
            return None
        classes = relation_classes(self.relative_kind == "contextual", grid)
        return classes if self.relative is None else self.relative(None, classes)

    def tap_mask(self, mask: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
        """What decoder k gets, the same at all taps.

        ids_keep, ids_mask, ids_restore where hidden patches are left out; else the places of hidden tokens in what the
        encoder sees, and their patches.
        """
        if self.window:
            return mask[2], mask[3]
        if self.mask_token is not None:
            return mask[1], mask[1]
        return mask

    def tap_name(self, k: int) -> str:
        """Tap k in words."""
        return f"block {self.taps[k] + 1}"

    def idle(self) -> str:
        """What lies above the last tap, which no loss reads, in words; empty when nothing does."""
        count = self.depth - 1 - self.taps[-1]
        return f"the top {count} of {self.depth} blocks" if count else ""

    def embed(self, images: Tensor, *mask: Tensor) -> Tensor:
        """images [B, C, H, W], a mask's arrays -> tokens with position code [B, 1+K, D], class token first.

        Of windows [B*V, 1+K, D], the V windows of an image side by side.
        """
        first, place = self.cls_token, None  # [1, 1, D]
        if self.window and mask:
            x = self.patch_embed(images, mask[0])  # [B, V*K, D]
            x = replace_tokens(x.reshape(mask[1].shape + (-1,)), mask[1], self.mask_token)  # [B*V, K, D]
        elif self.mask_token is not None and mask:
            x = replace_tokens(self.patch_embed(images), mask[0], self.mask_token)  # [B, L, D]
        elif mask:
            place = mask[0]
            x = self.patch_embed(images, place)  # [B, K, D]
        else:
            x = self.patch_embed(images)
        x = x.astype(ms.float32)  # the residual stream, whatever the products' precision
        if self.pos_embed is not None:
            codes = self.pos_embed.reshape(-1, self.embed_dim)  # [1+L, D]; slices of three dimensions are slow copies
            x = x + (codes[1:] if place is None else ops.gather(codes, place + 1, 0))
            first = first + codes[:1]
        ones = ops.ones_like(ops.stop_gradient(x[:, :1, :1]))  # broadcast_to an open batch size has no form in ONNX
        return ops.concat((ones * first, x), 1)

    def seen_grid(self, mask: tuple[Tensor, ...]) -> tuple[int, int]:
        """Grid of the patches that a block sees, where it sees a whole one."""
        return (self.window, self.window) if self.window and mask else self.grid

    def construct(self, images: Tensor, *mask: Tensor) -> list[Tensor]:
        """Normed tokens at each tap, class token first: a list of [B, 1+K, D]. Blocks above the last tap do not run.

        Args:
            mask: The arrays of a mask (mim/masking.py and its neighbours); none: all patches are visible.
        """
        return self.latents(images, mask)

    def latents(self, images: Tensor, mask: tuple[Tensor, ...], drop: Tensor | None = None) -> list[Tensor]:
        """As `construct`.

        Args:
            drop: [depth, 2, rows], factors of stochastic depth (training/drop_path.py); windows are rows of their own.
        """
        x = self.embed(images, *mask)
        relation = self.relation(self.seen_grid(mask))
        latents = []
        for i in range(self.taps[-1] + 1):
            x = self.blocks[i](x, 0, None if drop is None else drop[i], relation)
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
        relation = self.relation(self.seen_grid(mask))
        outputs = []
        for block in self.blocks:
            x = block(x, 0, None, relation)
            outputs.append(x)
        return outputs

    def tokens(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """Whole images: tokens after the top tap's block (without taps the last one), [B, 1+L, D], class token first.

        No LayerNorm: the taps' norms belong to pre-training.

        Args:
            drop: [depth, 2, B], factors of stochastic depth (training/drop_path.py).
        """
        x = self.embed(images)
        relation = self.relation(self.grid)
        for i in range(self.trained_depth):
            x = self.blocks[i](x, 0, None if drop is None else drop[i], relation)
        return x

    def attention(self, images: Tensor) -> list[Tensor]:
        """Whole images: what each trained block's queries attend to, float32 [B, 1, nh, 1+L, 1+L] each."""
        x = self.embed(images)
        relation = self.relation(self.grid)
        weights = []
        for i in range(self.trained_depth):
            block = self.blocks[i]
            qkv = block.project(x)
            weights.append(block.attn.weights(qkv, relation).expand_dims(1))
            x = block.attend(x, qkv, 0, None, relation)
        return weights

    def attended(self) -> list[Attended]:
        """What the rows and columns of `attention` stand for, the same in all blocks."""
        names = [f"block {i + 1}" for i in range(self.trained_depth)]
        return [Attended.at_once(name, self.grid, self.class_tokens) for name in names]

    def features(self, images: Tensor) -> Tensor:
        """Mean of the patch tokens, every patch visible, no LayerNorm: [B, C, H, W] -> [B, D]."""
        return self.tokens(images)[:, 1:].mean(axis=1)

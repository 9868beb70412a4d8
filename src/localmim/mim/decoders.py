"""The decoder of encoders that see visible patches only: a small transformer over all patches, then a head.

LocalMIM has one at each tap, a block with a rescaling head (Wang et al., CVPR 2023, section 3); MAE, GreenMIM and
ConvMAE have one at the top, of up to eight blocks with a linear head.

Equal to the authors' decoder where the loss reads it, with less work:

* Attention does not care about the order of tokens, so they stay as (class, visible, hidden) and only the position code
  is gathered; nothing is put back in image order first. (Pyramids have no class token.)
* A hidden token is the mask token plus its position code: the same L rows in every image. They pass the first block's
  norm and projection once a batch, not once an image.
* The last block computes rows of hidden patches only (all patches at scale 1/2, whose cells mix hidden and visible).
* Transposed convolutions with kernel = stride are matrix products, and two linear layers in a row are one: their
  weights are multiplied first.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from localmim.mim.cells import check_grid, coarse_weights, quad_ids, target_rows
from localmim.models.layers import (
    Block,
    LayerNorm,
    Linear,
    Project,
    parameter,
    sincos_position_code,
    take_rows,
    token_parameter,
    torch_default_init,
    without_first,
)
from localmim.models.operators import Gelu


class Conv(nn.Cell):
    """Weights of a 1x1 convolution [out, in, 1, 1] or a transposed 2x2 one [in, out, 2, 2], PyTorch's default init.

    It has no forward pass of its own: heads read the weights as matrices.
    """

    def __init__(self, in_dim: int, out_dim: int, upsample: bool = False):
        super().__init__()
        shape = (in_dim, out_dim, 2, 2) if upsample else (out_dim, in_dim, 1, 1)
        init = torch_default_init(out_dim * 4 if upsample else in_dim)  # PyTorch takes dim 1 x kernel as the fan-in
        self.weight = parameter(init, shape)
        self.bias = parameter(init, (out_dim,))

    def as_linear(self) -> tuple[Tensor, Tensor]:
        """1x1: weight [out, in], bias [out]."""
        return self.weight[:, :, 0, 0], self.bias

    def as_quads(self) -> tuple[Tensor, Tensor]:
        """2x2 transposed: weight [4, out, in] and bias [1, out], the four positions row-major."""
        I, O = self.weight.shape[:2]
        return self.weight.transpose(2, 3, 1, 0).reshape(4, O, I), self.bias.reshape(1, O)


def after_quads(quads: tuple[Tensor, Tensor], linear: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution after a transposed one, as one matrix: weight [4*out, in], bias [4*out]."""
    (Q, b), (W, c) = quads, linear
    weight = ops.matmul(W, Q)  # [4, out, in]
    bias = ops.matmul(b, W.T) + c  # [1, out]
    return weight.reshape(-1, weight.shape[-1]), ops.tile(bias.reshape(-1), (4,))


class FineHead(nn.Cell):
    """Scale 4: up x2, LayerNorm, GELU, up x2, 1x1. Rows [B, M, d] -> [B, M, 16*D], cells in nested order."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.up1 = Conv(dim, dim // 2, upsample=True)
        self.norm = LayerNorm(dim // 2)
        self.act = Gelu()
        self.up2 = Conv(dim // 2, dim // 4, upsample=True)
        self.out = Conv(dim // 4, out_dim)
        self.project = Project()
        self.compute_dtype = ms.float32

    def construct(self, x: Tensor) -> Tensor:
        B, M, d = x.shape
        weight, bias = self.up1.as_quads()  # [4, d/2, d], [1, d/2]
        x = self.project(
            x, weight.reshape(-1, d), ops.tile(bias.reshape(-1), (4,)), self.compute_dtype
        )  # [B, M, 4*d/2]
        x = self.act(self.norm(x.reshape(B, M * 4, d // 2)))
        weight, bias = after_quads(self.up2.as_quads(), self.out.as_linear())  # [4*D, d/2], [4*D]
        return self.project(x, weight, bias, self.compute_dtype).reshape(B, M, -1)


class DoubleHead(nn.Cell):
    """Scale 2: up x2, 1x1. Rows [B, M, d] -> [B, M, 4*D]."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.up = Conv(dim, dim // 2, upsample=True)
        self.out = Conv(dim // 2, out_dim)
        self.project = Project()
        self.compute_dtype = ms.float32

    def construct(self, x: Tensor) -> Tensor:
        weight, bias = after_quads(self.up.as_quads(), self.out.as_linear())
        return self.project(x, weight, bias, self.compute_dtype)


class PlainHead(nn.Cell):
    """Scales 1 and 1/2: 1x1. Rows [B, M, d] -> [B, M, D]."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.out = Conv(dim, out_dim)
        self.project = Project()
        self.compute_dtype = ms.float32

    def construct(self, x: Tensor) -> Tensor:
        weight, bias = self.out.as_linear()
        return self.project(x, weight, bias, self.compute_dtype)


HEADS = {4.0: FineHead, 2.0: DoubleHead, 1.0: PlainHead, 0.5: PlainHead}


class Decoder(nn.Cell):
    """Predicts the hidden cells at one scale from one tap.

    Args:
        encoder_dim: Width of the tap.
        grid: The tap's tokens (h, w), called patches here.
        scale: 4, 2, 1 or 0.5 cells a patch side.
        out_dim: Values D of a cell's target.
        dim: Width d; depth: blocks; num_heads: heads.
        class_token: Whether the tap's first token is a class token.
        linear_head: Predict scale 1 by a Linear, Xavier-uniform (all but LocalMIM on a ViT); else by a 1x1 convolution.

    Raises:
        ValueError: Scale 0.5 on an odd grid, or a depth below 1.
    """

    def __init__(
        self,
        encoder_dim: int,
        grid: tuple[int, int],
        scale: float,
        out_dim: int,
        dim: int = 256,
        depth: int = 1,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        linear_head: bool = False,
    ):
        super().__init__()
        check_grid(grid, scale)
        if depth < 1:
            raise ValueError(f"a decoder needs at least one block, got depth {depth}")
        self.grid, self.scale, self.dim, self.extra = grid, scale, dim, int(class_token)
        self.embed = Linear(encoder_dim, dim)
        self.mask_token = token_parameter(dim)
        code = np.concatenate([np.zeros((self.extra, dim), np.float32), sincos_position_code(dim, grid)])
        self.pos_embed = parameter(code[None], requires_grad=False)  # [1, 1+L, d], zero for the class token if any
        self.blocks = nn.CellList([Block(dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        self.pred = Linear(dim, out_dim) if linear_head and scale == 1 else HEADS[scale](dim, out_dim)

    def rows(self, latent: Tensor, ids_keep: Tensor, ids_mask: Tensor) -> Tensor:
        """Normed rows before the head: hidden patches [B, M, d]; at scale 1/2 visible, then hidden ones [B, L, d]."""
        B, V, d = latent.shape[0], latent.shape[1], self.dim  # V: visible tokens, K or 1+K with the class token
        codes = self.pos_embed.reshape(-1, d)  # [1+L, d]; a slice of three dimensions is a slow copy
        place = ids_keep
        if self.extra:
            place = ops.concat((ops.zeros((B, 1), ms.int32), ids_keep + 1), 1)
        visible = self.embed(latent) + ops.gather(codes, place, 0)  # [B, V, d]
        table = self.mask_token.reshape(1, d) + (codes[1:] if self.extra else codes)  # [L, d], every hidden token

        first = self.blocks[0]
        qkv = first.project(ops.concat((visible.reshape(-1, d), table), 0))  # [B*V + L, 3d]
        n = B * V
        qkv = ops.concat((qkv[:n].reshape(B, V, 3 * d), ops.gather(qkv[n:], ids_mask, 0)), 1)  # [B, V+M, 3d]
        hidden = ops.gather(table, ids_mask, 0)  # [B, M, d]
        unread = self.extra if self.scale < 1 else V
        depth = len(self.blocks)
        skip = unread if depth == 1 else 0
        x = hidden if skip == V else ops.concat((without_first(visible, skip), hidden), 1)
        x = first.attend(x, qkv, skip)
        for i in range(1, depth):
            x = self.blocks[i](x, unread if i == depth - 1 else 0)
        return self.norm(x)

    def head(self, rows: Tensor, ids_restore: Tensor) -> Tensor:
        """Rows to predictions: [B, M, s*s*D], or [B, L/4, D] at scale 1/2."""
        if self.scale < 1:
            B, L, d = rows.shape
            quads = quad_ids(ids_restore, self.grid).reshape(B, L)  # four patches of a coarse cell side by side
            four = ops.split(take_rows(rows, quads).reshape(B * L // 4, 4 * d), d, 1)
            rows = (ops.addn(four) * 0.25).reshape(B, L // 4, d)
        return self.pred(rows)

    def construct(self, latent: Tensor, ids_keep: Tensor, ids_mask: Tensor, ids_restore: Tensor) -> Tensor:
        """latent [B, 1+K, D_enc], class token first, or [B, K, D_enc] -> predictions as rows (see mim/cells.py)."""
        return self.head(self.rows(latent, ids_keep, ids_mask), ids_restore)

    def expected(self, target: Tensor, ids_keep: Tensor, ids_mask: Tensor, ids_restore: Tensor):
        """What the predictions should be, out of a target [B, hs, ws, D], and the weight of each row, None: all alike.

        At scale 1/2 a row counts by the share of its cell that is hidden.
        """
        weights = coarse_weights(ids_restore, ids_keep.shape[1], self.grid) if self.scale < 1 else None  # [B, L/4]
        return target_rows(target, self.scale, ids_mask), weights

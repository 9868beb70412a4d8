"""The Swin transformer, one class for pre-training (with masks and taps) and downstream (all tokens, a map a stage).

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (ICCV 2021); pre-training on
visible tokens after Huang et al., "Green Hierarchical Vision Transformer for Masked Image Modeling" (NeurIPS 2022), or
on all of them, the hidden ones replaced by a learned token.
Which tokens attend to which comes as index arrays (models/windows.py), so both uses are the same blocks: norms,
projections and MLPs see each token once, and only attention runs on windows. Deviations from the authors' code: image
sizes are free, and `rows_first` chooses between their order of merging and the official one (docs/quirks.md, Q3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from mindspore import Tensor, lazy_inline, nn, ops
from mindspore.common.initializer import Normal

from localmim.models.layers import (
    Attended,
    Attention,
    LayerNorm,
    Linear,
    Mlp,
    PatchEmbed,
    TakeTokens,
    drop_path,
    parameter,
    replace_tokens,
    to_pair,
    token_parameter,
)
from localmim.models.relative import window_bias
from localmim.models.windows import whole_windows


class Stage(NamedTuple):
    """Where a stage's tokens lie: grid (h, w), side of a window, shifts of its blocks in turn (one or two)."""

    grid: tuple[int, int]
    window: int
    shifts: tuple[int, ...]


def last_stage(depths: Sequence[int], num_heads: Sequence[int], window_size: int) -> int:
    """Number of a Swin's last stage, from 0.

    Raises:
        ValueError: A number in the place of a list or the other way round, lists of two lengths, or less than 1.
    """
    for name, value in (("depths", depths), ("num_heads", num_heads)):
        if isinstance(value, int):
            raise ValueError(f"{name} {value} must be a list for a Swin, one number a stage")
    if not isinstance(window_size, int):
        raise ValueError(f"window_size {window_size} must be one whole number")
    if len(num_heads) != len(depths) or not depths:
        raise ValueError(f"depths {list(depths)} and num_heads {list(num_heads)} must have one value a stage each")
    if min(depths) < 1 or window_size < 1:
        raise ValueError(f"depths {list(depths)} and window_size {window_size} must be at least 1")
    return len(depths) - 1


@ops.constexpr
def whole_image(grid: tuple[int, int], window: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """The windows of a whole image as constants of a graph."""
    return tuple(Tensor(a) for a in whole_windows(grid, window, shift))


class WindowAttention(Attention):
    """Attention inside windows with a learned bias for each relative position."""

    def __init__(self, dim: int, num_heads: int, window: int):
        super().__init__(dim, num_heads)
        self.take = TakeTokens()
        self.relative_position_bias_table = parameter(Normal(0.02), ((2 * window - 1) ** 2, num_heads))

    def bias(self, pairs: Tensor) -> Tensor:
        """Rows of the table for pairs [G, S, S] -> [G, nh, S, S], for `attend`."""
        return window_bias(self.relative_position_bias_table, pairs)

    def construct(self, qkv: Tensor, pairs: Tensor, slots: Tensor, place: Tensor) -> Tensor:
        """Projected rows qkv [B, N, 3D] -> [B, N', D] for a place of length N'; index arrays of models/windows.py."""
        B, N, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        G, S = pairs.shape[0], pairs.shape[1]
        if G == 1 and S == N:  # one group in token order
            return self.proj(self.attend(qkv, 0, self.bias(pairs)))
        qkv = self.take(qkv, slots).reshape(B * G, S, 3 * D)
        x = self.attend(qkv, 0, self.bias(pairs)).reshape(B, G * S, D)
        return self.proj(self.take(x, place))

    def weights_in_windows(self, qkv: Tensor, pairs: Tensor, slots: Tensor) -> Tensor:
        """Projected rows qkv [B, N, 3D] -> weights of attention, float32 [B, G, nh, S, S]; arrays as in `construct`."""
        G, S = pairs.shape[0], pairs.shape[1]
        weights = self.weights(self.take(qkv, slots).reshape(-1, S, qkv.shape[2]), self.bias(pairs))
        return weights.reshape(-1, G, self.num_heads, S, S)


class SwinBlock(nn.Cell):
    """x + Attn(LN(x)), then x + MLP(LN(x)), attention inside windows."""

    @lazy_inline(policy="front")
    def __init__(self, dim: int, num_heads: int, window: int, mlp_ratio: float, eps: tuple[float, float]):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps[0])
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = LayerNorm(dim, eps[1])
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def project(self, x: Tensor, fill: bool) -> Tensor:
        """Normed queries, keys and values: [B, N, D] -> [B, N, 3D], one row more with `fill`, as in `construct`."""
        qkv = self.attn.qkv(self.norm1(x))  # [B, N, 3D]
        if fill:
            row = self.attn.qkv.bias.astype(qkv.dtype).reshape(1, 1, -1)
            ones = ops.ones_like(ops.stop_gradient(qkv[:, :1]))  # broadcast_to an open batch size has no form in ONNX
            qkv = ops.concat((qkv, ones * row), 1)
        return qkv

    def construct(
        self, x: Tensor, pairs: Tensor, slots: Tensor, place: Tensor, fill: bool = False, drop=None
    ) -> Tensor:
        """[B, N, D] -> [B, N, D].

        Args:
            fill: Slots may name token N, which fills up a grid: zero after the norm, so its q, k, v are their bias.
            drop: [2, B], what each sample's attention and MLP are multiplied with.
        """
        qkv = self.project(x, fill)
        x = x + drop_path(self.attn(qkv, pairs, slots, place), drop, 0)
        return x + drop_path(self.mlp(self.norm2(x)), drop, 1)


class PatchMerging(nn.Cell):
    """Four neighbours become one token of twice the width: LayerNorm(4D), then Linear 4D -> 2D without bias."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.norm = LayerNorm(4 * dim, eps)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def construct(self, x: Tensor) -> Tensor:
        """[B, N, D], the four to be joined side by side -> [B, N/4, 2D]."""
        B, N, D = x.shape
        return self.reduction(self.norm(x.reshape(B, N // 4, 4 * D)))

    def on_grid(self, x: Tensor, grid: tuple[int, int], rows_first: bool) -> Tensor:
        """[B, h*w, D] row-major -> [B, h/2*w/2, 2D]; an odd side is filled up with zeros."""
        B, _, D = x.shape
        h, w = grid
        x = x.reshape(B, h, w, D)
        if h % 2:
            x = ops.concat((x, ops.zeros((B, 1, w, D), x.dtype)), 1)
        if w % 2:
            x = ops.concat((x, ops.zeros((B, h + h % 2, 1, D), x.dtype)), 2)
        h, w = (h + 1) // 2, (w + 1) // 2
        x = x.reshape(B, h, 2, w, 2, D)
        x = x.transpose(0, 1, 3, 2, 4, 5) if rows_first else x.transpose(0, 1, 3, 4, 2, 5)
        return self.construct(x.reshape(B, h * w * 4, D))


class SwinStage(nn.Cell):
    """Blocks of one resolution, and the merging after them, which the last stage does not have."""

    def __init__(self, dim: int, depth: int, num_heads: int, place: Stage, mlp_ratio: float, eps, merge: bool):
        super().__init__()
        self.window, self.shifts, self.turns = place.window, place.shifts, len(place.shifts)
        self.blocks = nn.CellList([SwinBlock(dim, num_heads, place.window, mlp_ratio, eps) for _ in range(depth)])
        self.downsample = PatchMerging(dim, eps[0]) if merge else None

    def construct(self, x: Tensor, windows: tuple[Tensor, ...], fill: bool = False, drop=None) -> Tensor:
        """[B, N, D] -> [B, N, D], before the merging; three arrays for the plain windows, then for the shifted ones.

        Args:
            drop: [blocks, 2, B], factors of stochastic depth.
        """
        return self.block_outputs(x, windows, fill, drop)[-1]

    def block_outputs(self, x: Tensor, windows: tuple[Tensor, ...], fill: bool = False, drop=None) -> list[Tensor]:
        """As `construct`, the output of every block."""
        outputs = []
        for j in range(len(self.blocks)):
            i = 3 * (j % self.turns)
            factors = None if drop is None else drop[j]
            x = self.blocks[j](x, windows[i], windows[i + 1], windows[i + 2], fill, factors)
            outputs.append(x)
        return outputs

    def windows_of(self, grid: tuple[int, int]) -> tuple[tuple[Tensor, ...], bool]:
        """`windows` and `fill` of `construct` for all tokens of a grid."""
        windows = ()
        for shift in self.shifts:
            windows += whole_image(grid, self.window, shift)
        return windows, grid[0] % self.window > 0 or grid[1] % self.window > 0

    def attention(self, inputs: list[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        """Weights of each block's attention, float32 [B, G, nh, S, S], from its input, all tokens of a grid."""
        windows, fill = self.windows_of(grid)
        weights = []
        for j in range(len(self.blocks)):
            i = 3 * (j % self.turns)
            qkv = self.blocks[j].project(inputs[j], fill)
            weights.append(self.blocks[j].attn.weights_in_windows(qkv, windows[i], windows[i + 1]))
        return weights

    def merge(self, x: Tensor) -> Tensor:
        """Visible tokens in nested order: [B, N, D] -> [B, N/4, 2D], or as they are in the last stage."""
        return x if self.downsample is None else self.downsample(x)


class SwinTransformer(nn.Cell):
    """Swin encoder with taps at the end of stages, after their merging.

    Args:
        image_size: Pixels, one number or (height, width); each a multiple of 2^(stages-1) x patch_size.
        patch_size: Pixels.
        in_chans: Image channels.
        embed_dim: Width of the first stage; it doubles at each merging.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage.
        window_size: Tokens a side. A stage whose smaller side is no larger has windows of that side, without shift.
        taps: Stages (from 0) whose outputs are read in pre-training; each has its own LayerNorm.
        rows_first: Merge in the order (0,0), (0,1), (1,0), (1,1) of LocalMIM's pre-training; the official order is
            (0,0), (1,0), (0,1), (1,1).
        isolated: No gradient flows from one tap's segment into the one below.
        norm_eps: Of every LayerNorm.
        norm2_eps: Of the blocks' second LayerNorm; None: the same. (The authors' fine-tuning has 1e-5 there, Q7.)
        mask_token: Hidden patches are replaced by a learned token after their norm, and the tap is the last stage. Else
            they are left out.

    Raises:
        ValueError: Sizes of another kind or that do not divide, or a tap that is no stage or cannot be one.
    """

    no_decay: tuple[str, ...] = ("position_bias", "token")  # in pre-training: names that hold one of these do not decay
    class_tokens = 0
    shared_blocks = 0  # there are no views of an image

    def __init__(
        self,
        image_size=224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        taps: Sequence[int] = (),
        rows_first: bool = False,
        isolated: bool = False,
        norm_eps: float = 1e-6,
        norm2_eps: float | None = None,
        mask_token: bool = False,
    ):
        super().__init__()
        H, W = to_pair(image_size)
        last = last_stage(depths, num_heads, window_size)
        unit = patch_size * 2**last
        if min(H, W, patch_size) < 1 or H % unit or W % unit:
            raise ValueError(f"image_size {H}x{W} is not a multiple of {unit}, the patch after {last} mergings")
        if list(taps) != sorted(set(taps)) or any(not 0 <= t <= last for t in taps):
            raise ValueError(f"taps {list(taps)} must be ascending stages from 0 to {last}")
        if mask_token and tuple(taps) != (last,):
            raise ValueError(f"taps {list(taps)} must be [{last}], the last stage, where hidden patches are replaced")
        self.image_size, self.patch_size, self.in_chans = (H, W), patch_size, in_chans
        self.mask_grid, self.mask_unit = (H // unit, W // unit), unit
        self.taps, self.rows_first, self.isolated = tuple(taps), rows_first, isolated
        self.trained_stages = taps[-1] + 1 if taps else last + 1  # stages above the top tap are not trained
        self.stages = []
        for s, depth in enumerate(depths):
            grid = (H // (patch_size * 2**s), W // (patch_size * 2**s))
            window, shift = (min(grid), 0) if min(grid) <= window_size else (window_size, window_size // 2)
            self.stages.append(Stage(grid, window, (0, shift) if shift and depth > 1 else (0,)))
        widths = [embed_dim * 2**s for s in range(last + 1)]
        self.embed_dim = widths[-1]
        self.tap_widths = [widths[min(t + 1, last)] for t in taps]
        self.tap_grids = [self.stages[min(t + 1, last)].grid for t in taps]
        arrays = 1 + 3 * len(taps) + 3 * sum(len(stage.shifts) for stage in self.stages)
        self.mask_inputs = 2 if mask_token else arrays

        eps = (norm_eps, norm_eps if norm2_eps is None else norm2_eps)
        self.depth = sum(depths)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.patch_norm = LayerNorm(embed_dim, norm_eps)
        self.mask_token = token_parameter(embed_dim) if mask_token else None
        self.layers = nn.CellList(
            [
                SwinStage(widths[s], depths[s], num_heads[s], self.stages[s], mlp_ratio, eps, s < last)
                for s in range(last + 1)
            ]
        )
        self.tap_norms = nn.CellList([LayerNorm(width, norm_eps) for width in self.tap_widths])

    def tap_mask(self, mask: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
        """What decoder k gets, at the grid of tap k.

        ids_keep, ids_mask, ids_restore where hidden patches are left out; else the places of hidden tokens in what the
        encoder sees, and their patches: the same.
        """
        if self.mask_token is not None:
            return mask[1], mask[1]
        return mask[1 + 3 * k], mask[2 + 3 * k], mask[3 + 3 * k]

    def tap_name(self, k: int) -> str:
        """Tap k in words."""
        return f"stage {self.taps[k] + 1}"

    def idle(self) -> str:
        """What lies above the last tap, which no loss reads, in words; empty when nothing does."""
        count = len(self.layers) - 1 - self.taps[-1]
        return f"the top {count} of {len(self.layers)} stages" if count else ""

    def embed(self, images: Tensor, *mask: Tensor) -> Tensor:
        """images [B, C, H, W], a mask's arrays -> normed patches [B, K, D]; without a mask all of them, row-major."""
        if not mask:
            return self.patch_norm(self.patch_embed(images))
        if self.mask_token is not None:
            return replace_tokens(self.patch_norm(self.patch_embed(images)), mask[0], self.mask_token)
        return self.patch_norm(self.patch_embed(images, mask[0]))

    def stage_outputs(self, images: Tensor, *mask: Tensor, drop: Tensor | None = None) -> list[Tensor]:
        """What the encoder sees, [B, K_s, D_s] before and after each merging, up to the last tap.

        Two tensors a stage; the last stage, which has no merging, gives the same one twice.

        Args:
            drop: [blocks of all stages, 2, B], factors of stochastic depth (training/drop_path.py).
        """
        if self.mask_token is not None:
            return self.whole_stages(images, drop, *mask)
        x = self.embed(images, *mask)
        outputs = []
        first = 1 + 3 * len(self.taps)  # of the current stage's windows in `mask`
        block = 0  # the stage's first, counted over all stages
        for s in range(self.taps[-1] + 1):
            layer = self.layers[s]
            count = 3 * layer.turns
            factors = None if drop is None else drop[block : block + len(layer.blocks)]
            before = layer(x, mask[first : first + count], False, factors)
            after = layer.merge(before)
            outputs += [before, after]
            x = ops.stop_gradient(after) if self.isolated and s in self.taps else after
            first += count
            block += len(layer.blocks)
        return outputs

    def construct(self, images: Tensor, *mask: Tensor) -> list[Tensor]:
        """Normed tokens at each tap, a list of [B, K, D].

        Args:
            mask: The arrays of mim/unit_masking.py; with `mask_token` those of mim/replaced_masking.py.
        """
        return self.latents(images, mask)

    def latents(self, images: Tensor, mask: tuple[Tensor, ...], drop: Tensor | None = None) -> list[Tensor]:
        """As `construct`; `drop` as in `stage_outputs`."""
        outputs = self.stage_outputs(images, *mask, drop=drop)
        latents = []
        for k in range(len(self.taps)):
            latents.append(self.tap_norms[k](outputs[2 * self.taps[k] + 1]))
        return latents

    def named_outputs(self, images: Tensor, *mask: Tensor):
        """Names and values along the way, for finding errors; not in a graph."""
        yield "embed", self.embed(images, *mask)
        for i, x in enumerate(self.stage_outputs(images, *mask) if mask else self.whole_stages(images)):
            yield f"layers.{i // 2}" + (".downsample" if i % 2 else ""), x

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Grid of each stage for images of this size, pixels."""
        h, w = height // self.patch_size, width // self.patch_size
        grids = [(h, w)]
        for _ in range(len(self.layers) - 1):
            h, w = (h + 1) // 2, (w + 1) // 2
            grids.append((h, w))
        return grids

    def whole_stages(self, images: Tensor, drop: Tensor | None = None, *mask: Tensor) -> list[Tensor]:
        """Whole images: rows [B, h*w, D] before and after each merging, two a stage; the last stage's is there twice.

        Args:
            images, drop, mask: As in `whole_blocks`.
        """
        outputs = []
        for rows in self.whole_blocks(images, drop, *mask):
            outputs += [rows[-2], rows[-1]]
        return outputs

    def whole_blocks(self, images: Tensor, drop: Tensor | None = None, *mask: Tensor) -> list[list[Tensor]]:
        """Whole images: for each stage its input, each block's output, and what its merging makes of the last of them.

        Rows [B, h*w, D]; of the last stage, which has no merging, the last block's output is there twice.

        Images may be of any size that is a multiple of the patch, not only of `image_size`: grids that windows or
        mergings do not divide are filled up with zeros at the right and at the bottom, as the official code does.
        Windows and shifts stay those of `image_size`: build the encoder at the size it is mostly used at.

        Args:
            drop: [blocks of all stages, 2, B], factors of stochastic depth (training/drop_path.py).
            mask: With `mask_token`: which patches it replaces; none: no patch.
        """
        x = self.embed(images, *mask)
        grids = self.grids(images.shape[2], images.shape[3])
        outputs, first = [], 0
        for s in range(len(self.layers)):
            layer = self.layers[s]
            windows, fill = layer.windows_of(grids[s])
            factors = None if drop is None else drop[first : first + len(layer.blocks)]
            rows = [x, *layer.block_outputs(x, windows, fill, factors)]
            x = rows[-1]
            if s < len(self.layers) - 1:
                x = layer.downsample.on_grid(x, grids[s], self.rows_first)
            outputs.append([*rows, x])
            first += len(layer.blocks)
        return outputs

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Whole images of any size (see `whole_stages`) -> [B, D_s, h_s, w_s] a stage, before merging, un-normed."""
        outputs = self.whole_stages(images)
        grids = self.grids(images.shape[2], images.shape[3])
        maps = []
        for s in range(len(grids)):
            x = outputs[2 * s].transpose(0, 2, 1)  # [B, D, h*w]
            maps.append(x.reshape(x.shape[0], -1, grids[s][0], grids[s][1]))
        return maps

    def tokens(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """Whole images: tokens of the last trained stage before its merging, [B, N, D], no LayerNorm."""
        return self.whole_stages(images, drop)[2 * self.trained_stages - 2]

    def features(self, images: Tensor) -> Tensor:
        """Mean of the last trained stage's tokens, every patch visible: [B, C, H, W] -> [B, D]. No LayerNorm."""
        return self.tokens(images).mean(axis=1)

    def attention(self, images: Tensor) -> list[Tensor]:
        """Whole images: what each trained block's queries attend to, float32 [B, G, nh, S, S], one group a window."""
        stages = self.whole_blocks(images)
        grids = self.grids(images.shape[2], images.shape[3])
        weights = []
        for s in range(self.trained_stages):
            weights += self.layers[s].attention(stages[s], grids[s])
        return weights

    def attended(self) -> list[Attended]:
        """What the rows and columns of `attention` stand for, for images of `image_size`."""
        attended = []
        for s, stage in enumerate(self.stages[: self.trained_stages]):
            h, w = stage.grid
            for j in range(len(self.layers[s].blocks)):
                shift = stage.shifts[j % len(stage.shifts)]
                pairs, slots, _ = whole_windows(stage.grid, stage.window, shift)
                tokens = np.where(slots == h * w, np.int32(-1), slots).reshape(pairs.shape[:2])
                first = (pairs < (2 * stage.window - 1) ** 2).argmax(axis=2)  # that each slot attends to
                windows = first.astype(np.int32)
                attended.append(Attended(f"stage {s + 1}, block {j + 1}", stage.grid, tokens, windows))
        return attended

"""ConvViT, the encoder of ConvMAE: two stages of convolution blocks, then one of transformer blocks.

Gao et al., "MCMAE: Masked Convolution Meets Masked Autoencoders" (NeurIPS 2022). One class for pre-training (visible
patches) and downstream (whole images). What stands at a hidden position of stages 1 and 2 reaches no visible one: the
only layer that mixes positions, the depth-wise convolution, reads zeros there. So hidden positions are not computed at
all, where the authors compute whole maps. Views of an image, each with a mask, are images of their own behind the patch
embedding. With FastConvMAE's masks every position is visible in one view, so all views together cost one pass through
stages 1 and 2, and no code of their own.

Inside a patch positions are in nested order (models/depthwise.py): merging 2 x 2 positions is a reshape.

Deviations from the authors' code: image sizes are free (theirs are written out for 224 px), and windows need not divide
the grid.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Uniform, initializer

from localmim.models.depthwise import DepthwiseConv, Halos, neighbour_table, neighbours
from localmim.models.layers import (
    Attended,
    Block,
    LayerNorm,
    Linear,
    PatchEmbed,
    Project,
    drop_path,
    parameter,
    sincos_position_code,
    to_pair,
    torch_default_init,
)
from localmim.models.operators import Gelu
from localmim.models.relative import offset_classes, window_bias
from localmim.models.windows import nested_offsets, whole_windows

PATCH = 16  # pixels of a stage-3 token's side: strides 4, 2, 2
SIDES = (4, 2)  # positions of a patch's side in stages 1 and 2
REACH = 2  # of the 5 x 5 depth-wise kernels
CONV_EPS = 1e-5  # LayerNorm of the convolution stages


class RowConv(nn.Cell):
    """A convolution with kernel = stride = k as a product, PyTorch's default init.

    Args:
        side: k, a power of 2; 1: a 1x1 convolution.
    """

    def __init__(self, in_dim: int, out_dim: int, side: int = 1):
        super().__init__()
        init = torch_default_init(in_dim * side * side)
        self.weight = parameter(init, (out_dim, in_dim, side, side))
        self.bias = parameter(init, (out_dim,))
        self.side = side
        self.order = Tensor((nested_offsets(side, rows_first=True) @ (side, 1)).astype(np.int32))
        self.project = Project()
        self.compute_dtype = ms.float32

    def construct(self, x: Tensor) -> Tensor:
        """[B, N, in], the k*k rows that are joined side by side in nested order -> [B, N/(k*k), out]."""
        out_dim, in_dim = self.weight.shape[0], self.weight.shape[1]
        weight = self.weight.reshape(out_dim, -1)
        if self.side > 1:
            weight = ops.gather(self.weight.reshape(out_dim, in_dim, -1), self.order, 2).transpose(0, 2, 1)
            weight = weight.reshape(out_dim, -1)
            x = x.reshape(-1, x.shape[1] // self.side**2, self.side**2 * in_dim)
        return self.project(x, weight, self.bias, self.compute_dtype)


class ConvMlp(nn.Cell):
    """1x1 convolution D -> 4D, GELU, 1x1 convolution 4D -> D."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = RowConv(dim, hidden)
        self.act = Gelu()
        self.fc2 = RowConv(hidden, dim)

    def construct(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ConvBlock(nn.Cell):
    """x + conv2(depth-wise(conv1(LN(x)))), then x + MLP(LN(x)); the names are the authors'."""

    def __init__(self, dim: int, mlp_ratio: float, halos: Halos):
        super().__init__()
        self.norm1 = LayerNorm(dim, CONV_EPS)
        self.conv1 = RowConv(dim, dim)
        self.attn = DepthwiseConv(dim, halos)
        self.conv2 = RowConv(dim, dim)
        self.norm2 = LayerNorm(dim, CONV_EPS)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))

    def construct(self, x: Tensor, rows: Tensor, held: Tensor, drop: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C]; the arrays are those of `Halos`.

        Args:
            drop: [2, B], what each sample's branches are multiplied with (training/drop_path.py).
        """
        y = self.conv2(self.attn(self.conv1(self.norm1(x)), rows, held))
        x = x + drop_path(y, drop, 0)
        return x + drop_path(self.mlp(self.norm2(x)), drop, 1)


class Embedding(nn.Cell):
    """A convolution with kernel = stride, LayerNorm, GELU."""

    def __init__(self, proj: nn.Cell, dim: int):
        super().__init__()
        self.proj = proj
        self.norm = LayerNorm(dim, CONV_EPS)
        self.act = Gelu()

    def construct(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """Rows, or images and the places of their patches -> rows [B, N, D]."""
        return self.act(self.norm(self.proj(x) if places is None else self.proj(x, places)))


class Fusion(nn.Cell):
    """The tap: LN(E3 + conv(E1) + conv(E2)), of which visible patches alone are computed."""

    def __init__(self, dims: tuple[int, int, int]):
        super().__init__()
        self.stage1 = RowConv(dims[0], dims[2], SIDES[0])
        self.stage2 = RowConv(dims[1], dims[2], SIDES[1])
        self.norm = LayerNorm(dims[2])

    def construct(self, x1: Tensor, x2: Tensor, x3: Tensor) -> Tensor:
        """[B, K*16, C1], [B, K*4, C2], [B, K, D] -> [B, K, D]."""
        return self.norm(x3 + self.stage1(x1) + self.stage2(x2))


class PositionBias(nn.Cell):
    """A learned number for each relative position and head, which blocks share; 0 at the start."""

    def __init__(self, sides: tuple[int, int], num_heads: int):
        super().__init__()
        count = (2 * sides[0] - 1) * (2 * sides[1] - 1)
        self.relative_position_bias_table = parameter("zeros", (count, num_heads))

    def construct(self, pairs: Tensor) -> Tensor:
        """Rows of the table [G, S, S] -> [G, nh, S, S]."""
        return window_bias(self.relative_position_bias_table, pairs)


def grid_windows(grid: tuple[int, int], window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows of a grid in raster order, those at the right and at the bottom smaller where the side does not divide.

    Returns:
        As in models/windows.py, int32: pairs [G, S, S], slots [G*S], place [h*w]. What fills a smaller window up is
        token 0, to which nothing attends.
    """
    windows = whole_windows(grid, window, 0)
    filled = (windows.slots == grid[0] * grid[1]).reshape(len(windows.pairs), 1, -1)
    pairs = np.where(filled, np.int32((2 * window - 1) ** 2), windows.pairs)
    return pairs, np.where(filled.ravel(), np.int32(0), windows.slots), windows.place


def check_sizes(embed_dims, depths, num_heads) -> None:
    """ValueError when a list is a number or the other way round; recipes share keys with other encoders."""
    for name, value in (("embed_dims", embed_dims), ("depths", depths)):
        if isinstance(value, int):
            raise ValueError(f"{name} {value} must be a list for a ConvViT, one number a stage")
    if not isinstance(num_heads, int):
        raise ValueError(f"num_heads {num_heads} must be one number for a ConvViT")


def _pixel_places(grid: tuple[int, int]) -> np.ndarray:
    """Row-major numbers of each patch's 4 px squares, nested: int32 [h*w, 16]."""
    h, w = grid
    side = SIDES[0]
    i, j = np.divmod(np.arange(h * w), w)
    places = nested_offsets(side, rows_first=True)
    rows, columns = i[:, None] * side + places[:, 0], j[:, None] * side + places[:, 1]
    return (rows * (w * side) + columns).astype(np.int32)


class ConvViT(nn.Cell):
    """ConvViT encoder.

    Args:
        image_size: Pixels, one number or (height, width); each a multiple of 16.
        in_chans: Image channels.
        embed_dims: Width of each of the three stages.
        depths: Blocks of each stage.
        num_heads: Attention heads of stage 3.
        fused: For pre-training: there is one tap, the fusion of the three stages, normed.
        window_size: Tokens a side of the windows in which stage 3 attends, with relative position bias, as in
            detection; None: it attends globally, without bias.
        global_blocks: Blocks of stage 3 (from 0) that attend globally all the same.

    Raises:
        ValueError: Sizes that do not fit together.
    """

    no_decay: tuple[str, ...] = ()
    class_tokens = 0

    def __init__(
        self,
        image_size=224,
        in_chans: int = 3,
        embed_dims: tuple[int, ...] = (256, 384, 768),
        depths: tuple[int, ...] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        fused: bool = False,
        window_size: int | None = None,
        global_blocks: tuple[int, ...] = (0, 3, 6, 10),
    ):
        super().__init__()
        H, W = to_pair(image_size)
        if min(H, W) < 1 or H % PATCH or W % PATCH:
            raise ValueError(f"image_size {H}x{W} is not a multiple of {PATCH}")
        if len(embed_dims) != 3 or len(depths) != 3 or min(*depths, *embed_dims) < 1:
            raise ValueError(
                f"embed_dims {list(embed_dims)} and depths {list(depths)} must have three values of at least 1 each"
            )
        if window_size is not None and (fused or window_size < 1):
            raise ValueError(f"window_size {window_size} must be at least 1, and is for whole images")
        self.image_size, self.patch_size, self.in_chans = (H, W), PATCH, in_chans
        self.grid = (H // PATCH, W // PATCH)
        self.mask_grid, self.mask_unit, self.mask_inputs = self.grid, PATCH, 3
        self.depths, self.depth, self.embed_dim = tuple(depths), sum(depths), embed_dims[2]
        self.shared_blocks = depths[0] + depths[1]  # views of an image are one pass through them, and dropped as one
        self.taps = (self.depth - 1,) if fused else ()
        self.tap_grids, self.tap_widths = [self.grid] * len(self.taps), [self.embed_dim] * len(self.taps)

        C1, C2, D = embed_dims
        self.halos1, self.halos2 = (Halos(side, REACH) for side in SIDES)
        self.near = Tensor(neighbour_table(self.grid))
        self.pixels = Tensor(_pixel_places(self.grid))
        first = PatchEmbed(SIDES[0], in_chans, C1)
        first.weight.set_data(initializer(torch_default_init(in_chans * SIDES[0] ** 2), first.weight.shape).init_data())
        self.patch_embed1 = Embedding(first, C1)
        self.patch_embed2 = Embedding(RowConv(C1, C2, 2), C2)
        third = RowConv(C2, D, 2)
        third.weight.set_data(initializer(Uniform((6 / (4 * C2 + D)) ** 0.5), third.weight.shape).init_data())
        self.patch_embed3 = Embedding(third, D)
        self.patch_embed4 = Linear(D, D)
        self.pos_embed = parameter(sincos_position_code(D, self.grid)[None], requires_grad=False)  # [1, L, D]
        self.blocks1 = nn.CellList([ConvBlock(C1, mlp_ratio, self.halos1) for _ in range(depths[0])])
        self.blocks2 = nn.CellList([ConvBlock(C2, mlp_ratio, self.halos2) for _ in range(depths[1])])
        self.blocks3 = nn.CellList([Block(D, num_heads, mlp_ratio) for _ in range(depths[2])])
        self.tap_norms = nn.CellList([Fusion(tuple(embed_dims)) for _ in self.taps])
        self.pool = nn.MaxPool2d(2, 2)
        self.windowed = None  # which blocks of stage 3 attend in windows; None: no bias either
        if window_size is not None:
            self._make_windows(window_size, global_blocks, num_heads)

    def _make_windows(self, window: int, global_blocks: tuple[int, ...], num_heads: int) -> None:
        """Windows and tables of detection."""
        if any(not 0 <= i < self.depths[2] for i in global_blocks):
            raise ValueError(f"global_blocks {list(global_blocks)} must lie between 0 and {self.depths[2] - 1}")
        self.windowed = [i not in global_blocks for i in range(self.depths[2])]
        self.window_size = window
        pairs, slots, place = grid_windows(self.grid, window)
        self.window_pairs, self.slots, self.place = Tensor(pairs), Tensor(slots), Tensor(place)
        self.global_pairs = Tensor(offset_classes(self.grid)[None, 1:, 1:].copy())
        if any(self.windowed):
            self.windowed_rel_pos_bias = PositionBias((window, window), num_heads)
        if not all(self.windowed):
            self.global_rel_pos_bias = PositionBias(self.grid, num_heads)

    def tap_mask(self, mask: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
        """ids_keep, ids_mask, ids_restore."""
        return mask

    def tap_name(self, k: int) -> str:
        """The tap in words."""
        return "all three stages"

    def idle(self) -> str:
        """What lies above the tap: nothing."""
        return ""

    def embed(self, images: Tensor, *mask: Tensor) -> Tensor:
        """images [B, C, H, W], a mask's arrays of B or, view by view, B*V rows -> [B*V, K*16, C1], nested positions."""
        if not mask:
            return self.patch_embed1(images, self.pixels.reshape(-1))
        rows, K = mask[0].shape
        places = ops.gather(self.pixels, mask[0], 0).reshape(images.shape[0], -1)  # [B, V*K*16]
        x = self.patch_embed1(images, places)
        return x.reshape(rows, K * self.pixels.shape[1], x.shape[2])

    def block_outputs(self, images: Tensor, *mask: Tensor, drop: Tensor | None = None) -> list[Tensor]:
        """The un-normed output of every block, as many as `depth`: rows [B, K*16, C1], [B, K*4, C2], [B, K, D].

        Args:
            mask: ids_keep, ids_mask, ids_restore [B, ...], or [B*V, ...] for V views of an image, which are rows of
                their own from here on; none: all patches are visible, row-major.
            drop: [depth, 2, B] or [depth, 2, B*V], factors of stochastic depth (training/drop_path.py).
        """
        outputs = self.convolved(images, mask, drop)
        count = len(outputs)
        x = self.embed_third(outputs[-1], mask)
        local, whole = self.biases()
        for i in range(self.depths[2]):
            factors = None if drop is None else drop[count]
            if self.windowed is not None and self.windowed[i]:
                x = self.attend_in_windows(self.blocks3[i], x, local, factors)
            else:
                x = self.blocks3[i](x, 0, factors, whole)
            outputs.append(x)
            count += 1
        return outputs

    def convolved(self, images: Tensor, mask: tuple[Tensor, ...], drop: Tensor | None) -> list[Tensor]:
        """The outputs of the blocks of stages 1 and 2, as in `block_outputs`."""
        near = neighbours(self.near, *mask)
        outputs, count = [], 0
        x = self.embed(images, *mask)
        rows, held = self.halos1(near)
        for i in range(self.depths[0]):
            x = self.blocks1[i](x, rows, held, None if drop is None else drop[count])
            outputs.append(x)
            count += 1
        x = self.patch_embed2(x)
        rows, held = self.halos2(near)
        for i in range(self.depths[1]):
            x = self.blocks2[i](x, rows, held, None if drop is None else drop[count])
            outputs.append(x)
            count += 1
        return outputs

    def embed_third(self, x: Tensor, mask: tuple[Tensor, ...]) -> Tensor:
        """Rows of stage 2 [B, K*4, C2] -> tokens of stage 3 with position code [B, K, D]."""
        codes = self.pos_embed[0]  # [L, D]
        return self.patch_embed4(self.patch_embed3(x)) + (ops.gather(codes, mask[0], 0) if mask else codes)

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """Of windows and of the whole grid, as far as any block has them."""
        local, whole = None, None
        if self.windowed is not None:
            if any(self.windowed):
                local = self.windowed_rel_pos_bias(self.window_pairs)
            if not all(self.windowed):
                whole = self.global_rel_pos_bias(self.global_pairs)
        return local, whole

    def attend_in_windows(self, block: Block, x: Tensor, bias: Tensor, drop: Tensor | None) -> Tensor:
        """A block of stage 3 whose attention runs inside windows: [B, L, D] -> [B, L, D]."""
        D = x.shape[2]
        qkv = self.project_windows(block, x, bias.shape[2])
        y = block.attn.attend(qkv, 0, bias).reshape(-1, self.slots.shape[0], D)  # [B, G*S, D]
        x = x + drop_path(block.attn.proj(ops.gather(y, self.place, 1)), drop, 0)
        return x + drop_path(block.mlp(block.norm2(x)), drop, 1)

    def project_windows(self, block: Block, x: Tensor, S: int) -> Tensor:
        """Normed queries, keys and values window by window: [B, L, D] -> [B*G, S, 3D]."""
        return ops.gather(block.project(x), self.slots, 1).reshape(-1, S, 3 * x.shape[2])

    def attention(self, images: Tensor) -> list[Tensor]:
        """Whole images: what the queries of each block of stage 3 attend to, float32 [B, G, nh, S, S], G windows."""
        outputs = self.block_outputs(images)
        local, whole = self.biases()
        below = self.depths[0] + self.depths[1]
        x = self.embed_third(outputs[below - 1], ())
        weights = []
        for i in range(self.depths[2]):
            block = self.blocks3[i]
            if self.windowed is not None and self.windowed[i]:
                G, nh, S = local.shape[0], local.shape[1], local.shape[2]
                inside = block.attn.weights(self.project_windows(block, x, S), local)  # [B*G, nh, S, S]
                weights.append(inside.reshape(-1, G, nh, S, S))
            else:
                weights.append(block.attn.weights(block.project(x), whole).expand_dims(1))
            x = outputs[below + i]
        return weights

    def attended(self) -> list[Attended]:
        """What the rows and columns of `attention` stand for; blocks of stages 1 and 2 have no attention."""
        attended = []
        for i in range(self.depths[2]):
            name = f"stage 3, block {i + 1}"
            if self.windowed is not None and self.windowed[i]:
                pairs, slots, _ = whole_windows(self.grid, self.window_size, 0)
                tokens = np.where(slots == self.grid[0] * self.grid[1], np.int32(-1), slots).reshape(pairs.shape[:2])
                attended.append(Attended(name, self.grid, tokens, np.zeros_like(tokens)))
            else:
                attended.append(Attended.at_once(name, self.grid, self.class_tokens))
        return attended

    def stages(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The last of each stage's block outputs."""
        first, second = self.depths[0] - 1, self.depths[0] + self.depths[1] - 1
        return outputs[first], outputs[second], outputs[-1]

    def construct(self, images: Tensor, *mask: Tensor) -> list[Tensor]:
        """The fused stages at visible patches, normed: a list of one [B, K, D], or [B*V, K, D] of V views."""
        return self.latents(images, mask)

    def latents(self, images: Tensor, mask: tuple[Tensor, ...], drop: Tensor | None = None) -> list[Tensor]:
        """As `construct`; `drop` as in `block_outputs`."""
        return [self.tap_norms[0](*self.stages(self.block_outputs(images, *mask, drop=drop)))]

    def named_outputs(self, images: Tensor, *mask: Tensor):
        """Names and values along the way, for finding errors; not in a graph."""
        yield "embed", self.embed(images, *mask)
        names = [f"blocks{s + 1}.{i}" for s in range(3) for i in range(self.depths[s])]
        yield from zip(names, self.block_outputs(images, *mask))

    def tokens(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """Whole images: tokens of stage 3, [B, L, D], neither fused nor normed.

        Args:
            drop: [depth, 2, B], factors of stochastic depth (training/drop_path.py).
        """
        return self.block_outputs(images, drop=drop)[-1]

    def features(self, images: Tensor) -> Tensor:
        """Mean of the tokens, every patch visible, no LayerNorm: [B, C, H, W] -> [B, D]."""
        return self.tokens(images).mean(axis=1)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Whole images -> E1 to E4, [B, C_s, H/4, W/4], then 1/8, 1/16 and, E3 pooled 2 x 2, 1/32; un-normed."""
        maps = []
        for x, side in zip(self.stages(self.block_outputs(images)), (*SIDES, 1)):
            maps.append(self.as_map(x, side))
        return [*maps, self.pool(maps[2])]

    def as_map(self, x: Tensor, side: int) -> Tensor:
        """Rows of all patches [B, L*side*side, C] -> [B, C, h*side, w*side]."""
        h, w = self.grid
        if side == 4:
            x = x.reshape(-1, h, w, 2, 2, 2, 2, x.shape[2]).transpose(
                0, 7, 1, 3, 5, 2, 4, 6
            )  # [B, C, h, i, i', w, j, j']
        else:
            x = x.reshape(-1, h, w, side, side, x.shape[2]).transpose(0, 5, 1, 3, 2, 4)  # [B, C, h, i, w, j]
        return x.reshape(-1, x.shape[1], h * side, w * side)

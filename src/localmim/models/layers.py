"""The layers every model is made of: Linear, LayerNorm, MLP, attention, the pre-norm block, patches, position codes.

Numerics follow the authors' code (timm's block, exact GELU, LayerNorm eps 1e-6). Two things differ in form only: the
elementary operators take the form that suits the device (models/operators.py), and a block can leave out its first
`skip` rows, which others attend to and nobody reads.

Precision: matrix products run in `compute_dtype`; LayerNorm, softmax and the residual stream stay in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Initializer, Normal, Uniform, XavierUniform, initializer

from localmim.models.operators import (
    AddBias,
    AddToRows,
    Gelu,
    Normalise,
    Operator,
    Softmax,
    SplitHeads,
    Transpose,
    has_flash_attention,
)


def to_pair(value) -> tuple[int, int]:
    """A number becomes (number, number); a pair stays: (height, width)."""
    if isinstance(value, (list, tuple)):
        if len(value) != 2:
            raise ValueError(f"expected one number or [height, width], got {list(value)}")
        return int(value[0]), int(value[1])
    return int(value), int(value)


def parameter(init: Initializer | str | np.ndarray, shape=None, requires_grad: bool = True) -> Parameter:
    """A float32 Parameter from an initializer and a shape, or from an array."""
    data = Tensor(init) if isinstance(init, np.ndarray) else initializer(init, shape, ms.float32).init_data()
    return Parameter(data, requires_grad=requires_grad)


def torch_default_init(fan_in: int) -> Uniform:
    """PyTorch's default for convolutions and their biases: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    return Uniform(1 / math.sqrt(fan_in))


class Linear(nn.Cell):
    """y = x W^T + b with W [out, in], Xavier-uniform W and zero b, or none."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = parameter(XavierUniform(), (out_features, in_features))
        self.bias = parameter("zeros", (out_features,)) if bias else None
        self.compute_dtype = ms.float32
        self.project = Project()

    def construct(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out].

        Args:
            scale: [out], what each output is multiplied with; the weights are, which are fewer.
        """
        weight, bias = self.scaled(scale)
        return self.project(x, weight, bias, self.compute_dtype)

    def scaled(self, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of outputs that are multiplied with `scale` [out]."""
        if scale is None:
            return self.weight, self.bias
        return self.weight * scale.reshape(-1, 1).broadcast_to(self.weight.shape), self.bias * scale


class Project(nn.Cell):
    """y = x W^T + b for a weight that is handed in (a slice or a product of parameters)."""

    def __init__(self):
        super().__init__()
        self.matmul = ops.MatMul(transpose_b=True)
        self.add_bias = AddBias()

    def construct(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self.matmul(rows.astype(dtype), weight.astype(dtype))
        if bias is not None:
            y = self.add_bias(y, bias.astype(dtype))
        return y.reshape(x.shape[:-1] + (weight.shape[0],))


class LayerNorm(nn.Cell):
    """LayerNorm over the last axis in float32; weight 1 and bias 0 at the start."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.gamma = parameter("ones", (dim,))
        self.beta = parameter("zeros", (dim,))
        self.eps = eps
        self.normalise = Normalise(eps)

    def construct(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], float32."""
        rows = x.reshape(-1, x.shape[-1]).astype(ms.float32)
        return self.normalise(rows, self.gamma, self.beta).reshape(x.shape)


def is_slow_width(width: int) -> bool:
    """Whether a CPU multiplies slowly with a right factor of `width` columns, float32.

    MindSpore's oneDNN reads such a factor where it lies. When its rows are a multiple of 4096 bytes apart they compete
    for the same lines of the cache; for powers of two, but not for 3072, it makes a copy first.
    """
    return width % 1024 == 0 and width & (width - 1) != 0


class Mlp(Operator):
    """Linear D -> 4D, GELU, Linear 4D -> D.

    On a CPU the 4D values lie transposed, a column a token, where their number is a slow width (ViT-B): then neither
    the weights nor the gradients meet them as the right factor of a product.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.act = Gelu()
        self.fc2 = Linear(hidden, dim)
        self.slow_width = is_slow_width(hidden)
        self.expand = ops.MatMul(transpose_b=True)
        self.contract = ops.MatMul(transpose_a=True, transpose_b=True)
        self.add_to_rows, self.add_bias = AddToRows(), AddBias()

    def construct(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., D], times `scale` [D]."""
        if self.slow_width and not self.fused:
            return self.by_columns(x, scale)
        return self.fc2(self.act(self.fc1(x)), scale)

    def by_columns(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """As `construct`."""
        dtype = self.fc1.compute_dtype
        rows = x.reshape(-1, x.shape[-1]).astype(dtype)  # [n, D]
        hidden = self.expand(self.fc1.weight.astype(dtype), rows)  # [4D, n]
        hidden = self.act(self.add_to_rows(hidden, self.fc1.bias.astype(dtype)))
        weight, bias = self.fc2.scaled(scale)
        y = self.contract(hidden, weight.astype(dtype))  # [n, D]
        return self.add_bias(y, bias.astype(dtype)).reshape(x.shape)


class Attended(NamedTuple):
    """What the rows and columns of a block's attention stand for when an encoder sees whole images.

    Attributes:
        name: The block in words.
        grid: (h, w) in patches.
        tokens: int32 [G, S], the row-major patch in each slot of a group; -1: a class token, or what fills a grid up.
        windows: int32 [G, S]; slots of a group attend to one another only where these are equal.
    """

    name: str
    grid: tuple[int, int]
    tokens: np.ndarray
    windows: np.ndarray

    @classmethod
    def at_once(cls, name: str, grid: tuple[int, int], class_tokens: int) -> Attended:
        """All tokens in one group, those of the class first."""
        patches = np.arange(-class_tokens, grid[0] * grid[1], dtype=np.int32)[None]
        return cls(name, grid, np.maximum(patches, -1), np.zeros_like(patches))


class Attention(nn.Cell):
    """Multi-head attention; the caller applies the fused projection `qkv` (q, then k, then v along its rows).

    Args:
        relative: What each block adds to the scores by itself: a Cell from queries and `relation` to a bias
            (models/relative.py).
    """

    def __init__(self, dim: int, num_heads: int, relative: nn.Cell | None = None):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of {num_heads} heads")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.widen_bias = True  # False for ONNX, which widens by itself and cannot write an open batch size (export.py)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.relative = relative
        self.bias_of_query = getattr(relative, "of_query", False)  # then it has the shape of the scores
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.softmax = Softmax()
        self.split_heads, self.transpose = SplitHeads(num_heads), Transpose()
        self.flash = has_flash_attention() and relative is None and (dim // num_heads) % 16 == 0

    def attend(self, qkv: Tensor, skip: int = 0, relation: Tensor | None = None) -> Tensor:
        """Projected rows qkv [B, N, 3D] attend to one another -> [B, N - skip, D], heads side by side.

        Args:
            skip: No output for the first `skip` rows.
            relation: [G, nh, N - skip, N], added to the scores; B is a multiple of G, whose biases follow each other.
                With `relative` it is what that takes: the class of each pair of rows, int32 [N, N].
        """
        B, Q, D = qkv.shape[0], qkv.shape[1] - skip, qkv.shape[2] // 3
        if self.flash and relation is None and qkv.dtype != ms.float32:  # it takes 16 bits alone
            q, k, v = ops.split(qkv, D, 2)
            return ops.flash_attention_score(without_first(q, skip), k, v, self.num_heads, scalar_value=self.scale)
        q, k, v = self.split_heads(qkv, skip)
        weights = self.weigh(q, k, skip, relation).astype(v.dtype)
        return self.transpose(self.mix(weights, v), (0, 2, 1, 3)).reshape(B, Q, D)

    def weights(self, qkv: Tensor, relation: Tensor | None = None) -> Tensor:
        """What `attend` mixes values by: the weight of each key for each query, float32 [B, nh, N, N], rows sum to 1.

        Args:
            qkv, relation: As in `attend`.
        """
        q, k, _ = self.split_heads(qkv, 0)
        return self.weigh(q, k, 0, relation)

    def weigh(self, q: Tensor, k: Tensor, skip: int, relation: Tensor | None) -> Tensor:
        """Queries [B, nh, Q, hd] and keys [B, nh, N, hd] -> softmax of their scores, float32 [B, nh, Q, N]."""
        bias = relation if self.relative is None else self.relative(q, relation, skip)
        scores = self.scores(q * self.scale, k).astype(ms.float32)  # [B, nh, Q, N]
        if self.bias_of_query:
            scores = scores + bias
        elif bias is not None:
            wide = scores.reshape(-1, *bias.shape)
            bias = bias.broadcast_to(wide.shape) if self.widen_bias else bias
            scores = (wide + bias).reshape(scores.shape)
        return self.softmax(scores)

    def construct(
        self, qkv: Tensor, skip: int = 0, relation: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """Projected rows qkv [B, N, 3D] -> [B, N - skip, D], times `scale` [D]."""
        return self.proj(self.attend(qkv, skip, relation), scale)


class Block(nn.Cell):
    """Pre-norm transformer block: x + Attn(LN(x)), then x + MLP(LN(x)).

    Args:
        relative: As in Attention.
        layer_scale: What the learned factors of both branches start at; None: there are none.
    """

    @ms.lazy_inline(policy="front")
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        relative: nn.Cell | None = None,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, relative)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1, self.gamma_2 = (parameter(np.full(dim, layer_scale, np.float32)) for _ in range(2))

    def project(self, x: Tensor) -> Tensor:
        """Normed queries, keys and values of rows, before they attend: [..., D] -> [..., 3D]."""
        return self.attn.qkv(self.norm1(x))

    def attend(
        self, x: Tensor, qkv: Tensor, skip: int = 0, drop: Tensor | None = None, relation: Tensor | None = None
    ) -> Tensor:
        """The block of rows whose `project` is known: x [B, N - skip, D], qkv [B, N, 3D] -> [B, N - skip, D]."""
        x = x + drop_path(self.attn(qkv, skip, relation, self.gamma_1), drop, 0)
        return x + drop_path(self.mlp(self.norm2(x), self.gamma_2), drop, 1)

    def construct(self, x: Tensor, skip: int = 0, drop: Tensor | None = None, relation: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N - skip, D]: the first `skip` rows are attended to, but not computed.

        Args:
            drop: [2, B], what each sample's attention and MLP are multiplied with (training/drop_path.py).
            relation: As in Attention.attend.
        """
        return self.attend(without_first(x, skip), self.project(x), skip, drop, relation)


def drop_path(x: Tensor, drop: Tensor | None, branch: int) -> Tensor:
    """A branch [B, N, D] times a factor for each sample, drop[branch] of [2, B]; as it is without them."""
    if drop is None:
        return x
    factors = drop[branch].astype(x.dtype).reshape(-1, 1, 1)  # [B, 1, 1]
    return x * factors.broadcast_to(x.shape)


def linear_rates(rate: float, depth: int) -> list[float]:
    """Rates of stochastic depth, one a block, from 0 in the first to `rate` in the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


def without_first(x: Tensor, skip: int) -> Tensor:
    """Rows from `skip` on: [B, N, D] -> [B, N - skip, D]. (A slice that takes everything is still a slow copy.)"""
    return x[:, skip:] if skip else x


def patchify(images: Tensor, patch: tuple[int, int], transpose: Transpose) -> Tensor:
    """[B, C, H, W] -> [B, h*w, C*ph*pw]: row-major patches, values in a convolution kernel's order."""
    B, C, H, W = images.shape
    ph, pw = patch
    x = transpose(images.reshape(B, C, H // ph, ph, W // pw, pw), (0, 2, 4, 1, 3, 5))  # [B, h, w, C, ph, pw]
    return x.reshape(B, (H // ph) * (W // pw), C * ph * pw)


def take_rows(x: Tensor, ids: Tensor) -> Tensor:
    """Rows of each sample: x [B, N, D], ids int32 [B, K], or [1, K] for all alike -> [B, K, D]."""
    B, N, D = x.shape
    offsets = Tensor(np.arange(B, dtype=np.int32).reshape(B, 1) * N)
    return ops.gather(x.reshape(B * N, D), ids + offsets, 0)


class TakeTokens(Operator):
    """The same tokens of every sample, in the order that they are asked for, some more than once."""

    def construct(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [B, N, D], ids [...] int32 -> [B, K, D] for K ids."""
        if self.fused:
            return ops.gather(x, ids.reshape(-1), 1)
        return take_rows(x, ids.reshape(1, -1))  # along axis 0: a CPU transposes the gradient along another twice


def replace_tokens(x: Tensor, hidden: Tensor, token: Tensor) -> Tensor:
    """Hidden rows become the token: x [B, N, D], hidden [B, N] of 0 and 1, token [1, 1, D] -> [B, N, D] float32."""
    B, N, D = x.shape
    hidden = hidden.reshape(B * N, 1)
    kept = x.reshape(B * N, D).astype(ms.float32) * (1 - hidden).broadcast_to((B * N, D))
    return (kept + ops.matmul(hidden, token.reshape(1, D))).reshape(B, N, D)


class PatchEmbed(nn.Cell):
    """Patch embedding of the patches that are asked for: a convolution with kernel = stride, as a product."""

    def __init__(self, patch_size: int, in_chans: int, dim: int):
        super().__init__()
        fan_in = in_chans * patch_size**2
        self.patch = (patch_size, patch_size)
        xavier = math.sqrt(6 / (fan_in + dim))
        self.weight = parameter(Uniform(xavier), (dim, in_chans, patch_size, patch_size))
        self.bias = parameter(torch_default_init(fan_in), (dim,))
        self.compute_dtype = ms.float32
        self.transpose, self.project = Transpose(), Project()

    def construct(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """images [B, C, H, W] -> [B, K, D]; all patches in row-major order without ids_keep.

        Args:
            ids_keep: [B, K], or [K] for all images alike.
        """
        x = patchify(images, self.patch, self.transpose)
        if ids_keep is not None:
            x = take_rows(x, ids_keep) if ids_keep.ndim == 2 else ops.gather(x, ids_keep, 1)
        return self.project(x, self.weight.reshape(self.weight.shape[0], -1), self.bias, self.compute_dtype)


def sincos_position_code(dim: int, grid: tuple[int, int]) -> np.ndarray:
    """Fixed sine-cosine code of a grid: float32 [h*w, dim], computed in float64.

    With w_m = 10000^(-m / (dim/4)) a row holds sin(j w), cos(j w), sin(i w), cos(i w): the column j fills the first
    half, the row i the second (MAE's order, though its variable names say the opposite).

    Raises:
        ValueError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a sine-cosine position code needs a width that is a multiple of 4, got {dim}")
    h, w = grid
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    i, j = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    angles = [np.outer(c.reshape(-1), omega) for c in (j, i)]  # each [h*w, dim/4]
    parts = [f(a) for a in angles for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def token_parameter(dim: int) -> Parameter:
    """A learned token [1, 1, D], N(0, 0.02)."""
    return parameter(Normal(0.02), (1, 1, dim))


def set_compute_dtype(model: nn.Cell, dtype) -> nn.Cell:
    """Run the matrix products of `model` in `dtype`; parameters stay float32."""
    for _, cell in model.cells_and_names():
        if hasattr(cell, "compute_dtype"):
            cell.compute_dtype = dtype
    return model

"""The authors' formulas once more, plainly: float64 numpy, and MindSpore's stock operators where gradients are needed.

Written from the method's description, not from the package: tests compare the package with these.
"""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


def erf(x: np.ndarray) -> np.ndarray:
    """Exact error function, float64."""
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def gelu(x: np.ndarray) -> np.ndarray:
    """x * Phi(x), float64."""
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """Over the last axis, biased variance, float64."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def block(x: np.ndarray, weights: dict[str, np.ndarray], num_heads: int) -> np.ndarray:
    """Pre-norm transformer block, float64: x [B, N, D], weights by their name in the block."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    B, N, D = x.shape
    rows = layer_norm(x, w["norm1.gamma"], w["norm1.beta"])
    qkv = rows @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]
    q, k, v = qkv.reshape(B, N, 3, num_heads, D // num_heads).transpose(2, 0, 3, 1, 4)  # each [B, nh, N, hd]
    logits = q @ k.transpose(0, 1, 3, 2) * (D // num_heads) ** -0.5
    mixed = (softmax(logits) @ v).transpose(0, 2, 1, 3).reshape(B, N, D)
    x = x + mixed @ w["attn.proj.weight"].T + w["attn.proj.bias"]
    rows = layer_norm(x, w["norm2.gamma"], w["norm2.beta"])
    hidden = gelu(rows @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
    return x + hidden @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]


def window_labels(coordinates: np.ndarray, window: int, shift: int) -> np.ndarray:
    """Window (row, column) of tokens at (row, column): floor((c + (w - s) mod w) / w). [N, 2] -> [N, 2]."""
    return np.floor((coordinates + (window - shift) % window) / window).astype(int)


def rolled_windows(grid: tuple[int, int], window: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """The official Swin's windows: fill up with -1, roll by -shift, cut; row-major tokens and mask regions [G, S]."""
    (h, w), (H, W) = grid, (-(-side // window) * window for side in grid)
    tokens = np.full((H, W), -1)
    tokens[:h, :w] = np.arange(h * w).reshape(h, w)
    tokens = np.roll(tokens, (-shift, -shift), (0, 1))
    regions = np.zeros((H, W), int)
    if shift:
        parts = slice(0, -window), slice(-window, -shift), slice(-shift, None)
        for n, (rows, columns) in enumerate((r, c) for r in parts for c in parts):
            regions[rows, columns] = n
    return tuple(
        a.reshape(H // window, window, W // window, window).transpose(0, 2, 1, 3).reshape(-1, window * window)
        for a in (tokens, regions)
    )


def relative_rows(query: np.ndarray, key: np.ndarray, window: int) -> np.ndarray:
    """Row of the bias table for coordinates (row, column) in one window: [..., 2], [..., 2] -> [...]."""
    d = query - key + window - 1
    return d[..., 0] * (2 * window - 1) + d[..., 1]


def unit_major(grid: tuple[int, int], units: tuple[int, int]) -> np.ndarray:
    """(row, column) of a pyramid's tokens unit by unit, row by row inside a unit: [units, r*r, 2]."""
    r = grid[0] // units[0]
    places = [
        [(a * r + i, b * r + j) for i in range(r) for j in range(r)] for a in range(units[0]) for b in range(units[1])
    ]
    return np.array(places)


def swin_coordinates(hidden: np.ndarray, grid, units, scrambled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Visible tokens of hidden [units] in unit-major order: where they are, and what windows take them for, [N, 2].

    The same, except scrambled (Q2): the k-th token in unit-major order is taken for the k-th of the grid in row order.
    """
    places = unit_major(grid, units)
    seen = places[~hidden].reshape(-1, 2)
    if not scrambled:
        return seen, seen
    k = np.flatnonzero(np.repeat(~hidden, places.shape[1]))
    return seen, np.stack([k // grid[1], k % grid[1]], axis=1)


def window_attention(rows, w: dict[str, np.ndarray], num_heads: int, attend, index) -> np.ndarray:
    """Normed rows [B, G, N, D]; which pairs attend and their row of the bias table, query first, [G, N, N]."""
    B, G, N, D = rows.shape
    qkv = (rows @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]).reshape(B, G, N, 3, num_heads, D // num_heads)
    q, k, v = qkv.transpose(3, 0, 1, 4, 2, 5)  # each [B, G, nh, N, hd]
    logits = q @ k.swapaxes(-1, -2) * (D // num_heads) ** -0.5
    logits += w["attn.relative_position_bias_table"][np.where(attend, index, 0)].transpose(0, 3, 1, 2)
    mixed = softmax(np.where(attend[:, None], logits, -np.inf)) @ v
    return mixed.transpose(0, 1, 3, 2, 4).reshape(rows.shape) @ w["attn.proj.weight"].T + w["attn.proj.bias"]


def swin_mlp(x: np.ndarray, w: dict[str, np.ndarray], eps: float) -> np.ndarray:
    """The second half of a block: x [..., D]."""
    rows = layer_norm(x, w["norm2.gamma"], w["norm2.beta"], eps)
    return x + gelu(rows @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]


def below(weights: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Weights under a prefix, float64, by the rest of their name."""
    return {n[len(prefix) :]: a.astype(np.float64) for n, a in weights.items() if n.startswith(prefix)}


def swin_embed(images: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """[B, C, H, W] -> normed patches [B, h, w, D]."""
    w = below(weights, "patch_")
    kernel = w["embed.weight"]
    B, C, H, W = images.shape
    p = kernel.shape[-1]
    patches = images.astype(np.float64).reshape(B, C, H // p, p, W // p, p)
    x = np.einsum("bciyjx,dcyx->bijd", patches, kernel) + w["embed.bias"]
    return layer_norm(x, w["norm.gamma"], w["norm.beta"])


def swin_merge(x: np.ndarray, weights: dict[str, np.ndarray], stage: int, rows_first: bool) -> np.ndarray:
    """[B, h, w, D] -> [B, h/2, w/2, 2D]; an odd side is filled up with zeros."""
    w = below(weights, f"layers.{stage}.downsample.")
    x = np.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    order = [(0, 0), (0, 1), (1, 0), (1, 1)] if rows_first else [(0, 0), (1, 0), (0, 1), (1, 1)]
    x = np.concatenate([x[:, i::2, j::2] for i, j in order], axis=-1)
    return layer_norm(x, w["norm.gamma"], w["norm.beta"]) @ w["reduction.weight"].T


def visible_swin(images, weights, hidden, windows, num_heads, depths, quirks) -> list[np.ndarray]:
    """Swin on visible tokens alone, one dense masked attention over all of them.

    Args:
        hidden: [units] bool, of the last stage's grid.
        windows: (window, shift) of each stage.
        quirks: The authors' merging order and their coordinates in all stages but the first.

    Returns:
        Before and after each merging (the last stage has none: once), [B, h, w, D] with NaN at hidden tokens.
    """
    x = swin_embed(images, weights)
    last = len(depths) - 1
    units = x.shape[1] >> last, x.shape[2] >> last
    outputs = []
    for s, (window, shift) in enumerate(windows):
        (i, j), coordinates = (a.T for a in swin_coordinates(hidden, x.shape[1:3], units, quirks and s > 0))
        c = coordinates.T
        for block_number in range(depths[s]):
            w = below(weights, f"layers.{s}.blocks.{block_number}.")
            labels = window_labels(c, window, shift if block_number % 2 else 0)
            attend = (labels[:, None] == labels[None]).all(-1)[None]
            index = relative_rows(c[:, None], c[None], window)[None]
            tokens = x[:, i, j]  # [B, N, D]
            rows = layer_norm(tokens, w["norm1.gamma"], w["norm1.beta"])
            tokens = tokens + window_attention(rows[:, None], w, num_heads[s], attend, index)[:, 0]
            x = np.full_like(x, np.nan)
            x[:, i, j] = swin_mlp(tokens, w, 1e-6)
        outputs.append(x)
        if s < last:
            x = swin_merge(x, weights, s, rows_first=quirks)
            outputs.append(x)
    return outputs


def official_swin(images, weights, windows, num_heads, depths, rows_first=False, norm2_eps=1e-6) -> list[np.ndarray]:
    """Swin on whole images as the official code has it: fill up, roll, cut windows, mask regions, put back.

    Returns:
        Each stage before its merging, [B, D, h, w].
    """
    x = swin_embed(images, weights)
    maps = []
    for s, (window, shift) in enumerate(windows):
        B, h, w_, D = x.shape
        for block_number in range(depths[s]):
            w = below(weights, f"layers.{s}.blocks.{block_number}.")
            tokens, regions = rolled_windows((h, w_), window, shift if block_number % 2 else 0)
            rows = layer_norm(x, w["norm1.gamma"], w["norm1.beta"]).reshape(B, h * w_, D)
            rows = np.concatenate([rows, np.zeros((B, 1, D))], axis=1)[:, tokens]  # token -1 is zero: [B, G, S, D]
            cell = np.stack(np.divmod(np.arange(window * window), window), axis=1)
            index = np.broadcast_to(relative_rows(cell[:, None], cell[None], window), (*tokens.shape, window**2))
            rows = window_attention(rows, w, num_heads[s], regions[:, :, None] == regions[:, None], index)
            back = np.zeros((B, h * w_, D))
            back[:, tokens[tokens >= 0]] = rows[:, tokens >= 0]
            x = swin_mlp(x + back.reshape(x.shape), w, norm2_eps)
        maps.append(x.transpose(0, 3, 1, 2))
        if s < len(depths) - 1:
            x = swin_merge(x, weights, s, rows_first)
    return maps


def sobel(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Horizontal and vertical gradients, a nine-tap sum each: float64 [B, C, H, W] -> two of the same shape."""
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float64)
    H, W = images.shape[2:]
    x = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    taps = [(i, j, x[:, :, i : i + H, j : j + W]) for i in range(3) for j in range(3)]
    return sum(kernel[i, j] * t for i, j, t in taps), sum(kernel[j, i] * t for i, j, t in taps)


def hog(images: np.ndarray, cell: int, nbins: int, bias=(0.0, 0.0)) -> np.ndarray:
    """Histogram of oriented gradients, float64: [B, C, H, W] -> [B, H/cell, W/cell, C, nbins]."""
    gx, gy = sobel(images)
    gx, gy = gx + bias[0], gy + bias[1]
    place = np.floor(np.arctan2(gx, gy) / np.pi * nbins).astype(int) % nbins
    volume = np.hypot(gx, gy)[..., None] * np.eye(nbins)[place]  # [B, C, H, W, nbins]
    B, C, H, W = images.shape
    pooled = volume.reshape(B, C, H // cell, cell, W // cell, cell, nbins).mean((3, 5)).transpose(0, 2, 3, 1, 4)
    return pooled / np.maximum(np.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


class Gradients(nn.Cell):
    """ms.value_and_grad with auxiliary outputs, as a Cell: a bare one is never freed, and complains at exit."""

    def __init__(self, cell: nn.Cell, places: tuple[int, ...] | int | None, weights):
        super().__init__()
        self.run = ms.value_and_grad(cell, places, weights, has_aux=True)

    def construct(self, *inputs):
        return self.run(*inputs)


class PlainDecoder(nn.Cell):
    """The authors' decoder: all tokens in image order, mask tokens, whole blocks, real convolutions, all predictions.

    It reads the very parameters of a package's decoder, so that gradients can be compared too.
    """

    def __init__(self, decoder, num_heads: int):
        super().__init__()
        self.weights = dict(decoder.parameters_and_names())
        self.grid, self.scale, self.dim, self.num_heads = decoder.grid, decoder.scale, decoder.dim, num_heads
        self.depth = len(decoder.blocks)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return ops.matmul(x, self.weights[f"{name}.weight"].T) + self.weights[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keep_dims=True)
        variance = (centred * centred).mean(-1, keep_dims=True)
        return centred / ops.sqrt(variance + 1e-6) * self.weights[f"{name}.gamma"] + self.weights[f"{name}.beta"]

    def gelu(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1 + ops.erf(x / math.sqrt(2)))

    def block(self, x: Tensor, name: str) -> Tensor:
        B, N, d = x.shape
        nh = self.num_heads
        qkv = self.linear(self.norm(x, f"{name}.norm1"), f"{name}.attn.qkv").reshape(B, N, 3, nh, d // nh)
        q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))  # each [B, nh, N, hd]
        weights = ops.softmax(ops.matmul(q, k.transpose(0, 1, 3, 2)) * (d // nh) ** -0.5, -1)
        x = x + self.linear(ops.matmul(weights, v).transpose(0, 2, 1, 3).reshape(B, N, d), f"{name}.attn.proj")
        hidden = self.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + self.linear(hidden, f"{name}.mlp.fc2")

    def conv(self, x: Tensor, name: str) -> Tensor:
        y = ops.conv2d(x, self.weights[f"{name}.weight"])
        return y + self.weights[f"{name}.bias"].reshape(1, -1, 1, 1)

    def up(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"]  # [in, out, 2, 2]
        B, _, h, w = x.shape
        transposed = ops.Conv2DTranspose(weight.shape[0], 2, pad_mode="valid", stride=2)
        y = transposed(x, weight, (B, weight.shape[1], 2 * h, 2 * w))
        return y + self.weights[f"{name}.bias"].reshape(1, -1, 1, 1)

    def construct(self, latent: Tensor, ids_restore: np.ndarray) -> Tensor:
        """latent [B, 1+K, D] -> [B, hs, ws, D_out], every cell of the image."""
        h, w = self.grid
        B, N = latent.shape[:2]
        x = self.linear(latent, "embed")
        masks = ops.tile(self.weights["mask_token"], (B, h * w + 1 - N, 1))
        patches = ops.concat((x[:, 1:], masks), 1)  # [B, L, d], visible first
        patches = ops.stack([ops.gather(patches[b], Tensor(ids_restore[b]), 0) for b in range(B)])  # image order
        x = ops.concat((x[:, :1], patches), 1) + self.weights["pos_embed"]
        for i in range(self.depth):
            x = self.block(x, f"blocks.{i}")
        x = self.norm(x, "norm")[:, 1:].reshape(B, h, w, self.dim).transpose(0, 3, 1, 2)  # [B, d, h, w]
        if self.scale == 4:
            x = self.up(x, "pred.up1").transpose(0, 2, 3, 1)  # channels last, for the norm over channels
            x = self.gelu(self.norm(x, "pred.norm")).transpose(0, 3, 1, 2)
            x = self.up(x, "pred.up2")
        elif self.scale == 2:
            x = self.up(x, "pred.up")
        elif self.scale == 0.5:
            x = ops.avg_pool2d(x, 2, 2)
        return self.conv(x, "pred.out").transpose(0, 2, 3, 1)


class Weighted(nn.Cell):
    """sum(cell(inputs) * weight): its gradients are the cell's backward pass of `weight`; the output beside it."""

    def __init__(self, cell: nn.Cell):
        super().__init__()
        self.cell = cell

    def construct(self, weight, *inputs):
        y = self.cell(*inputs)
        return (y * weight).sum(), y


def backward(cell: nn.Cell, weight: np.ndarray, *inputs: np.ndarray):
    """Output, gradients of the inputs, gradients of the parameters by name, of sum(output * weight); in graph mode."""
    parameters = dict(cell.parameters_and_names())
    places = tuple(range(1, len(inputs) + 1))
    weights = ms.ParameterTuple(parameters.values()) if parameters else None
    run = Gradients(Weighted(cell), places, weights)
    (_, out), gradients = run(Tensor(weight), *map(Tensor, inputs))
    of_inputs, of_weights = gradients if parameters else (gradients, ())
    arrays = [g.asnumpy() for g in (of_inputs if isinstance(of_inputs, tuple) else (of_inputs,))]
    return out.asnumpy(), arrays, dict(zip(parameters, (g.asnumpy() for g in of_weights)))


def randomise(cell: nn.Cell, seed: int) -> nn.Cell:
    """Every parameter away from its start, where zeros and ones would hide mistakes."""
    rng = np.random.default_rng(seed)
    for p in cell.get_parameters():
        p.set_data(Tensor(rng.normal(0, 0.3, p.shape).astype(np.float32)))
    return cell

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

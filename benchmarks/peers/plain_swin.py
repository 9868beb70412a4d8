"""LocalMIM on a Swin in MindSpore's stock layers, as one writes it first: a peer for the time of a training step.

Written from the method's description (Wang et al., CVPR 2023), not from the package. Against the package's model: the
patch convolution and its norm run on the whole image; in every stage all visible tokens are in one attention with an
additive mask; decoders compute every token and predict every cell; HOG is one pass a cell size; layers are MindSpore's
own. Sizes, weights and the mask are those of the recipe's model, and so is the loss:

    python benchmarks/peers/plain_swin.py --config FILE [--batch-size 4] [--key value]

prints both losses, largest difference first, and ends with 1 when they differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys

os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

from localmim import cli
from localmim.config import load_config
from localmim.device import set_device
from localmim.errors import RunError, UserError
from localmim.mim.targets import HogTarget
from localmim.mim.unit_masking import UnitMasking
from localmim.training.build import build_masking, build_model

TOLERANCE = 1e-5


def layer_norm(dim: int) -> nn.LayerNorm:
    """Over the last axis."""
    return nn.LayerNorm([dim], epsilon=1e-6)


class Attention(nn.Cell):
    """Multi-head attention; with a window a learned bias for each relative position is added."""

    def __init__(self, dim: int, num_heads: int, window: int | None = None):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv = nn.Dense(dim, 3 * dim)
        self.proj = nn.Dense(dim, dim)
        if window is not None:
            table = initializer(Normal(0.02), ((2 * window - 1) ** 2, num_heads), ms.float32)
            self.relative_position_bias_table = Parameter(table)

    def construct(self, x, index=None, mask=None):
        """x [B, N, D], index int32 [N, N] into the table, mask [N, N] that is added -> [B, N, D]."""
        B, N, D = x.shape
        nh = self.num_heads
        qkv = self.qkv(x).reshape(B, N, 3, nh, D // nh).transpose(2, 0, 3, 1, 4)
        q, k, v = ops.unstack(qkv, axis=0)  # each [B, nh, N, hd]
        scores = ops.matmul(q * self.scale, k.transpose(0, 1, 3, 2))  # [B, nh, N, N]
        if index is not None:
            bias = ops.gather(self.relative_position_bias_table, index, 0)  # [N, N, nh]
            scores = scores + bias.transpose(2, 0, 1) + mask
        x = ops.matmul(ops.softmax(scores, axis=-1), v)  # [B, nh, N, hd]
        return self.proj(x.transpose(0, 2, 1, 3).reshape(B, N, D))


class Mlp(nn.Cell):
    """Dense, GELU, Dense."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Dense(dim, hidden)
        self.act = nn.GELU(approximate=False)
        self.fc2 = nn.Dense(hidden, dim)

    def construct(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Cell):
    """x + Attn(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, dim: int, num_heads: int, window: int | None = None):
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = Attention(dim, num_heads, window)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def construct(self, x, index=None, mask=None):
        x = x + self.attn(self.norm1(x), index, mask)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Cell):
    """Joins 2 x 2 tokens of each visible unit: [B, V*r*r, D] -> [B, V*r/2*r/2, 2D]."""

    def __init__(self, dim: int, side: int, rows_first: bool):
        super().__init__()
        self.side = side
        self.order = (0, 1, 2, 4, 3, 5, 6) if rows_first else (0, 1, 2, 4, 5, 3, 6)
        self.norm = layer_norm(4 * dim)
        self.reduction = nn.Dense(4 * dim, 2 * dim, has_bias=False)

    def construct(self, x):
        B, N, D = x.shape
        half = self.side // 2
        x = x.reshape(B, N // self.side**2, half, 2, half, 2, D).transpose(self.order)  # [B, V, r/2, r/2, 2, 2, D]
        return self.reduction(self.norm(x.reshape(B, N // 4, 4 * D)))


class Stage(nn.Cell):
    """Blocks, plain and shifted in turn, then the merging, which the last stage does not have."""

    def __init__(self, dim: int, depth: int, num_heads: int, window: int, turns: int, merging: PatchMerging | None):
        super().__init__()
        self.turns = turns
        self.blocks = nn.CellList([Block(dim, num_heads, window) for _ in range(depth)])
        self.downsample = merging

    def construct(self, x, *relations):
        """x [B, N, D] and an index and a mask [N, N] for plain blocks, then for shifted ones if there are any."""
        for j in range(len(self.blocks)):
            i = 2 * (j % self.turns)
            x = self.blocks[j](x, relations[i], relations[i + 1])
        return x if self.downsample is None else self.downsample(x)


class Encoder(nn.Cell):
    """Visible tokens through all stages, a normed tap after each."""

    def __init__(self, theirs, rows_first: bool):
        super().__init__()
        width, patch = theirs.patch_norm.gamma.shape[0], theirs.patch_size
        self.patch_embed = nn.Conv2d(
            theirs.in_chans, width, patch, stride=patch, pad_mode="valid", has_bias=True, weight_init="xavier_uniform"
        )
        self.patch_norm = layer_norm(width)
        last = len(theirs.stages) - 1
        layers, norms = [], []
        for s, (place, layer) in enumerate(zip(theirs.stages, theirs.layers)):
            merging = PatchMerging(width, 2 ** (last - s), rows_first) if s < last else None
            heads = layer.blocks[0].attn.num_heads
            layers.append(Stage(width, len(layer.blocks), heads, place.window, len(place.shifts), merging))
            width = 2 * width if s < last else width
            norms.append(layer_norm(width))
        self.layers = nn.CellList(layers)
        self.tap_norms = nn.CellList(norms)

    def construct(self, images, visible, *relations):
        """images [B, C, H, W], visible int32 [K] row-major patch numbers -> a list of [B, K_s, D_s]."""
        x = self.patch_embed(images)  # [B, D, h, w]
        B, D, h, w = x.shape
        x = self.patch_norm(x.reshape(B, D, h * w).transpose(0, 2, 1))  # [B, h*w, D]
        x = ops.gather(x, visible, 1)  # [B, K, D]
        latents = []
        first = 0
        for s in range(len(self.layers)):
            count = 2 * self.layers[s].turns
            x = self.layers[s](x, *relations[first : first + count])
            latents.append(self.tap_norms[s](x))
            first += count
        return latents


def position_code(dim: int, grid: tuple[int, int]) -> np.ndarray:
    """sin(j w), cos(j w), sin(i w), cos(i w) of column j and row i: float32 [1, h*w, dim]."""
    h, w = grid
    frequency = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    column = np.tile(np.arange(w), h)[:, None] * frequency
    row = np.repeat(np.arange(h), w)[:, None] * frequency
    code = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)
    return code[None].astype(np.float32)


class Decoder(nn.Cell):
    """All tokens of a tap's grid, with mask tokens where nothing was visible, to a prediction for every cell."""

    def __init__(self, encoder_dim: int, grid: tuple[int, int], dim: int, depth: int, num_heads: int, out_dim: int):
        super().__init__()
        self.length = grid[0] * grid[1]
        self.embed = nn.Dense(encoder_dim, dim)
        self.mask_token = Parameter(initializer(Normal(0.02), (1, 1, dim), ms.float32))
        self.pos_embed = Parameter(Tensor(position_code(dim, grid)), requires_grad=False)
        self.blocks = nn.CellList([Block(dim, num_heads) for _ in range(depth)])
        self.norm = layer_norm(dim)
        self.pred = nn.Dense(dim, out_dim)

    def construct(self, latent, ids_restore):
        """latent [B, K, D_enc], ids_restore int32 [L] -> [B, L, D] in image order."""
        x = self.embed(latent)  # [B, K, d]
        B, K, _ = x.shape
        x = ops.concat((x, ops.tile(self.mask_token, (B, self.length - K, 1))), 1)
        x = ops.gather(x, ids_restore, 1) + self.pos_embed  # [B, L, d]
        for i in range(len(self.blocks)):
            x = self.blocks[i](x)
        return self.pred(self.norm(x))


class Hog(nn.Cell):
    """HOG at one cell size: [B, C, H, W] -> [B, H/cell * W/cell, C*nbins]."""

    def __init__(self, cell: int, nbins: int, bias: np.ndarray | None):
        super().__init__()
        self.nbins = nbins
        sobel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float32)
        kernel = Tensor(np.stack([sobel, sobel.T])[:, None])  # [2, 1, 3, 3]
        start = "zeros" if bias is None else Tensor(bias)
        self.pad = nn.ReflectionPad2d(1)
        self.conv = nn.Conv2d(1, 2, 3, pad_mode="valid", has_bias=bias is not None, weight_init=kernel, bias_init=start)
        for parameter in self.conv.get_parameters():
            parameter.requires_grad = False
        self.pool = nn.AvgPool2d(cell, cell)

    def construct(self, images):
        B, C, H, W = images.shape
        n = self.nbins
        gradients = self.conv(self.pad(images).reshape(B * C, 1, H + 2, W + 2))  # [B*C, 2, H, W]
        gx, gy = ops.split(gradients, 1, 1)  # each [B*C, 1, H, W]
        place = ops.floor(ops.atan2(gx, gy) / math.pi * n).astype(ms.int32)  # -n .. n
        empty = ops.zeros((B * C, n, H, W), ms.float32)
        x = ops.tensor_scatter_elements(empty, (place + n) % n, ops.sqrt(gx * gx + gy * gy), axis=1)
        x = self.pool(x)  # [B*C, n, h, w]
        x = x / ops.maximum(ops.sqrt((x * x).sum(axis=1, keepdims=True)), Tensor(1e-12, ms.float32))
        x = x.reshape(B, C * n, -1).transpose(0, 2, 1)  # [B, h*w, C*n]
        return ops.stop_gradient(x)


class PlainSwin(nn.Cell):
    """The whole model, in the sizes of the package's model `theirs`.

    Inputs: images [B, C, H, W]; the visible patches [K]; for each stage an index and a mask [K_s, K_s] for plain
    blocks and, where there are any, for shifted ones; for each tap ids_restore [L] and a float mask [B, L], 1 = hidden.
    """

    def __init__(self, theirs, rows_first: bool):
        super().__init__()
        self.encoder = Encoder(theirs.encoder, rows_first)
        decoders = []
        for width, part, out_dim in zip(theirs.encoder.tap_widths, theirs.decoders, theirs.target.dims):
            heads = part.blocks[0].attn.num_heads
            decoders.append(Decoder(width, part.grid, part.dim, len(part.blocks), heads, out_dim))
        self.decoders = nn.CellList(decoders)
        hog = theirs.target.hog
        biases = [None] * len(hog.cell_sizes) if hog.bias is None else list(hog.bias.asnumpy())
        self.hogs = nn.CellList([Hog(cell, hog.nbins, bias) for cell, bias in zip(hog.cell_sizes, biases)])

    def construct(self, images, visible, *arrays):
        """(loss, losses [taps])."""
        first = len(arrays) - 2 * len(self.decoders)
        latents = self.encoder(images, visible, *arrays[:first])
        losses = []
        for k in range(len(latents)):
            prediction = self.decoders[k](latents[k], arrays[first + 2 * k])  # [B, L, D]
            mask = arrays[first + 2 * k + 1]  # [B, L]
            error = ((prediction - self.hogs[k](images)) ** 2).mean(axis=-1)  # [B, L]
            losses.append((error * mask).sum() / mask.sum())
        losses = ops.stack(losses)
        return losses.sum(), losses


def relations(coordinates: np.ndarray, window: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of N tokens attend to which: coordinates [N, 2] -> index int32 [N, N] into a bias table, mask [N, N]."""
    row, column = coordinates.T
    offset = (window - shift) % window
    same = (row + offset)[:, None] // window == (row + offset) // window
    same &= (column + offset)[:, None] // window == (column + offset) // window
    index = (row[:, None] - row + window - 1) * (2 * window - 1) + column[:, None] - column + window - 1
    return np.where(same, index, 0).astype(np.int32), np.where(same, 0, -100).astype(np.float32)


def mask_arrays(masking: UnitMasking, hidden: np.ndarray, batch_size: int) -> tuple[np.ndarray, ...]:
    """The inputs of `PlainSwin` after the images, for the hidden units [units] of a mask.

    Visible tokens are unit by unit, and row by row inside a unit.
    """
    arrays = [np.sort(masking.tokens[0][~hidden], axis=1).reshape(-1).astype(np.int32)]
    for stage, tokens, coordinates in zip(masking.stages, masking.tokens, masking.coordinates):
        order = np.argsort(tokens, axis=1)[..., None]  # [units, r*r, 1]
        seen = np.take_along_axis(coordinates, order, axis=1)[~hidden].reshape(-1, 2)  # [K_s, 2]
        for shift in stage.shifts:
            arrays += relations(seen, stage.window, shift)
    for tokens in masking.tap_tokens:
        tokens = np.sort(tokens, axis=1)
        shuffle = np.concatenate([tokens[~hidden].reshape(-1), tokens[hidden].reshape(-1)])
        weights = np.ones(shuffle.size, np.float32)
        weights[tokens[~hidden]] = 0
        arrays += [np.argsort(shuffle).astype(np.int32), np.tile(weights, (batch_size, 1))]
    return tuple(arrays)


def both(argv: list[str], batch_size: int):
    """The package's model with its inputs, and the plain one with the same weights, images and mask with its own.

    Raises:
        UserError: The recipe is none of a Swin with HOG at scale 1 after every stage, gradients not isolated.
    """
    config = load_config(argv)
    theirs = build_model(config)
    masking = build_masking(config, theirs)
    if not (
        isinstance(masking, UnitMasking)
        and isinstance(theirs.target, HogTarget)
        and theirs.encoder.taps == tuple(range(len(theirs.encoder.stages)))
        and all(decoder.scale == 1 for decoder in theirs.decoders)
        and not theirs.encoder.isolated
    ):
        raise UserError("plain_swin needs a Swin recipe with HOG at scale 1 after every stage, gradients not isolated")
    encoder = theirs.encoder
    shape = (batch_size, encoder.in_chans, *encoder.image_size)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    mask = masking(0, np.arange(batch_size))
    plain = PlainSwin(theirs, masking.quirks)
    copy_weights(theirs, plain)
    return (theirs, (images, *mask.arrays())), (plain, (images, *mask_arrays(masking, mask.hidden, batch_size)))


def copy_weights(source: nn.Cell, target: nn.Cell) -> None:
    """Trainable parameters by name; RunError unless both have the same ones."""
    weights = {n: p for n, p in source.parameters_and_names() if p.requires_grad}
    places = {n: p for n, p in target.parameters_and_names() if p.requires_grad}
    if weights.keys() != places.keys():
        raise RunError(f"parameters that only one model has: {sorted(weights.keys() ^ places.keys())}")
    for name, parameter in places.items():
        parameter.set_data(Tensor(weights[name].asnumpy()))


def build(argv: list[str], batch_size: int):
    """The plain model with the recipe's weights, and its inputs: model(*inputs) gives (loss, losses [taps])."""
    return both(argv, batch_size)[1]


def check(argv: list[str], batch_size: int) -> dict[str, float | list[float]]:
    """Both models' losses on the same weights, images and mask, and their largest difference."""
    results = {}
    for name, (model, inputs) in zip(("ours", "plain"), both(argv, batch_size)):
        loss, losses = model(*map(Tensor, inputs))
        results[name] = [float(loss.asnumpy()), *losses.asnumpy().tolist()]
    difference = max(abs(a - b) for a, b in zip(results["ours"], results["plain"]))
    gc.collect()
    return {"difference": difference, **results}


def main(argv: list[str]) -> None:
    """Prints one JSON line: of both models the loss, then its parts.

    Raises:
        RunError: They differ.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments, rest = parser.parse_known_args(argv)
    set_device("CPU")
    ms.set_seed(0)
    result = check(["--config", arguments.config, *rest], arguments.batch_size)
    print(json.dumps(result))
    if not result["difference"] <= TOLERANCE:
        raise RunError(f"the losses differ by {result['difference']:g}, more than {TOLERANCE:g}")


if __name__ == "__main__":
    sys.exit(cli.run(main))

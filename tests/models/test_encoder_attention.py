"""What an encoder says it attends to is what its blocks mix values by, whatever tells them of relative places."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import plain
from localmim.models.convvit import ConvViT
from localmim.models.layers import Attended
from localmim.models.swin import SwinTransformer
from localmim.models.vit import VisionTransformer

VIT = {"image_size": (16, 24), "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}
CONVVIT = {"image_size": (64, 48), "embed_dims": (4, 4, 8), "depths": (1, 1, 2), "num_heads": 2}
SWIN = {"image_size": (20, 16), "patch_size": 2, "embed_dim": 4, "num_heads": (1, 2), "window_size": 4}


@pytest.fixture(autouse=True)
def eager():
    """PyNative mode: each model runs once."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def shaken(encoder: nn.Cell) -> nn.Cell:
    """All weights and tables away from where they start."""
    rng = np.random.default_rng(0)
    for p in encoder.get_parameters():
        p.set_data(Tensor((p.asnumpy() + rng.normal(size=p.shape) * 0.3).astype(np.float32)))
    return encoder


def images_of(encoder: nn.Cell) -> Tensor:
    return Tensor(np.random.default_rng(1).normal(size=(2, 3, *encoder.image_size)).astype(np.float32))


def check_mixes(block: nn.Cell, x: Tensor, y: Tensor, weights: Tensor, attended: Attended) -> None:
    """The block's output y of rows x is what these weights make of its values, and each row of them sums to 1.

    What is no patch is the class token where x has one, row 0, else what fills a grid up and is zero after the norm.
    """
    weights = weights.asnumpy()  # [B, G, nh, S, S]
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert weights.shape[1::3] == attended.tokens.shape == attended.windows.shape
    apart = attended.windows[:, :, None] != attended.windows[:, None]  # [G, S, S]
    assert (weights.transpose(1, 3, 4, 0, 2)[apart] == 0).all()
    B, N, D = x.shape
    nh, classes = weights.shape[2], N - attended.grid[0] * attended.grid[1]
    _, _, v = np.split(block.attn.qkv(block.norm1(x)).asnumpy(), 3, axis=2)
    filler = v[:, :1] if classes else np.broadcast_to(block.attn.qkv.bias.asnumpy()[2 * D :], (B, 1, D))
    v = np.concatenate([v[:, classes:], filler], axis=1)[:, attended.tokens]  # [B, G, S, D], token -1 the last row
    v = v.reshape(*v.shape[:3], nh, D // nh).transpose(0, 1, 3, 2, 4)
    mixed = (weights @ v).transpose(0, 1, 3, 2, 4).reshape(*weights.shape[:2], -1, D)
    rows = np.full((B, N, D), np.nan, np.float32)
    rows[:, :classes] = mixed[:, 0, :classes]
    rows[:, classes + attended.tokens[attended.tokens >= 0]] = mixed[:, attended.tokens >= 0]  # each patch once
    scales = (block.gamma_1, block.gamma_2) if getattr(block, "gamma_1", None) is not None else (1, 1)
    x = x + block.attn.proj(Tensor(rows)) * scales[0]
    expected = (x + block.mlp(block.norm2(x)) * scales[1]).asnumpy()
    np.testing.assert_allclose(y.asnumpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"taps": (0,)},
        {"mask_token": True, "relative": "shared", "position": "none", "layer_scale": 0.1},
        {"relative": "block"},
        {"mask_token": True, "window": 2, "relative": "contextual"},
    ],
)
def test_vit(kwargs):
    """Plain up to the top tap; BEiT's shared table with layer scale; a table a block; LoMaR's bias, whole images."""
    encoder = shaken(VisionTransformer(**VIT, **kwargs))
    images = images_of(encoder)
    inputs = [encoder.embed(images), *encoder.block_outputs(images)]
    attended = encoder.attended()
    depth = 1 if "taps" in kwargs else 2
    assert [(one.name, one.grid) for one in attended] == [("block 1", (2, 3)), ("block 2", (2, 3))][:depth]
    assert attended[0].tokens.tolist() == [[-1, 0, 1, 2, 3, 4, 5]]
    for i, weights in enumerate(encoder.attention(images)):
        check_mixes(encoder.blocks[i], inputs[i], inputs[i + 1], weights, attended[i])
    assert i == depth - 1


def test_swin():
    """Shifted windows, grids filled up at the right and at the bottom, and no stage above the top tap."""
    encoder = shaken(SwinTransformer(depths=(2, 2), **SWIN))
    images = images_of(encoder)
    stages, weights, attended = encoder.whole_blocks(images), encoder.attention(images), encoder.attended()
    names = [f"stage {s}, block {j}" for s in (1, 2) for j in (1, 2)]
    assert [one.name for one in attended] == names and len(weights) == 4
    for n, (one, found) in enumerate(zip(attended, weights)):
        s, j = divmod(n, 2)
        tokens, regions = plain.rolled_windows(one.grid, 4, (0, encoder.stages[s].shifts[-1])[j])
        np.testing.assert_array_equal(one.tokens, tokens)
        np.testing.assert_array_equal(
            one.windows[:, :, None] == one.windows[:, None], regions[:, :, None] == regions[:, None]
        )
        check_mixes(encoder.layers[s].blocks[j], stages[s][j], stages[s][j + 1], found, one)
    assert (attended[0].tokens < 0).any() and encoder.stages[0].shifts == (0, 2)
    lower = SwinTransformer(depths=(1, 1), taps=(0,), **SWIN)
    assert [one.name for one in lower.attended()] == ["stage 1, block 1"] and len(lower.attention(images)) == 1


def test_convvit():
    """Only stage 3 attends; in detection's windows, some of them cut off, or over the whole grid."""
    encoder = shaken(ConvViT(window_size=3, global_blocks=(1,), **CONVVIT))
    images = images_of(encoder)
    outputs, attended = encoder.block_outputs(images), encoder.attended()
    inputs = [encoder.embed_third(outputs[1], ()), *outputs[2:]]
    assert [(one.name, one.tokens.shape) for one in attended] == [
        ("stage 3, block 1", (2, 9)),
        ("stage 3, block 2", (1, 12)),
    ]
    assert (attended[0].tokens < 0).sum() == 6
    weights = encoder.attention(images)
    for i, block in enumerate(encoder.blocks3):
        check_mixes(block, inputs[i], inputs[i + 1], weights[i], attended[i])
    assert (weights[0].asnumpy()[:, 1, :, :, attended[0].tokens[1] < 0] == 0).all()

"""Layers against float64 numpy: values, gradients, shapes, and what a block may leave out."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import plain
from localmim.convert.load import weights_of
from localmim.models.layers import (
    Attention,
    Block,
    LayerNorm,
    Linear,
    PatchEmbed,
    Project,
    patchify,
    set_compute_dtype,
    sincos_position_code,
    take_rows,
    to_pair,
    torch_default_init,
)
from localmim.models.operators import AddBias, Gelu, Transpose


def test_gelu_is_exact():
    """The fitted polynomial must be as good as float32 erf everywhere, far out and at the ends of float32 too."""
    x = np.concatenate([np.linspace(-14, 14, 280_001), [-1e20, -1e4, -100, -0.0, 100, 1e4, 1e20]]).astype(np.float32)
    out, (dx,), _ = plain.backward(Gelu(), np.ones_like(x), x)
    wide = x.astype(np.float64)
    near = np.abs(x) <= 14
    assert np.abs(out - plain.gelu(wide))[near].max() <= 7e-7
    np.testing.assert_array_equal(out[~near], np.maximum(x[~near], 0))
    density = np.exp(-np.square(np.minimum(np.abs(wide), 50)) / 2) / np.sqrt(2 * np.pi)
    slope = 0.5 * (1 + plain.erf(wide / np.sqrt(2))) + wide * density
    assert np.abs(dx - slope)[near].max() <= 1e-6
    np.testing.assert_array_equal(dx[~near], np.where(np.signbit(x), 0.0, 1.0)[~near] - 0.5 * (x == 0)[~near])


def test_gelu_of_float16_is_computed_in_float32():
    """Powers of x up to the twelfth overflow float16 from 2.5 on."""
    x = np.linspace(-60000, 60000, 97).astype(np.float16)
    out = Gelu()(Tensor(x)).asnumpy()
    assert out.dtype == np.float16
    np.testing.assert_array_equal(out, np.maximum(x, 0))


@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["ordinary", "eps as large as the variance"])
def test_layer_norm(size):
    """The hand-written backward pass; at the second size another eps than 1e-6 would be off by tens of percent."""
    rng = np.random.default_rng(1)
    x = (rng.normal(0.5, 1, (3, 4, 24)) * size).astype(np.float32)
    dy = rng.normal(0, 1, x.shape).astype(np.float32)
    norm = plain.randomise(LayerNorm(24), 2)
    gamma, beta = (p.asnumpy().astype(np.float64) for p in (norm.gamma, norm.beta))
    out, (dx,), grads = plain.backward(norm, dy, x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(out, plain.layer_norm(wide, gamma, beta), atol=2e-6, rtol=0)
    std = np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    normed = (wide - wide.mean(-1, keepdims=True)) / std
    dn = dy * gamma
    expected = (dn - dn.mean(-1, keepdims=True) - normed * (dn * normed).mean(-1, keepdims=True)) / std
    np.testing.assert_allclose(dx, expected, atol=2e-6 * np.abs(expected).max(), rtol=0)
    np.testing.assert_allclose(grads["gamma"], (dy * normed).sum((0, 1)), atol=1e-5, rtol=0)
    np.testing.assert_allclose(grads["beta"], dy.sum((0, 1), dtype=np.float64), atol=1e-5, rtol=0)


def test_layer_norm_returns_float32():
    """Under fp16 the residual stream and its norms stay in float32."""
    assert LayerNorm(8)(Tensor(np.ones((2, 8), np.float16))).dtype == ms.float32


def test_add_bias_and_linear_gradients():
    """Their bias gradient is a product with ones, written by hand; more than two axes must fold into rows."""
    rng = np.random.default_rng(3)
    x, b = rng.normal(size=(6, 5)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    dy = rng.normal(size=(6, 5)).astype(np.float32)
    out, (dx, db), _ = plain.backward(AddBias(), dy, x, b)
    np.testing.assert_array_equal(out, x + b)
    np.testing.assert_array_equal(dx, dy)
    np.testing.assert_allclose(db, dy.sum(0), atol=1e-6)

    linear = plain.randomise(Linear(4, 5), 4)
    x, dy = rng.normal(size=(2, 3, 4)).astype(np.float32), dy.reshape(2, 3, 5)
    out, (dx,), grads = plain.backward(linear, dy, x)
    w = linear.weight.asnumpy()
    np.testing.assert_allclose(out, x @ w.T + linear.bias.asnumpy(), atol=1e-6)
    np.testing.assert_allclose(dx, dy @ w, atol=1e-6)
    np.testing.assert_allclose(grads["weight"], np.einsum("bno,bni->oi", dy, x), atol=2e-6)
    np.testing.assert_allclose(grads["bias"], dy.sum((0, 1)), atol=1e-6)


class ProductProject(nn.Cell):
    """A projection whose weight is computed, as in the decoders' heads."""

    def __init__(self):
        super().__init__()
        self.project = Project()

    def construct(self, x, a, b, bias):
        return self.project(x, ops.matmul(a, b), bias, ms.float32)


def test_project_hands_gradients_to_a_computed_weight():
    """The decoders multiply two layers' weights first: both must learn."""
    rng = np.random.default_rng(5)
    x, a, b, bias = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 4), (6, 5), (5, 4), (6,)))
    dy = rng.normal(size=(2, 3, 6)).astype(np.float32)
    out, (dx, da, db, dbias), _ = plain.backward(ProductProject(), dy, x, a, b, bias)
    np.testing.assert_allclose(out, x @ (a @ b).T + bias, atol=1e-5)
    dw = np.einsum("bno,bni->oi", dy, x)
    for got, expected in ((dx, dy @ (a @ b)), (da, dw @ b.T), (db, a.T @ dw), (dbias, dy.sum((0, 1)))):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.fixture(scope="module")
def small_block():
    return plain.randomise(Block(24, 3), 6)


def test_block_equals_float64(small_block):
    """Pre-norm, q then k then v, heads in order, exact GELU: a slip in any of them shows here."""
    x = np.random.default_rng(7).normal(size=(2, 9, 24)).astype(np.float32)
    expected = plain.block(x.astype(np.float64), weights_of(small_block), 3)
    np.testing.assert_allclose(small_block(Tensor(x)).asnumpy(), expected, atol=1e-5 * np.abs(expected).max())


class Suffix(nn.Cell):
    """The last rows of a block, left out by the block itself or cut off afterwards."""

    def __init__(self, block: nn.Cell, skip: int, cut: bool):
        super().__init__()
        self.block, self.skip, self.cut = block, skip, cut

    def construct(self, x):
        return self.block(x)[:, self.skip :] if self.cut else self.block(x, self.skip)


def test_block_with_skip_is_the_suffix_of_the_whole_block(small_block):
    """Rows that nobody reads are not computed: values and gradients of the others stay, those of the skipped too."""
    rng = np.random.default_rng(8)
    x, dy = rng.normal(size=(2, 9, 24)).astype(np.float32), rng.normal(size=(2, 5, 24)).astype(np.float32)
    out, (dx,), grads = plain.backward(Suffix(small_block, 4, cut=False), dy, x)
    out_cut, (dx_cut,), grads_cut = plain.backward(Suffix(small_block, 4, cut=True), dy, x)
    np.testing.assert_allclose(out, out_cut, atol=1e-5)
    np.testing.assert_allclose(dx, dx_cut, atol=1e-5 * np.abs(dx_cut).max())
    assert np.abs(dx[:, :4]).max() > 1e-2  # skipped rows are attended to, so they have a gradient
    assert len(grads) == 12 and grads.keys() == grads_cut.keys()
    for name, expected in grads_cut.items():
        np.testing.assert_allclose(grads[name], expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_compute_dtype():
    """fp16 multiplies in float16, and gives the residual stream and the parameters back in float32."""
    block = plain.randomise(Block(16, 2), 9)
    x = np.random.default_rng(10).normal(size=(2, 5, 16)).astype(np.float32)
    exact = block(Tensor(x)).asnumpy()
    half = plain.randomise(set_compute_dtype(Block(16, 2), ms.float16), 9)
    out = half(Tensor(x))
    assert out.dtype == ms.float32
    assert {p.dtype for p in half.get_parameters()} == {ms.float32}
    assert 0 < np.abs(out.asnumpy() - exact).max() < 1e-2 * np.abs(exact).max()


def test_attention_refuses_a_width_that_heads_do_not_divide():
    """Otherwise a reshape fails deep inside a compile."""
    with pytest.raises(ValueError, match="width 10 is not a multiple of 4 heads"):
        Attention(10, 4)


def test_patchify_order():
    """Row-major patches on a rectangle, and inside one channel, row, column: what a convolution kernel holds."""
    B, C, H, W, ph, pw = 2, 3, 4, 6, 2, 3
    x = np.arange(B * C * H * W, dtype=np.float32).reshape(B, C, H, W)
    got = patchify(Tensor(x), (ph, pw), Transpose()).asnumpy()
    assert got.shape == (B, 4, C * ph * pw)
    for n, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        patch = x[:, :, i * ph : (i + 1) * ph, j * pw : (j + 1) * pw]
        np.testing.assert_array_equal(got[:, n], patch.reshape(B, -1))


def test_take_rows():
    """Rows of each sample by its own indices; an offset that is wrong for the second sample would show."""
    x = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
    ids = np.array([[3, 0], [1, 1]], np.int32)
    got = take_rows(Tensor(x), Tensor(ids)).asnumpy()
    np.testing.assert_array_equal(got, np.take_along_axis(x, ids[..., None].astype(int), 1))


@pytest.mark.parametrize("chans", [1, 4])
def test_patch_embed_is_a_convolution(chans):
    """Pre-trained convolution weights go in as they are, and only the patches that are asked for come out."""
    rng = np.random.default_rng(11)
    embed = plain.randomise(PatchEmbed(4, chans, 6), 12)
    x = rng.normal(size=(2, chans, 8, 12)).astype(np.float32)
    conv = ops.conv2d(Tensor(x), embed.weight, embed.bias, stride=4).asnumpy()  # [B, 6, 2, 3]
    rows = conv.reshape(2, 6, 6).transpose(0, 2, 1)
    np.testing.assert_allclose(embed(Tensor(x)).asnumpy(), rows, atol=1e-5)
    ids = np.array([[5, 2], [0, 3]], np.int32)
    got = embed(Tensor(x), Tensor(ids)).asnumpy()
    np.testing.assert_allclose(got, np.take_along_axis(rows, ids[..., None].astype(int), 1), atol=1e-5)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_sincos_position_code(grid):
    """Column first, row second, on a rectangle: exchanging them goes unseen on a square with symmetric data."""
    dim = 8
    code = sincos_position_code(dim, grid)
    assert code.shape == (grid[0] * grid[1], dim) and code.dtype == np.float32
    for i in range(grid[0]):
        for j in range(grid[1]):
            w = [10000 ** (-m / (dim / 4)) for m in range(dim // 4)]
            parts = [f(c * a) for c, f in ((j, np.sin), (j, np.cos), (i, np.sin), (i, np.cos)) for a in w]
            np.testing.assert_array_equal(code[i * grid[1] + j], np.array(parts, np.float32))


def test_sincos_refuses_other_widths():
    """Four parts of one length."""
    with pytest.raises(ValueError, match="multiple of 4, got 10"):
        sincos_position_code(10, (2, 2))


def test_to_pair():
    """One number or (height, width), nothing else."""
    assert to_pair(8) == (8, 8) and to_pair([4, 6]) == (4, 6)
    with pytest.raises(ValueError, match="one number or"):
        to_pair([1, 2, 3])


def test_initial_values():
    """Bounds of PyTorch's and Xavier's uniform draws decide how the first epochs go."""
    ms.set_seed(0)
    weight = Linear(300, 900).weight.asnumpy()
    bound = np.sqrt(6 / 1200)
    assert 0.99 * bound < np.abs(weight).max() <= bound and abs(weight.mean()) < 1e-3
    embed = PatchEmbed(4, 3, 96)
    for values, limit in ((embed.weight, np.sqrt(6 / (48 + 96))), (embed.bias, 1 / np.sqrt(48))):
        assert 0.9 * limit < np.abs(values.asnumpy()).max() <= limit
    assert torch_default_init(25).scale == pytest.approx(0.2)

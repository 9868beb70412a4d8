"""SimMIM on a Swin: what is composed, how it starts, what decays; numbers are compared by the golden files."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from localmim.convert.load import weights_of
from localmim.convert.simmim import from_torch, to_torch
from localmim.mim.cells import rows_to_grid
from localmim.mim.replaced_masking import spread
from localmim.mim.simmim import simmim_swin
from localmim.models.layers import LayerNorm
from localmim.models.swin import SwinTransformer
from localmim.training.optimizer import pretraining_groups

TINY = {"image_size": (64, 96), "in_chans": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}


@pytest.fixture(scope="module")
def eager():
    """PyNative mode: quicker than compiling where a model runs once or twice."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture(scope="module")
def model(eager):
    """Two stages, so tokens of 8 px at the tap and squares of 4 x 4 of them."""
    return simmim_swin(**TINY)


@pytest.fixture(scope="module")
def mask(model):
    return model.masking(0.6, 0)(0, np.arange(2))


def images(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 2, 64, 96)).astype(np.float32)


def latents(model, x: np.ndarray, mask) -> np.ndarray:
    return model.encoder(Tensor(x), *map(Tensor, mask.arrays()))[0].asnumpy()


def test_loss_is_the_authors_formula(model, mask):
    """On the image that their pixel shuffle makes: |x - y| over hidden pixels, / (pixels + 1e-5) / channels."""
    x, arrays = images(), list(map(Tensor, mask.arrays()))
    loss, losses = model(Tensor(x), *arrays)
    (rows,) = model.predict(Tensor(x), *arrays)
    grid = rows_to_grid(rows.asnumpy(), 1.0, mask.ids_mask, (8, 12))
    y = grid.reshape(2, 8, 12, 2, 8, 8).transpose(0, 3, 1, 4, 2, 5).reshape(x.shape)
    hidden = spread(mask.units, (64, 96))[:, None].astype(np.float64)
    assert hidden.sum() == 2 * 4 * 32 * 32  # 4 of 2 x 3 squares
    difference = np.abs(x.astype(np.float64) - np.nan_to_num(y)) * hidden
    expected = difference.sum() / (hidden.sum() + 1e-5) / 2
    assert float(loss.asnumpy()) == pytest.approx(expected, rel=1e-6)
    assert losses.shape == (1,)


def test_hidden_pixels_are_not_seen(model, mask):
    """The token takes the place of all that was embedded of a hidden square; visible squares reach every latent."""
    hidden = spread(mask.units, (64, 96))[:, None]
    x, other = images(0), images(1)
    before = latents(model, x, mask)
    np.testing.assert_array_equal(latents(model, np.where(hidden, other, x), mask), before)
    moved = latents(model, np.where(hidden, x, other), mask)
    assert (np.abs(moved - before).max(-1) > 0).all()


def test_token_is_for_masks_only(model, mask):
    """Features of a whole image do not depend on the token; with a mask everything does."""
    token = model.encoder.mask_token
    x, kept = images(), token.asnumpy()
    features, before = model(Tensor(x)).asnumpy(), latents(model, x, mask)
    token.set_data(Tensor(np.random.default_rng(0).normal(size=kept.shape).astype(np.float32)))
    try:
        np.testing.assert_array_equal(model(Tensor(x)).asnumpy(), features)
        assert (np.abs(latents(model, x, mask) - before).max(-1) > 0).all()
    finally:
        token.set_data(Tensor(kept))


def test_first_weights():
    """N(0, 0.02) for matrices and tables, the default of a convolution for the first and the last layer."""
    arrays = weights_of(simmim_swin(image_size=64, embed_dim=64, depths=(1, 1), num_heads=(1, 1), window_size=4))
    for name in ("encoder.layers.0.blocks.0.mlp.fc1.weight", "encoder.layers.0.downsample.reduction.weight"):
        assert arrays[name].std() == pytest.approx(0.02, rel=0.05), name
    table = arrays["encoder.layers.0.blocks.0.attn.relative_position_bias_table"]
    assert table.std() == pytest.approx(0.02, rel=0.4)
    for name, fan_in in (("encoder.patch_embed", 48), ("decoders.0.pred", 128)):
        for part in ("weight", "bias"):
            size = np.abs(arrays[f"{name}.{part}"]).max()
            assert 0.7 / fan_in**0.5 < size <= 1 / fan_in**0.5 + 1e-6, name
    assert not arrays["encoder.layers.0.blocks.0.mlp.fc1.bias"].any()


def test_norms_have_eps_1e_5(model):
    """The official Swin's, which SimMIM keeps, the tap's norm included."""
    eps = {cell.eps for _, cell in model.cells_and_names() if isinstance(cell, LayerNorm)}
    assert eps == {1e-5}


@pytest.mark.parametrize("quirks", [False, True])
def test_what_decays(quirks):
    """Tables of relative places decay by the authors' mistake only; the token and 1-D tensors never."""
    model = simmim_swin(**TINY, reference_quirks=quirks)
    groups = pretraining_groups(dict(model.parameters_and_names()), model.encoder.no_decay)
    assert groups["encoder.layers.0.blocks.1.attn.relative_position_bias_table"].decays == quirks
    assert not groups["encoder.mask_token"].decays and not groups["encoder.patch_norm.gamma"].decays
    assert groups["encoder.patch_embed.weight"].decays and groups["decoders.0.pred.weight"].decays


def test_names_there_and_back(model):
    """The head is a 1x1 convolution there; buffers are written, and left out when read."""
    ours = weights_of(model)
    theirs = to_torch(ours, model.encoder.stages)
    assert theirs["decoder.0.weight"].shape == (2 * 8 * 8, 16, 1, 1)
    assert {"encoder.norm.weight", "encoder.mask_token", "encoder.layers.0.blocks.1.attn_mask"} <= theirs.keys()
    back = from_torch(theirs, list(ours))
    assert back.keys() == ours.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mask_size": 12}, "mask_size 12 must be a multiple of 8 px"),
        ({"mask_size": 64}, "divide the 64x96 px"),
        ({"target": "edges"}, "target 'edges'"),
        ({"depths": 2}, "depths 2 must be a list"),
    ],
)
def test_refuses(change, said):
    """Sizes that do not fit together are one line that names the argument."""
    with pytest.raises(ValueError, match=said):
        simmim_swin(**{**TINY, **change})


def test_tap_is_the_last_stage():
    """Where hidden patches are replaced, masks are told at one grid only."""
    with pytest.raises(ValueError, match=r"taps \[0\] must be \[1\]"):
        SwinTransformer(64, depths=(1, 1), num_heads=(1, 1), taps=(0,), mask_token=True)

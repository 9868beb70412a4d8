"""GreenMIM on a Swin: what is composed, and the authors' order of visible tokens; numbers are the golden files'."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from localmim.convert.greenmim import from_torch, to_torch
from localmim.convert.load import weights_of
from localmim.mim.greenmim import ShuffledUnitMasking, greenmim_swin
from localmim.mim.unit_masking import UnitMasking
from localmim.training.optimizer import pretraining_groups

TINY = {"image_size": (64, 96), "embed_dim": 8, "depths": (2, 1, 1), "num_heads": (1, 2, 2), "window_size": 3}
DECODER = {"decoder_dim": 16, "decoder_heads": 2}
ORDER = np.array([7, 2, 11, 20, 0, 5] + [i for i in range(24) if i not in (7, 2, 11, 20, 0, 5)])


@pytest.fixture(scope="module")
def eager():
    """PyNative mode: quicker than compiling where a model runs once or twice."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture(scope="module")
def model(eager):
    """Three stages: 4 x 6 squares of 16 px, of which a quarter is seen."""
    return greenmim_swin(**TINY, **DECODER)


def masks(model):
    """A mask in the right order, and the same one as the authors' decoder takes it."""
    return [kind(model.encoder, 0.75, 0).of_order(ORDER, 2) for kind in (UnitMasking, ShuffledUnitMasking)]


def test_published_sizes():
    """12 of 49 squares of 32 px are seen by the encoder, and 3072 pixels predicted for each of the others."""
    model = greenmim_swin(embed_dim=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), **DECODER)
    mask = model.masking(0.75, 0)(0, np.arange(1))
    assert mask.patches.shape == (12 * 64,) and mask.tap(0).ids_mask.shape == (1, 37)
    assert model.target.dims == [3072] and model.cell_sides() == [32]


def test_quirk_is_in_the_masks_alone(model):
    """The encoder sees the same, and the same is hidden: only where the decoder puts visible tokens differs."""
    right, theirs = masks(model)
    assert right.tap(0).ids_keep[0].tolist() == [0, 2, 5, 7, 11, 20]
    assert theirs.tap(0).ids_keep[0].tolist() == [7, 2, 11, 20, 0, 5]
    np.testing.assert_array_equal(np.sort(theirs.tap(0).ids_mask), right.tap(0).ids_mask)
    np.testing.assert_array_equal(theirs.mask(), right.mask())
    for i, (a, b) in enumerate(zip(right.arrays(), theirs.arrays(), strict=True)):
        if i not in (1, 2, 3):  # those of the tap
            np.testing.assert_array_equal(a, b)
    assert greenmim_swin(**TINY, **DECODER).masking.func is UnitMasking
    quirky = greenmim_swin(**TINY, **DECODER, reference_quirks=True)
    assert quirky.masking.func is ShuffledUnitMasking and not quirky.encoder.rows_first
    draws = [kind(model.encoder, 0.75, 3)(1, np.arange(4, 6)).hidden for kind in (UnitMasking, ShuffledUnitMasking)]
    np.testing.assert_array_equal(*draws)


def test_quirk_exchanges_the_places_of_visible_tokens(model):
    """The decoder on (tokens, their order) is the right decoder on exchanged tokens: what reaches the loss."""
    right, theirs = (mask.tap(0) for mask in masks(model))
    latent = np.random.default_rng(0).normal(size=(2, 6, 32)).astype(np.float32)

    def predicted(x, tap):
        rows = model.decoders[0](Tensor(x), *map(Tensor, tap.arrays())).asnumpy()
        return rows[:, np.argsort(tap.ids_mask[0])]

    exchanged = latent[:, np.argsort(theirs.ids_keep[0])]
    np.testing.assert_allclose(predicted(latent, theirs), predicted(exchanged, right), rtol=0, atol=1e-5)
    assert np.abs(predicted(latent, theirs) - predicted(latent, right)).max() > 1e-3


def test_hidden_pixels_are_not_seen(model):
    """Latents do not depend on masked pixels; the loss does, through its target."""
    mask, rng = masks(model)[0], np.random.default_rng(0)
    x, other = rng.normal(size=(2, 2, 3, 64, 96)).astype(np.float32)
    hidden = np.kron(mask.hidden.reshape(4, 6), np.ones((16, 16))).astype(bool)
    arrays = list(map(Tensor, mask.arrays()))
    changed = np.where(hidden, other, x)
    a, b = (model.encoder(Tensor(v), *arrays)[0].asnumpy() for v in (x, changed))
    np.testing.assert_array_equal(a, b)
    a, b = (float(model(Tensor(v), *arrays)[0].asnumpy()) for v in (x, changed))
    assert np.isfinite(a) and a != b


def test_what_decays(model):
    """Names with position_bias or token do not, beside 1-D tensors and biases."""
    groups = pretraining_groups(dict(model.parameters_and_names()), model.encoder.no_decay)
    kept = {name for name, group in groups.items() if group.decays}
    assert "encoder.layers.0.blocks.0.attn.qkv.weight" in kept and "decoders.0.pred.weight" in kept
    assert not [n for n in kept if n.endswith(("bias_table", "mask_token", "bias", "gamma", "beta"))]


def test_names_there_and_back(model):
    """MAE's names of the decoder, the official Swin's of the encoder."""
    ours = weights_of(model)
    theirs = to_torch(ours)
    some = {"mask_token", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight", "encoder.norm.weight"}
    assert some <= theirs.keys() and not [n for n in theirs if n.endswith("attn_mask")]
    assert "encoder.layers.0.blocks.1.attn.relative_position_index" in theirs
    back = from_torch(theirs, list(ours))
    assert back.keys() == ours.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)

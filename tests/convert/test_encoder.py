"""Pre-training weights in the downstream encoder: nothing missing, and the order of merging as asked for (Q3)."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import localmim
from localmim.convert.encoder import encoder_weights
from localmim.convert.load import load_weights, weights_of
from localmim.errors import UserError
from localmim.models.swin import SwinTransformer
from localmim.models.vit import VisionTransformer

SWIN = {"image_size": 64, "embed_dim": 8, "depths": (2, 2, 1), "num_heads": (1, 2, 2), "window_size": 3}


@pytest.fixture(scope="module")
def trained():
    """A tiny Swin as LocalMIM's code pre-trains it, with weights in which the four blocks of a merging differ."""
    ms.set_seed(0)
    sizes = {**SWIN, "decoder_dim": 16, "decoder_heads": 2}
    model = localmim.create_model("localmim_swin_tiny_patch4_window7_224", reference_quirks=True, **sizes)
    rng = np.random.default_rng(0)
    for name, parameter in model.parameters_and_names():
        if "norm" in name:
            noise = rng.normal(0, 0.3, parameter.shape).astype(np.float32)
            parameter.set_data(Tensor(parameter.asnumpy() + noise))
    return model


def top_map(encoder, images: np.ndarray) -> np.ndarray:
    """The last feature map."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        return encoder.feature_maps(Tensor(images))[-1].asnumpy()
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)


def downstream(model, merging: str) -> SwinTransformer:
    """The official Swin with the model's weights, loaded strictly."""
    encoder = SwinTransformer(**SWIN)
    report = load_weights(encoder, encoder_weights(weights_of(model), merging))
    assert not report.missing and not report.unexpected
    return encoder


def test_permuted_merging_computes_what_was_trained(trained):
    """The official order with permuted weights equals the trained order with its own weights, to the last bits."""
    images = np.random.default_rng(1).normal(size=(2, 3, 64, 64)).astype(np.float32)
    expected = top_map(trained.encoder, images)
    permuted = top_map(downstream(trained, "permute"), images)
    np.testing.assert_allclose(permuted, expected, atol=1e-5 * np.abs(expected).max())
    as_is = top_map(downstream(trained, "as_is"), images)
    assert np.abs(as_is - expected).max() > 0.01 * np.abs(expected).max()


def test_as_is_changes_nothing(trained):
    """What published fine-tuning loads: every array as it was trained."""
    arrays = weights_of(trained)
    for name, array in encoder_weights(arrays).items():
        np.testing.assert_array_equal(array, arrays[f"encoder.{name}"])


def test_permuting_exchanges_two_blocks(trained):
    """Only the merging's three arrays change, and doing it twice gives them back."""
    arrays = weights_of(trained)
    as_is, permuted = encoder_weights(arrays), encoder_weights(arrays, "permute")
    changed = {n for n in as_is if not np.array_equal(as_is[n], permuted[n])}
    assert changed == {
        f"layers.{s}.downsample.{n}" for s in (0, 1) for n in ("reduction.weight", "norm.gamma", "norm.beta")
    }
    weight, other = (w["layers.0.downsample.reduction.weight"].reshape(16, 4, 8) for w in (as_is, permuted))
    for theirs, ours in enumerate((0, 2, 1, 3)):
        np.testing.assert_array_equal(other[:, ours], weight[:, theirs])
    twice = encoder_weights({f"encoder.{n}": a for n, a in permuted.items()}, "permute")
    assert all(np.array_equal(twice[n], as_is[n]) for n in as_is)


def test_vit_encoder_has_nothing_left_over():
    """A ViT's encoder loads strictly too; taps, decoders and targets stay behind."""
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 7, "num_heads": 2}
    model = localmim.create_model("localmim_vit_tiny_patch16_224", decoder_dim=16, decoder_heads=2, **sizes)
    report = load_weights(VisionTransformer(**sizes), encoder_weights(weights_of(model)))
    assert len(report.matched) == 4 + 7 * 12 and not report.unexpected


def test_mistakes_are_one_line():
    """No encoder in the file; a word that is no choice."""
    with pytest.raises(UserError, match="no encoder"):
        encoder_weights({"decoders.0.norm.gamma": np.zeros(3)})
    with pytest.raises(UserError, match="'as_is' or 'permute'"):
        encoder_weights({"encoder.cls_token": np.zeros(3)}, "perm")

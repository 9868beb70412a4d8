"""Classifiers: pooling, stochastic depth, what a probe trains."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import localmim
from localmim.errors import UserError
from plain import Gradients


class LogitSum(nn.Cell):
    """A number that depends on everything in a classifier, and the logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def construct(self, images):
        logits = self.model(images)
        return (logits * logits).sum(), logits


VIT = ("vit_tiny_patch16_224", {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2})
SWIN = (
    "swin_tiny_patch4_window7_224",
    {"image_size": 32, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4},
)
IMAGES = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)


@pytest.fixture()
def pynative():
    """Without compiling: three small models, each run once."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def layer_norm(x, eps=1e-6):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def logits_of(model, pooled):
    return pooled @ model.head.weight.asnumpy().T + model.head.bias.asnumpy()


@pytest.mark.parametrize(("name", "sizes"), [VIT, SWIN], ids=["vit", "swin"])
def test_pooling(name, sizes, pynative):
    """Mean then norm, norm then mean, the class token: each by a line of numpy from the encoder's tokens."""
    for pool in ("mean", "normed_mean", "token"):
        if pool == "token" and name.startswith("swin"):
            continue
        model = localmim.create_model(name, num_classes=5, pool=pool, **sizes)
        first = model.encoder.class_tokens
        tokens = model.encoder.tokens(Tensor(IMAGES)).asnumpy()
        pooled = {
            "mean": layer_norm(tokens[:, first:].mean(1)),
            "normed_mean": layer_norm(tokens)[:, first:].mean(1),
            "token": layer_norm(tokens[:, 0]),
        }[pool]
        np.testing.assert_allclose(model(Tensor(IMAGES)).asnumpy(), logits_of(model, pooled), atol=2e-5)
    features = localmim.create_model(name, **sizes)
    names = {n for n, _ in features.parameters_and_names()}
    assert features(Tensor(IMAGES)).shape == (3, model.encoder.embed_dim)
    assert all(n.startswith("encoder.") for n in names)


@pytest.mark.parametrize(("name", "sizes"), [VIT, SWIN], ids=["vit", "swin"])
def test_drop_path_is_by_sample_and_branch(name, sizes):
    """All factors zero in a block: the block is the identity for that sample, and for no other sample."""
    model = localmim.create_model(name, num_classes=5, drop_path=0.3, **sizes)
    depth = len(model.drop_rates)
    assert model.drop_rates == pytest.approx(np.linspace(0, 0.3, depth))
    drop = np.ones((depth, 2, 3), np.float32)
    kept = model(Tensor(IMAGES), Tensor(drop)).asnumpy()
    np.testing.assert_allclose(kept, model(Tensor(IMAGES)).asnumpy(), atol=1e-6)
    drop[:, :, 1] = 0
    dropped = model(Tensor(IMAGES), Tensor(drop)).asnumpy()
    np.testing.assert_allclose(dropped[[0, 2]], kept[[0, 2]], atol=1e-6)
    assert np.abs(dropped[1] - kept[1]).max() > 1e-3
    if name.startswith("vit"):  # with every branch of every block gone, only the embedding is left
        embedded = model.encoder.embed(Tensor(IMAGES)).asnumpy()
        np.testing.assert_allclose(dropped[1], logits_of(model, layer_norm(embedded[1, 1:].mean(0))), atol=2e-5)
    drop[:, 0, 1] = 1  # attention back, MLP still gone
    half = model(Tensor(IMAGES), Tensor(drop)).asnumpy()
    assert np.abs(half[1] - dropped[1]).max() > 1e-4 and np.abs(half[1] - kept[1]).max() > 1e-4


def test_a_probe_trains_its_head_alone():
    """Gradients exist for head.weight and head.bias only; batch statistics in training, running ones after."""
    name, sizes = VIT
    model = localmim.create_model(name, num_classes=5, probe=True, **sizes)
    trained = [n for n, p in model.parameters_and_names() if p.requires_grad]
    assert trained == ["head.weight", "head.bias"]
    model.set_train(True)
    features = model.encoder.features(Tensor(IMAGES)).asnumpy()
    normed = (features - features.mean(0)) / np.sqrt(features.var(0) + 1e-6)
    np.testing.assert_allclose(model(Tensor(IMAGES)).asnumpy(), logits_of(model, normed), rtol=1e-3, atol=1e-4)
    model.set_train(False)
    mean, variance = model.norm.moving_mean.asnumpy(), model.norm.moving_variance.asnumpy()
    np.testing.assert_allclose(mean, 0.1 * features.mean(0), rtol=1e-4, atol=1e-6)
    expected = logits_of(model, (features - mean) / np.sqrt(variance + 1e-6))
    np.testing.assert_allclose(model(Tensor(IMAGES)).asnumpy(), expected, rtol=1e-3, atol=1e-4)


def test_every_parameter_of_a_classifier_learns():
    """No parameter is left out of the logits, the position codes included."""
    for name, sizes in (VIT, SWIN):
        model = localmim.create_model(name, num_classes=5, **sizes)
        trainable = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
        assert len(trainable) == len(list(model.parameters_and_names()))
        gradients = Gradients(LogitSum(model), None, ms.ParameterTuple(trainable.values()))(Tensor(IMAGES))[1]
        silent = [n for n, g in zip(trainable, gradients) if not np.abs(g.asnumpy()).max() > 0]
        assert not silent


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"pool": "max"}, "pool 'max' is none of"),
        ({"num_classes": 1}, "num_classes is 1, expected at least 2"),
        ({"num_classes": 3, "drop_path": 1.0}, "drop_path is 1.0"),
        ({"probe": True}, "a linear probe needs at least 2"),
        ({"probe": True, "num_classes": 3, "pool": "normed_mean"}, "norms before pooling"),
        ({"taps": [1]}, "unexpected keyword argument 'taps'"),
    ],
)
def test_wrong_arguments(kwargs, said):
    """One line that names the argument."""
    with pytest.raises(UserError, match=said):
        localmim.create_model(VIT[0], **{**VIT[1], **kwargs})


def test_a_class_token_is_needed():
    """A Swin has none."""
    with pytest.raises(UserError, match="needs a class token"):
        localmim.create_model(SWIN[0], num_classes=3, pool="token", **SWIN[1])

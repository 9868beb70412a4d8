"""BEiT and SimMIM on a ViT: losses by the formula, weights that learn, their start, and what they refuse."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import localmim
import plain
from localmim.errors import UserError
from localmim.mim.beit import beit_vit
from localmim.mim.simmim import simmim_vit

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "in_chans": 2}


class Outputs(nn.Cell):
    """Loss, and the predictions beside it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def construct(self, images, *arrays):
        return self.model(images, *arrays)[0], self.model.predict(images, *arrays)[0]


class Run:
    """A tiny model that is compiled once: loss, predictions and gradients of two images."""

    def __init__(self, model, ratio: float, targets: tuple[np.ndarray, ...] = ()):
        self.model, self.targets = model, targets
        self.images = np.random.default_rng(0).normal(size=(2, 2, *model.encoder.image_size)).astype(np.float32)
        self.mask = model.masking(ratio, 0)(0, np.arange(2))
        self.weights = dict(model.parameters_and_names())
        self.graph = plain.Gradients(Outputs(model), None, ms.ParameterTuple(self.weights.values()))

    def __call__(self):
        (loss, rows), gradients = self.graph(*(Tensor(a) for a in (self.images, *self.mask.arrays(), *self.targets)))
        return float(loss.asnumpy()), rows.asnumpy(), {n: g.asnumpy() for n, g in zip(self.weights, gradients)}


@pytest.fixture(scope="module")
def beit():
    ms.set_seed(0)
    ids = np.random.default_rng(1).integers(0, 7, (2, 3, 4)).astype(np.int32)
    return Run(beit_vit(**TINY, image_size=(48, 64), vocab=7), 0.5, (ids,))


@pytest.fixture(scope="module")
def simmim():
    ms.set_seed(0)
    return Run(simmim_vit(**{**TINY, "depth": 1}, image_size=(64, 96)), 0.6)


def test_cross_entropy_over_all_hidden_patches(beit):
    """Of the true ids at hidden patches, averaged over the batch."""
    loss, logits, _ = beit()
    (ids,) = beit.targets
    assert beit.mask.ids_mask.shape == (2, 6)
    wanted = np.take_along_axis(ids.reshape(2, -1), beit.mask.ids_mask.astype(int), 1)
    shares = np.take_along_axis(plain.softmax(logits.astype(np.float64)), wanted[..., None], -1)
    assert loss == pytest.approx(-np.log(shares).mean(), rel=1e-5)


def test_absolute_error_of_hidden_squares(simmim):
    """Raw pixels, ordered (channel, row, column): the input itself, square by square of 32 px."""
    loss, rows, _ = simmim()
    assert simmim.model.encoder.mask_grid == (2, 3) and simmim.mask.ids_mask.shape == (2, 4 * math.ceil(6 * 0.6))
    hidden = simmim.mask.units.repeat(2, 1).repeat(2, 2)
    patches = simmim.images.reshape(2, 2, 4, 16, 6, 16).transpose(0, 2, 4, 1, 3, 5)[hidden].reshape(2, -1, 512)
    assert loss == pytest.approx(np.abs(rows - patches).mean(), rel=1e-5)


@pytest.mark.parametrize("which", ["beit", "simmim"])
def test_every_weight_learns_but_the_bias_of_keys(which, request):
    """Shared bias table, tokens and layer scale included. A key's bias cannot change a softmax: its gradient is 0."""
    _, _, gradients = request.getfixturevalue(which)()
    assert [n for n, g in gradients.items() if not 0 < np.abs(g).max() < np.inf] == []
    assert {"encoder.relative.table", "encoder.mask_token", "encoder.blocks.0.gamma_2"} <= gradients.keys()
    query, key, value = np.split(gradients["encoder.blocks.0.attn.qkv.bias"], 3)
    assert np.abs(key).max() < 1e-3 * np.abs(value).max() and np.abs(query).max() > 0


def test_their_start():
    """The ends of branches shrink with depth, tables and biases are 0; SimMIM's draws are cut at one deviation."""
    sizes = {"image_size": 64, "embed_dim": 64, "depth": 3, "num_heads": 2}
    ms.set_seed(0)
    for model, std in ((beit_vit(**sizes, vocab=300), 0.02), (simmim_vit(**sizes), 0.02 * 0.5396)):
        weights = {n: p.asnumpy() for n, p in model.parameters_and_names()}
        for name, shrunk in (("attn.qkv", False), ("attn.proj", True), ("mlp.fc1", False), ("mlp.fc2", True)):
            for i in range(3):
                expected = std / math.sqrt(2 * (i + 1)) if shrunk else std
                assert weights[f"encoder.blocks.{i}.{name}.weight"].std() == pytest.approx(expected, rel=0.05)
        zero = [n for n in weights if n.endswith((".bias", ".beta", "relative.table")) and n.startswith("encoder.")]
        assert "encoder.patch_embed.bias" in zero and not any(weights[n].any() for n in zero)
        assert all((weights[n] == np.float32(0.1)).all() for n in weights if ".gamma_" in n)
        cut = np.abs(weights["encoder.blocks.0.attn.qkv.weight"]).max()
        assert (cut <= 0.02) == (model.decoders[0].pred.weight.shape[0] == 768)
        assert model.encoder.no_decay == ("cls_token",)


def test_refused():
    """BEiT predicts ids; squares must hold whole patches and divide the image."""
    for name, arguments, words in (
        ("beit", {"target": "hog"}, "BEiT predicts ids of a codebook, expected 'codebook'"),
        ("beit", {"num_heads": [2]}, "must be one number"),
        ("simmim", {"mask_size": 24}, "mask_size 24 must be a multiple"),
        ("simmim", {"image_size": 80}, "mask_size 32 must be a multiple"),
    ):
        with pytest.raises(UserError, match=words):
            localmim.create_model(f"{name}_vit_tiny_patch16_224", **{**TINY, "image_size": 64, **arguments})

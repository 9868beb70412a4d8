"""MaskFeat: its loss by the formula, masks of unequal size, its start, and what it refuses."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import localmim
import plain
from localmim.errors import UserError
from localmim.mim.maskfeat import maskfeat_vit
from localmim.mim.replaced_masking import replaced_mask

TINY = {"image_size": (32, 48), "in_chans": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
GRID = (2, 3)


class Outputs(nn.Cell):
    """Loss, and the predictions beside it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def construct(self, images, *arrays):
        return self.model(images, *arrays)[0], self.model.predict(images, *arrays)[0]


class Run:
    """A tiny model that is compiled once: loss, predictions, gradients of two images that hide 3 and 2 patches."""

    def __init__(self):
        ms.set_seed(0)
        self.model = maskfeat_vit(**TINY)
        self.images = np.random.default_rng(0).normal(size=(2, 2, 32, 48)).astype(np.float32)
        hidden = np.array([[[1, 0, 1], [0, 0, 1]], [[0, 1, 0], [1, 0, 0]]], bool)
        self.mask = replaced_mask(hidden, GRID, GRID, 3)
        self.weights = dict(self.model.parameters_and_names())
        self.graph = plain.Gradients(Outputs(self.model), None, ms.ParameterTuple(self.weights.values()))

    def __call__(self, images=None):
        images = self.images if images is None else images
        (loss, rows), gradients = self.graph(*(Tensor(a) for a in (images, *self.mask.arrays())))
        return float(loss.asnumpy()), rows.asnumpy(), {n: g.asnumpy() for n, g in zip(self.weights, gradients)}


@pytest.fixture(scope="module")
def run():
    return Run()


def test_loss_is_the_mean_over_hidden_patches_of_all_images(run):
    """HOG of 8 px cells, ordered (channel, bin, row, column); the row that fills up the second image counts nothing."""
    loss, rows, _ = run()
    hog = plain.hog(run.images, 8, 9)  # [B, 4, 6, C, 9]
    target = hog.reshape(2, 2, 2, 3, 2, 2, 9).transpose(0, 1, 3, 5, 6, 2, 4).reshape(2, 6, -1)
    errors = [(rows[b, k] - target[b, p]) ** 2 for b in range(2) for k, p in enumerate(run.mask.ids_mask[b]) if p >= 0]
    assert len(errors) == 5 and loss == pytest.approx(np.mean(errors), rel=1e-5)
    grid = run.model.targets(Tensor(run.images))[0].asnumpy()
    np.testing.assert_allclose(run.model.target.histograms(grid), hog, atol=1e-5)


def test_every_weight_learns_and_hidden_pixels_are_not_seen(run):
    """Mask token, class token and position code included; a copied pixel would make the task trivial."""
    loss, rows, gradients = run()
    assert [n for n, g in gradients.items() if not 0 < np.abs(g).max() < np.inf] == []
    hidden = run.mask.units.repeat(16, 1).repeat(16, 2)[:, None]
    other, there = run(np.where(hidden, 7.0, run.images).astype(np.float32))[:2]
    np.testing.assert_array_equal(rows[run.mask.ids_mask >= 0], there[run.mask.ids_mask >= 0])
    assert abs(other - loss) > 1e-3


def test_its_own_start():
    """N(0, 0.02) everywhere; with the authors' quirk biases inside the blocks are 0.02, and only there."""
    for quirks, bias in ((False, 0.0), (True, 0.02)):
        ms.set_seed(0)
        weights = {n: p.asnumpy() for n, p in maskfeat_vit(**TINY, reference_quirks=quirks).parameters_and_names()}
        matrices = {n: w for n, w in weights.items() if w.ndim > 1}
        assert {"encoder.pos_embed", "encoder.mask_token", "encoder.patch_embed.weight"} <= matrices.keys()
        everything = np.concatenate([w.ravel() for w in matrices.values()])
        assert everything.std() == pytest.approx(0.02, rel=0.03) and abs(everything.mean()) < 1e-3
        inside = [w for n, w in weights.items() if n.startswith("encoder.blocks.") and n.endswith((".bias", ".beta"))]
        assert len(inside) == 6 and all((w == np.float32(bias)).all() for w in inside)
        assert not weights["decoders.0.pred.bias"].any() and not weights["encoder.tap_norms.0.beta"].any()


def test_gaussian_window():
    """mmpretrain's target: pixels around the middle of 16 px count more."""
    images = np.random.default_rng(1).normal(size=(1, 2, 32, 48)).astype(np.float32)
    (got,) = maskfeat_vit(**TINY, hog_window=16).targets(Tensor(images))
    gx, gy = plain.sobel(images)
    place = (np.arange(16) - 7.5) / 8
    weight = np.tile(np.exp(-0.5 * (place[:, None] ** 2 + place**2)), (2, 3))
    bins = np.floor(np.arctan2(gx, gy) / np.pi * 9).astype(int) % 9
    expected = np.zeros((1, 4, 6, 2, 9))
    for b, c, i, j in np.ndindex(images.shape):
        expected[b, i // 8, j // 8, c, bins[b, c, i, j]] += np.hypot(gx, gy)[b, c, i, j] * weight[i, j]
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    got = maskfeat_vit(**TINY).target.histograms(got.asnumpy())
    assert (np.abs(got - expected).max(-1) < 1e-5).mean() > 0.9  # rounding may move a pixel that lies on a bin's edge


def test_other_targets_and_refusals():
    """Any target composes; sizes that do not fit are one clear line."""
    assert maskfeat_vit(**TINY, target="pixels").decoders[0].pred.weight.shape == (512, 16)
    assert maskfeat_vit(**TINY, target="codebook", vocab=11).decoders[0].pred.weight.shape == (11, 16)
    assert maskfeat_vit(**TINY, patch_size=8).decoders[0].pred.weight.shape == (18, 16)
    for arguments, words in (
        ({"patch_size": 4, "image_size": 32}, "a patch of 4 px does not divide into histograms of 8 px"),
        ({"num_heads": [2]}, "must be one number"),
        ({"target": "nothing"}, "'nothing' is none of"),
    ):
        with pytest.raises(UserError, match=words):
            localmim.create_model("maskfeat_vit_tiny_patch16_224", **{**TINY, **arguments})

"""The ViT encoder: visible tokens, taps, and what it refuses."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import plain
from localmim.convert.load import weights_of
from localmim.models.layers import sincos_position_code
from localmim.models.vit import VisionTransformer


class Views(nn.Cell):
    """Everything that the tests look at, from one compile."""

    def __init__(self, encoder: nn.Cell):
        super().__init__()
        self.encoder = encoder

    def construct(self, images, in_order, some):
        every = self.encoder.block_outputs(images)
        return (
            every,
            self.encoder.block_outputs(images, in_order),
            self.encoder.embed(images, some),
            self.encoder.block_outputs(images, some)[-1],
            self.encoder(images, some),
            self.encoder.features(images),
        )


@pytest.fixture(scope="module")
def seen():
    """An encoder on a rectangular image of 2 x 3 patches and four channels, seen from all sides."""
    ms.set_seed(1)
    encoder = VisionTransformer((8, 12), 4, 4, embed_dim=16, depth=3, num_heads=2, taps=(0, 2))
    rng = np.random.default_rng(2)
    for norm in encoder.tap_norms:
        norm.gamma.set_data(Tensor(rng.normal(size=16).astype(np.float32)))
    images = rng.normal(size=(2, 4, 8, 12)).astype(np.float32)
    in_order = np.tile(np.arange(6, dtype=np.int32), (2, 1))
    some = np.array([[4, 0, 5], [1, 3, 2]], np.int32)
    every, ordered, embedded, last, latents, features = Views(encoder)(*map(Tensor, (images, in_order, some)))
    return {
        "encoder": encoder,
        "some": some,
        "every": [x.asnumpy() for x in every],
        "ordered": [x.asnumpy() for x in ordered],
        "embedded": embedded.asnumpy(),
        "last": last.asnumpy(),
        "latents": [x.asnumpy() for x in latents],
        "features": features.asnumpy(),
        "images": images,
    }


def test_all_patches_in_order_is_no_mask(seen):
    """One class serves pre-training and downstream: ids of everything must change nothing."""
    for all_, ordered in zip(seen["every"], seen["ordered"]):
        np.testing.assert_allclose(ordered, all_, atol=1e-6)


def test_visible_patches_keep_their_own_position_code(seen):
    """The code belongs to the place in the image, not to the place among the visible; the class token has none."""
    encoder, some = seen["encoder"], seen["some"]
    w = weights_of(encoder)
    kernel, code = w["patch_embed.weight"], sincos_position_code(16, (2, 3))
    for b in range(2):
        np.testing.assert_array_equal(seen["embedded"][b, 0], w["cls_token"][0, 0])
        for k, patch in enumerate(some[b]):
            i, j = divmod(int(patch), 3)
            pixels = seen["images"][b, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            expected = (kernel * pixels).sum((1, 2, 3)) + w["patch_embed.bias"] + code[patch]
            np.testing.assert_allclose(seen["embedded"][b, 1 + k], expected, atol=1e-5)


def test_taps_are_normed_but_the_trunk_is_not(seen):
    """Each tap has its own norm; the next block goes on from the un-normed tokens."""
    w = weights_of(seen["encoder"])
    x = seen["embedded"].astype(np.float64)
    latents = []
    for i in range(3):
        prefix = f"blocks.{i}."
        x = plain.block(x, {n[len(prefix) :]: a for n, a in w.items() if n.startswith(prefix)}, 2)
        if i in (0, 2):
            k = len(latents)
            latents.append(plain.layer_norm(x, w[f"tap_norms.{k}.gamma"], w[f"tap_norms.{k}.beta"]))
    np.testing.assert_allclose(seen["last"], x, atol=2e-5)
    assert len(seen["latents"]) == 2
    for got, expected in zip(seen["latents"], latents):
        np.testing.assert_allclose(got, expected, atol=3e-5)


def test_features_leave_the_class_token_out(seen):
    """k-NN and global pooling average patches only."""
    np.testing.assert_allclose(seen["features"], seen["every"][-1][:, 1:].mean(1), atol=1e-6)


def test_position_code_is_stored_but_frozen(seen):
    """It is part of a checkpoint, zero for the class token, and never trained."""
    code = seen["encoder"].pos_embed
    assert code.shape == (1, 7, 16) and not code.requires_grad
    assert not code.asnumpy()[0, 0].any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_size": (8, 10)}, "image_size 8x10 is not a multiple of patch_size 4"),
        ({"taps": (2, 0)}, r"taps \[2, 0\] must be ascending block indices from 0 to 2"),
        ({"taps": (0, 0)}, r"taps \[0, 0\]"),
        ({"taps": (3,)}, r"taps \[3\]"),
        ({"taps": (-1,)}, r"taps \[-1\]"),
        ({"num_heads": 3}, "width 16 is not a multiple of 3 heads"),
        ({"embed_dim": 18}, "multiple of 4, got 18"),
    ],
)
def test_refuses(change, said):
    """Sizes that do not fit are named when the model is built, not deep inside a compile."""
    with pytest.raises(ValueError, match=said):
        VisionTransformer(**{"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, **change})

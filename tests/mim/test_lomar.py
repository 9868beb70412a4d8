"""LoMaR as a whole: a window is seen as an image of its own, and its loss is what it says, for ids as for pixels."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import localmim
from localmim.models.vit import VisionTransformer

B, V, K, PATCH = 3, 2, 3, 8
SIZES = {"in_chans": 1, "patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2, "window": K, "views": V}
rng = np.random.default_rng(0)
images = rng.normal(size=(B, 1, 40, 64)).astype(np.float32)  # 5 x 8 patches


@pytest.fixture(scope="module", autouse=True)
def without_compiling():
    """Golden files hold the graphs to the authors' values; here other sizes are looked at."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def lomar(**more):
    """A model whose weights, tables of relative places included, are all at work, and a mask."""
    ms.set_seed(1)
    model = localmim.create_model("lomar_vit_tiny_patch16_224", image_size=[40, 64], **SIZES, **more)
    for p in model.trainable_params():
        p.set_data(Tensor((p.asnumpy() + 0.2 * rng.normal(size=p.shape)).astype(np.float32)))
    return model, model.masking(0.6, 0)(0, np.arange(B))


def test_a_window_is_an_image_of_its_own():
    """On an oblong image of one channel: each window's tokens are those of the encoder on the crop."""
    model, mask = lomar()
    whole = model.encoder(Tensor(images), *map(Tensor, mask.arrays()))[0].asnumpy()
    sizes = {"mask_token": True, "position": "none", "relative": "contextual"}
    small = VisionTransformer(K * PATCH, PATCH, 1, 16, 2, 2, taps=(1,), **sizes)
    weights = dict(model.encoder.parameters_and_names())
    for name, p in small.parameters_and_names():
        p.set_data(weights[name].value())
    for row in range(B * V):
        i, j = np.divmod(mask.ids.reshape(B * V, K * K)[row, 0], 8)
        crop = images[row // V : row // V + 1, :, i * PATCH : (i + K) * PATCH, j * PATCH : (j + K) * PATCH]
        nothing = Tensor(np.zeros((1, 1), np.int32))
        alone = small(Tensor(np.ascontiguousarray(crop)), Tensor(mask.hidden[row][None]), nothing)[0].asnumpy()
        np.testing.assert_allclose(whole[row], alone[0], atol=1e-5)


def test_codebook_ids():
    """The transplant into BEiT: cross-entropy over the hidden patches of all windows."""
    model, mask = lomar(target="codebook", vocab=11)
    ids = rng.integers(0, 11, (B, 5, 8)).astype(np.int32)
    arrays = [Tensor(a) for a in mask.arrays()]
    loss, _ = model(Tensor(images), *arrays, Tensor(ids))
    logits = model.predict(Tensor(images), *arrays)[0].asnumpy().astype(np.float64)
    wanted = np.stack([ids[row // V].ravel()[mask.ids_mask[row]] for row in range(B * V)])
    shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(shares, wanted[..., None], axis=2).mean()
    assert float(loss.asnumpy()) == pytest.approx(expected, rel=1e-5)

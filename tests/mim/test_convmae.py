"""ConvMAE and FastConvMAE: complementary masks, and one loss for all of them."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import localmim
import plain
from localmim.errors import UserError
from localmim.mim.complementary_masking import ComplementaryMasking, complementary_masks
from localmim.mim.convmae import convmae, fastconvmae
from localmim.mim.masking import RandomMasking, TokenMask

TINY = {"image_size": (64, 32), "in_chans": 1, "embed_dims": (4, 4, 8), "depths": (1, 1, 1), "num_heads": 2}
SMALL = {**TINY, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}


def test_complementary_masks():
    """The visible sets of an image tile it, cut from one order; each view's arrays are a mask of its own."""
    noise = np.random.default_rng(0).random((3, 12))
    mask = complementary_masks(noise, 4)
    assert [a.shape for a in mask.arrays()] == [(12, 3), (12, 9), (12, 12)]
    sets = mask.ids_keep.reshape(3, 4, 3)
    np.testing.assert_array_equal(sets.reshape(3, 12), np.argsort(noise, axis=1))
    for row in range(12):
        order = np.concatenate([mask.ids_keep[row], mask.ids_mask[row]])
        np.testing.assert_array_equal(order[mask.ids_restore[row]], np.arange(12))
    hidden = TokenMask(*mask.arrays()).mask().reshape(3, 4, 12)
    np.testing.assert_array_equal((1 - hidden).sum(axis=1), np.ones((3, 12)))
    np.testing.assert_array_equal(mask.mask(), hidden[:, 0])


def test_masks_depend_on_the_sample_alone():
    """The mask of sample 7 is the same in any batch, and another in the next epoch or with another seed."""
    masking = ComplementaryMasking(16, 0.75, 3)
    alone, among = masking(1, np.array([7])), masking(1, np.array([2, 7]))
    np.testing.assert_array_equal(alone.ids_keep, among.ids_keep[4:])
    assert (masking(2, np.array([7])).ids_keep != alone.ids_keep).any()
    assert (ComplementaryMasking(16, 0.75, 4)(1, np.array([7])).ids_keep != alone.ids_keep).any()
    assert masking.describe() == "4 of 16 patches visible in each of 4 views, each patch in one"
    assert ComplementaryMasking(12, 2 / 3, 0).views == 3


@pytest.mark.parametrize(
    ("patches", "ratio", "said"),
    [
        (16, 0.6, "mask.ratio 0.6 does not leave a whole fraction"),
        (18, 0.75, "mask.ratio 0.75 makes 4 views, which do not divide an image's 18 patches"),
        (16, 1.0, "mask.ratio must lie between 0 and 1"),
    ],
)
def test_ratios_that_do_not_tile(patches, ratio, said):
    """One line before anything is compiled."""
    with pytest.raises(UserError, match=said):
        ComplementaryMasking(patches, ratio, 0)


@pytest.fixture
def eager():
    """PyNative mode: quicker than compiling what runs once or a few times."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def gradients_of(model) -> plain.Gradients:
    return plain.Gradients(model, None, ms.ParameterTuple(model.trainable_params()))


def test_one_pass_equals_four_losses(eager):
    """FastConvMAE's loss and its gradients are the means of ConvMAE's with the four masks."""
    ms.set_seed(0)
    model = convmae(**SMALL)
    images = Tensor(np.random.default_rng(1).normal(size=(2, 1, 64, 32)).astype(np.float32))
    mask = ComplementaryMasking(8, 0.75, 0)(0, np.arange(2))
    (loss, _), whole = gradients_of(model)(images, *map(Tensor, mask.arrays()))
    single, parts = gradients_of(model), []
    for v in range(4):
        (one, _), gradients = single(images, *(Tensor(a[v::4].copy()) for a in mask.arrays()))
        parts.append([float(one.asnumpy()), *(g.asnumpy() for g in gradients)])
    assert float(loss.asnumpy()) == pytest.approx(np.mean([p[0] for p in parts]), rel=1e-6)
    for i, p in enumerate(model.trainable_params()):
        mean = np.mean([part[i + 1] for part in parts], axis=0)
        assert np.abs(mean).max() > 0, f"{p.name} does not learn"
        np.testing.assert_allclose(whole[i].asnumpy(), mean, rtol=0, atol=2e-5 * np.abs(mean).max(), err_msg=p.name)


def test_presets():
    """Both are registered, differ in their masking alone, and predict the pixels of 16 px cells."""
    for name, masking in (("convmae", RandomMasking), ("fastconvmae", ComplementaryMasking)):
        model = localmim.create_model(f"{name}_convvit_base_patch16_224", **SMALL)
        assert isinstance(model.masking(0.75, 0), masking)
        assert model.cell_sides() == [16] and model.target.dims == [256] and model.encoder.mask_grid == (4, 2)
    assert fastconvmae(**SMALL, target="hog").target.dims == [9]
    with pytest.raises(UserError, match=r"fastconvmae.*unexpected keyword argument 'taps'"):
        localmim.create_model("fastconvmae_convvit_base_patch16_224", taps=[1])

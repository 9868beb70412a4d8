"""Stochastic depth in pre-training: factors reach every branch of every encoder, and follow from the sample alone."""

from __future__ import annotations

import cv2
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import localmim
from localmim.config import config_from_dict
from localmim.data.pipeline import Batch
from localmim.distributed import Ranks
from localmim.errors import UserError
from localmim.models.layers import linear_rates
from localmim.training.drop_path import drop_path_factors
from localmim.training.pretraining import Pretraining

VIT = {"image_size": 32, "embed_dim": 8, "depth": 2, "num_heads": 2}
VIT16 = "vit_tiny_patch16_224"
SWIN = {"image_size": 32, "embed_dim": 4, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4}
CONV = {"image_size": 32, "embed_dims": [4, 4, 8], "depths": [1, 1, 1], "num_heads": 2}
CONV |= {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
MODELS = {
    "beit": (f"beit_{VIT16}", {**VIT, "vocab": 5}),
    "simmim_vit": (f"simmim_{VIT16}", {**VIT, "patch_size": 8, "mask_size": 16}),
    "simmim_swin": ("simmim_swin_tiny_patch4_window7_224", {**SWIN, "mask_size": 16}),
    "convmae": ("convmae_convvit_base_patch16_224", CONV),
    "fastconvmae": ("fastconvmae_convvit_base_patch16_224", CONV),
}
OTHERS = {  # encoders on visible tokens, which no method drops yet
    "mae": (f"mae_{VIT16}", {**VIT, "patch_size": 8, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}),
    "greenmim": (
        "greenmim_swin_tiny_patch4_window7_224",
        {**SWIN, "image_size": 64, "decoder_dim": 8, "decoder_heads": 2},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def eager():
    """PyNative mode: quicker than compiling what runs a few times."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def case(name: str, **more):
    """A model whose weights are away from their start, two images and their arrays."""
    model_name, kwargs = {**MODELS, **OTHERS}[name]
    ms.set_seed(0)
    model = localmim.create_model(model_name, **{**kwargs, **more})
    rng = np.random.default_rng(0)
    for _, p in model.parameters_and_names():
        if p.requires_grad:
            p.set_data(Tensor((p.asnumpy() + 0.2 * rng.normal(size=p.shape)).astype(np.float32)))
    images = rng.normal(size=(2, 3, *model.encoder.image_size)).astype(np.float32)
    arrays = [Tensor(a) for a in model.masking(0.5 if name != "fastconvmae" else 0.75, 0)(0, np.arange(2)).arrays()]
    if name == "beit":
        arrays.append(Tensor(rng.integers(0, 5, (2, 2, 2)).astype(np.int32)))
    return model, Tensor(images), tuple(arrays)


@pytest.mark.parametrize("name", ["beit", "simmim_swin", "fastconvmae", *OTHERS])  # every encoder, every kind of mask
def test_every_branch_has_its_factor(name):
    """Ones change nothing; a branch that is dropped in one row changes this row's latent and no other."""
    model, images, arrays = case(name)
    encoder, mask = model.encoder, arrays[: model.encoder.mask_inputs]
    (whole,) = (x.asnumpy() for x in encoder(images, *mask))
    drop = np.ones((encoder.depth, 2, len(whole)), np.float32)
    np.testing.assert_allclose(encoder.latents(images, mask, Tensor(drop))[0].asnumpy(), whole, rtol=0, atol=1e-6)
    for block in range(encoder.depth):
        for branch in range(2):
            factors = drop.copy()
            factors[block, branch, 1] = 0
            x = encoder.latents(images, mask, Tensor(factors))[0].asnumpy()
            np.testing.assert_allclose(x[0], whole[0], rtol=0, atol=1e-6)
            assert np.abs(x[1] - whole[1]).max() > 1e-3, (block, branch)


@pytest.mark.parametrize("name", MODELS)
def test_presets_take_it(name):
    """The rate reaches the model, and is 0 unless it is given."""
    model_name, kwargs = MODELS[name]
    assert localmim.create_model(model_name, **kwargs).drop_path == 0
    assert localmim.create_model(model_name, **kwargs, drop_path=0.25).drop_path == 0.25


def test_loss():
    """Without factors and with a rate of 0 the loss is the plain one; factors change it, the same ones to the same."""
    model, images, arrays = case("beit")

    def loss(rate: float, seed: int = 0) -> float:
        factors = drop_path_factors(linear_rates(rate, model.encoder.depth), seed, 0, np.arange(2))
        return float(model.forward(images, arrays, Tensor(factors))[0].asnumpy())

    plain = float(model(images, *arrays)[0].asnumpy())
    assert loss(0.0) == pytest.approx(plain, rel=1e-6)
    assert loss(0.5) == loss(0.5) != loss(0.5, seed=1)
    assert abs(loss(0.5) / plain - 1) > 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight images."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(8):
        cv2.imwrite(str(folder / f"{i}.png"), np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    return folder


def task(folder, name: str, drop_path: float | None) -> Pretraining:
    model_name, kwargs = MODELS[name]
    mask = {"mask_size": kwargs["mask_size"]} if "mask_size" in kwargs else {}
    sizes = {k: v for k, v in kwargs.items() if k != "mask_size"}
    model = {"name": model_name, **sizes, "drop_path": drop_path}
    return Pretraining(config_from_dict({"model": model, "mask": mask, "data": {"dir": str(folder)}}), Ranks())


def inputs(task: Pretraining, samples, epoch: int = 0) -> tuple[np.ndarray, ...]:
    samples = np.asarray(samples)
    images = np.stack([np.full((3, 32, 32), s, np.float32) for s in samples])
    return task.inputs(Batch(images=images, ids=samples, labels=np.zeros(len(samples))), epoch, 0)


def test_factors_of_a_run(folder):
    """Of a sample whatever the batch, so a run goes on exactly; another epoch has others; they fit the network."""
    run = task(folder, "simmim_vit", 0.5)
    given = inputs(run, [3, 1, 6])
    assert given[-1].shape == (2, 2, 3) and (given[-1] != given[-1][..., :1]).any()
    np.testing.assert_array_equal(inputs(run, [6, 3])[-1], given[-1][..., [2, 0]])
    assert any((inputs(run, [3, 1, 6], epoch)[-1] != given[-1]).any() for epoch in range(1, 5))
    tensors = [Tensor(a) for a in given]
    expected = run.model.forward(tensors[0], tuple(tensors[1:-1]), tensors[-1])[0]
    assert float(run.network(*tensors)[0].asnumpy()) == float(expected.asnumpy())
    assert [name for name, _ in run.network.activations(*tensors)][-1] == "target at scale 1"
    assert any("stochastic depth" in line for line in run.introduction())


def test_without_a_rate_nothing_is_added(folder):
    """The network is the model and its inputs are what they were."""
    for rate in (None, 0.0):
        run = task(folder, "simmim_vit", rate)
        assert run.network is run.model and len(inputs(run, [0, 1])) == 1 + run.model.encoder.mask_inputs


def test_views(folder):
    """The convolution stages drop an image's views together, the transformer each by itself."""
    run = task(folder, "fastconvmae", 0.5)
    samples = np.arange(40)
    drop = inputs(run, samples)[-1].reshape(3, 2, 40, 4)
    assert (drop[:2] == drop[:2, :, :, :1]).all() and (drop[1] == 0).any()
    both = (drop[2, 0, :, 0] == 0) & (drop[2, 0, :, 1] == 0)
    assert 0 < both.mean() < 0.45  # a quarter if independent, half if together
    np.testing.assert_array_equal(inputs(run, [7])[-1], drop[:, :, 7])


def test_wrong_rates():
    """One line; a method that is published without it does not take the key."""
    name, kwargs = MODELS["simmim_vit"]
    with pytest.raises(UserError, match=r"drop_path is 1\.0, expected 0 to below 1"):
        localmim.create_model(name, **kwargs, drop_path=1.0)
    with pytest.raises(UserError, match="unexpected keyword argument 'drop_path'"):
        localmim.create_model(f"mae_{VIT16}", drop_path=0.1)

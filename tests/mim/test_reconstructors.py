"""A mixture of reconstructors: the shared decoder, the teacher that follows, features of frozen networks."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import localmim
from localmim.convert.load import load_weights, weights_of
from localmim.errors import UserError
from localmim.mim.complementary_masking import ComplementaryMasking
from localmim.mim.convmae import fastconvmae, fastconvmae_mixture
from localmim.mim.reconstructors import FeatureNetworks
from localmim.training.optimizer import AdamW
from localmim.training.step import TrainStep

TINY = {"image_size": (64, 32), "in_chans": 1, "embed_dims": (4, 4, 8), "depths": (1, 1, 1), "num_heads": 2}
SMALL = {**TINY, "decoder_dim": 8, "decoder_depth": 2, "decoder_heads": 2}
GRID = (4, 2)


@pytest.fixture
def eager():
    """PyNative mode: quicker than compiling what runs once or twice."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def inputs(features: tuple[int, ...] = ()) -> tuple[np.ndarray, ...]:
    """Two images, their masks, random features."""
    rng = np.random.default_rng(1)
    images = rng.normal(size=(2, 1, 64, 32)).astype(np.float32)
    data = [rng.normal(size=(2, *GRID, D)).astype(np.float32) * 5 + 3 for D in features]
    return images, *ComplementaryMasking(8, 0.75, 0)(0, np.arange(2)).arrays(), *data


def test_one_target_is_fastconvmae(eager):
    """With pixels alone the trunk and its one branch are MAE's decoder, cut in two: equal predictions and loss."""
    ms.set_seed(0)
    mixture, whole = fastconvmae_mixture(**SMALL, teacher=False), fastconvmae(**SMALL)
    arrays = {}
    for name, value in weights_of(mixture).items():
        name = name.replace("decoders.0.blocks.0.", "decoders.0.blocks.1.")  # behind the trunk's one block
        arrays[name.replace("decoders.0.trunk.", "decoders.0.")] = value
    load_weights(whole, arrays)
    given = [Tensor(a) for a in inputs()]
    (ours,), (theirs,) = mixture.predict(*given), whole.predict(*given)
    np.testing.assert_allclose(ours.asnumpy(), theirs.asnumpy(), rtol=0, atol=1e-5)
    assert float(mixture(*given)[0].asnumpy()) == pytest.approx(float(whole(*given)[0].asnumpy()), rel=1e-6)


def test_targets(eager):
    """Pixels, the teacher's tokens of the whole image and given features, each vector normalised by itself."""
    model = fastconvmae_mixture(**SMALL, feature_dims=(6, 5))
    given = inputs((6, 5))
    grids = [t.asnumpy() for t in model.targets(*map(Tensor, given))]
    assert [g.shape for g in grids] == [(2, *GRID, D) for D in (256, 8, 6, 5)]
    assert [p.shape for p in model.predict(*map(Tensor, given))] == [(8, 6, D) for D in (256, 8, 6, 5)]
    teacher = model.target.teacher(Tensor(given[0]))[0].asnumpy()
    for grid, x in ((grids[1], teacher.reshape(2, *GRID, 8)), (grids[2], given[4]), (grids[3], given[5])):
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(grid, expected, rtol=0, atol=1e-4)


def test_a_step(eager):
    """As in training: all but the teacher learn, and the teacher becomes 0.9 of itself and 0.1 of the new encoder."""
    ms.set_seed(0)
    model = fastconvmae_mixture(**SMALL, teacher_decay=0.9, feature_dims=(6,))
    trained = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
    assert not any(n.startswith("target.") for n in trained)
    before = {n: a.copy() for n, a in weights_of(model).items()}
    step = TrainStep(model, AdamW(trained))
    result = step([inputs((6,))], 1e-2, 1)
    after = weights_of(model)
    assert result.finite and len(result.losses) == 3 and result.loss == pytest.approx(sum(result.losses), rel=1e-6)
    assert all((after[n] != before[n]).any() for n in trained)
    for name, value in after.items():
        if name.startswith("target.teacher."):
            student = name.replace("target.teacher.", "encoder.")
            np.testing.assert_array_equal(before[name], before[student])
            np.testing.assert_allclose(value, 0.9 * before[name] + 0.1 * after[student], rtol=0, atol=1e-6)


class Network(nn.Cell):
    """Features of 16 px patches: means of their rows as a map, or as tokens behind a class token."""

    def __init__(self, tokens: bool):
        super().__init__()
        self.tokens = tokens

    def construct(self, images):
        B, h, w = images.shape[0], GRID[0], GRID[1]
        x = images.reshape(B, h, 16, w, 16).mean(axis=4).transpose(0, 2, 1, 3)  # [B, 16, h, w]
        if self.tokens:
            x = x.reshape(B, 16, h * w).transpose(0, 2, 1)
            x = ms.ops.concat((x[:, :1] * 7, x), 1)
        return x


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[bool, str]:
    """The network as MINDIR, by whether it gives tokens."""
    root, images = tmp_path_factory.mktemp("mindir"), Tensor(np.zeros((2, 1, 64, 32), np.float32))
    for tokens in (False, True):
        ms.export(Network(tokens), images, file_name=str(root / f"{tokens}.mindir"), file_format="MINDIR")
    return {tokens: str(root / f"{tokens}.mindir") for tokens in (False, True)}


def test_features_of_frozen_networks(files):
    """Maps and tokens alike become [B, h, w, D], tokens in front left out; wrong sizes are one line."""
    images = inputs()[0]
    network = FeatureNetworks([files[False], files[True]], [16, 16], GRID)
    expected = images.reshape(2, 4, 16, 2, 16).mean(axis=4).transpose(0, 1, 3, 2)
    for features in network(images, np.arange(2)):
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, expected, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"True.mindir returns \(2, 9, 16\), expected features \(2, 5, 4, 2\)"):
        FeatureNetworks([files[True]], [5], GRID)(images, np.arange(2))
    with pytest.raises(UserError, match="refuses images"):
        FeatureNetworks([files[False]], [16], GRID)(images[:, :, :32], np.arange(2))


def test_wrong_arguments(tmp_path):
    """One line each."""
    (tmp_path / "text.mindir").write_text("no graph")
    with pytest.raises(UserError, match=r"text\.mindir is no MINDIR file"):
        FeatureNetworks([str(tmp_path / "text.mindir")], [4], GRID)
    with pytest.raises(UserError, match=r"nowhere\.mindir does not exist"):
        FeatureNetworks([str(tmp_path / "nowhere.mindir")], [4], GRID)
    with pytest.raises(UserError, match=r"target.features lists 1 networks, expected one for each width of"):
        FeatureNetworks(["a.mindir"], [4, 4], GRID)
    name = "fastconvmae_mixture_convvit_base_patch16_224"
    for kwargs, said in (
        ({"target": "codebook"}, "target is 'pixels' or 'hog'"),
        ({"branch_depth": 3}, "branch_depth 3 is more than decoder_depth 2"),
        ({"branch_depth": 0}, "at least one block of its own, got branch_depth 0"),
        ({"teacher_decay": 1.0}, "teacher_decay is 1.0, expected 0 to below 1"),
    ):
        with pytest.raises(UserError, match=f"model {name}: .*{said}"):
            localmim.create_model(name, **{**SMALL, **kwargs})

"""Runs of a mixture of reconstructors from a recipe: they go on exactly, with the same networks only, and are shown."""

from __future__ import annotations

import shutil
from typing import NamedTuple

import cv2
import mindspore as ms
import numpy as np
import pytest
import yaml
from mindspore import Tensor, nn

from localmim.analysis.images import picture
from localmim.analysis.reconstruct import Reconstructor
from localmim.config import load_config
from localmim.convert.load import weights_of
from localmim.errors import UserError
from localmim.training.loop import Run
from localmim.training.restore import restore

MODEL = {
    "name": "fastconvmae_mixture_convvit_base_patch16_224",
    "image_size": 32,
    "embed_dims": [4, 4, 8],
    "depths": [1, 1, 1],
    "num_heads": 2,
    "decoder_dim": 8,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "branch_depth": 1,
    "teacher_decay": 0.9,
}
RECIPE = {"epochs": 1, "batch_size": 2, "device": "CPU", "model": MODEL, "optimizer": {"lr": 1e-2, "warmup_epochs": 0}}


class Network(nn.Cell):
    """Means of columns of 16 px patches, [B, 3, 32, 32] -> [B, 48, 2, 2], times a factor."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def construct(self, images):
        x = images.reshape(2, 3, 2, 16, 2, 16).mean(axis=3) * self.factor  # [B, C, h, w, p]
        return x.transpose(0, 1, 4, 2, 3).reshape(2, 48, 2, 2)


def write_network(path, factor: float) -> None:
    images = Tensor(np.zeros((2, 3, 32, 32), np.float32))
    ms.export(Network(factor), images, file_name=str(path), file_format="MINDIR")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Eight images, a network, a recipe."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        cv2.imwrite(str(folder / "images" / f"{i}.png"), rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    write_network(folder / "network.mindir", 1.0)
    target = {"features": [str(folder / "network.mindir")], "feature_dims": [48]}
    path = folder / "recipe.yaml"
    data = {"dir": str(folder / "images"), "workers": 1}
    path.write_text(yaml.safe_dump({**RECIPE, "target": target, "data": data}))
    return path


def run_of(recipe, output, *overrides: str) -> Run:
    return Run(load_config(["--config", str(recipe), "--output_dir", str(output), *overrides]))


def advance(run: Run, stop: int) -> list[float]:
    """Steps up to number `stop`; the loss of each."""
    losses = []
    for batch in run.pipeline.epoch(0, run.step):
        losses.append(run.advance(run.row(run.step, 0, batch)).loss)
        if run.step == stop:
            return losses


def arrays_of(run: Run) -> dict[str, np.ndarray]:
    """Weights and moments."""
    return {n: a.copy() for n, a in {**weights_of(run.model), **run.optimizer.state()}.items()}


class Whole(NamedTuple):
    """A run of three steps that is saved after the first: its losses, its arrays after 0, 1 and 3 steps."""

    run: Run
    losses: list[float]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    end: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def whole(recipe) -> Whole:
    run = run_of(recipe, recipe.parent / "run")
    before, losses = arrays_of(run), advance(run, 1)
    run.save()
    after = arrays_of(run)
    losses += advance(run, 3)
    return Whole(run, losses, before, after, arrays_of(run))


def test_the_teacher_follows(whole):
    """In the compiled step, once, behind the update: 0.9 of what it was and 0.1 of the new encoder."""
    assert np.isfinite(whole.losses).all() and whole.run.task.loss_parts == len(whole.run.model.loss_names()) == 3
    names = [n for n in whole.before if n.startswith("target.teacher.")]
    assert any((whole.before[n] != whole.after[n]).any() for n in names)
    for name in names:
        encoder = whole.after[name.replace("target.teacher.", "encoder.")]
        expected = 0.9 * whole.before[name] + 0.1 * encoder
        np.testing.assert_allclose(whole.after[name], expected, rtol=0, atol=1e-6, err_msg=name)


def test_goes_on_exactly(recipe, whole):
    """A run that goes on after one step ends with the same losses and bits, teacher and moments included."""
    again = run_of(recipe, whole.run.output)
    assert again.step == 1 and advance(again, 3) == whole.losses[1:]
    ours = arrays_of(again)
    assert ours.keys() == whole.end.keys() and any(n.startswith("target.teacher.") for n in ours)
    assert [n for n in ours if not np.array_equal(ours[n], whole.end[n])] == []


def test_with_the_same_networks_only(recipe, whole, tmp_path):
    """A file may move; another one in its place would change the task without a sign."""
    moved = tmp_path / "moved.mindir"
    shutil.copy(recipe.parent / "network.mindir", moved)
    assert run_of(recipe, whole.run.output, "--target.features", f"[{moved}]").step == 1
    moved.unlink()
    write_network(moved, 2.0)
    with pytest.raises(UserError, match=r"target\.features is not the one that the run in"):
        run_of(recipe, whole.run.output, "--target.features", f"[{moved}]")


def test_a_reconstruction(whole):
    """Pixels are reconstructed, and the networks are not needed for it."""
    config, model, _ = restore(str(whole.run.output))
    config.target.features = ["nowhere.mindir"]
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        (found,) = Reconstructor(config, model)([picture("noise", pixels, model.encoder, config.data)])
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
    (scale,) = found.scales
    assert (scale.name, scale.kind) == ("all three stages, 16 px cells", "pixels")
    assert scale.target.shape == scale.prediction.shape == (32, 32, 3)
    assert np.isfinite(scale.prediction).mean() == 0.75 == found.mask.mean()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--target.feature_dims", "[]"], r"target.feature_dims is \[\], expected a width for each of 1 features"),
        (["--target.feature_dims", "[0]"], r"target.feature_dims is \[0\], expected at least 1 each"),
        (["--target.features", "[nowhere.mindir]"], "target.features: nowhere.mindir does not exist"),
        (["--model.branch_depth", "2"], "branch_depth 2 is more than decoder_depth 1"),
        (["--model.teacher_decay", "1"], "teacher_decay is 1.0, expected 0 to below 1"),
        (["--model.drop_path", "0.1"], "model.drop_path is set, but fastconvmae_mixture"),
    ],
)
def test_mistakes_are_one_line(recipe, tmp_path, overrides, said):
    """Before anything is written."""
    with pytest.raises(UserError, match=said) as caught:
        run_of(recipe, tmp_path / "run", *overrides)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_wrong_width(recipe, tmp_path):
    """Only the network itself can tell, at the first batch."""
    run = run_of(recipe, tmp_path / "run", "--target.feature_dims", "[47]")
    with pytest.raises(UserError, match=r"network.mindir returns \(2, 48, 2, 2\), expected features \(2, 47, 2, 2\)"):
        run.row(0, 0, next(run.pipeline.epoch(0)))


def test_without_a_teacher(recipe, tmp_path):
    """Nothing follows the encoder, and two parts are left."""
    run = run_of(recipe, tmp_path / "run", "--model.teacher", "false")
    assert run.task.loss_parts == 2 and run.model.loss_names()[1] == "features of network 1"
    assert not any(n.startswith("target.teacher.") for n in weights_of(run.model))

"""What ranks tell each other, on two real ones; and that nobody waits for ever."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from jobs import finish, start
from mindspore import set_seed

from localmim import create_model
from localmim.config import config_from_dict
from localmim.convert.load import weights_of
from localmim.data.builtin import write_builtin_images
from localmim.distributed import Ranks
from localmim.errors import UserError
from localmim.training.checkpoint import weights_header, write_weights

TASK = Path(__file__).with_name("ranks_task.py")


def job(folder: Path, *arguments: str) -> tuple[int, str, Path]:
    """Exit code and output of two ranks of the task, and the folder of their logs."""
    code, text = finish(start(TASK, *arguments, folder=folder))
    return code, text, max((folder / "outputs" / "logs").iterdir())


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """One job in which ranks exchange everything; at its end rank 1 has an error."""
    code, text, logs = job(tmp_path_factory.mktemp("sums"), "sums")
    line = next((line for line in text.splitlines() if line.startswith("{")), None)
    assert line, text
    return json.loads(line), code, text, logs


def test_sums(sums):
    """Counts above 2^24 stay whole although CPUs add in float32; sets are joined; gathered values keep their places."""
    found = sums[0]
    assert found["total"] == [3, 2**36 + 1, 1]
    assert found["gather"] == [[0.25, 1.25], [7, 7]]
    assert found["union"] == [3, 5, 8, 2**24 + 1]
    assert found["nothing"] == []
    first, second = (float(np.float32(np.float32(-0.1) ** n)) for n in (1, 2))
    assert found["rows"] == [[first] * 2, [second] * 2, [second] * 2]


def test_gradients(sums):
    """The mean of both ranks' gradients: as one tensor, and by MindSpore's reducer that accelerators use."""
    draws = [np.random.default_rng(rank) for rank in range(2)]
    for got, shape in zip(sums[0]["gradients"], ((3, 4), (5,), (2, 2, 2)), strict=True):
        expected = sum(draw.standard_normal(shape).astype(np.float32) for draw in draws) / 2
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert sums[0]["same bits"]


def test_batch_statistics(sums):
    """Three rows on each rank are normalised by the mean and variance of all six; the running variance is unbiased."""
    rows = np.random.default_rng(9).standard_normal((6, 4)).astype(np.float32) * 3 + 5
    expected = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-6)
    np.testing.assert_allclose(sums[0]["normed"], expected[:3], atol=2e-5)
    mean, variance = sums[0]["moving"]
    np.testing.assert_allclose(mean, 0.1 * rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, 0.9 + 0.1 * rows.var(0, ddof=1), rtol=1e-5)


def test_one_error_stops_all(sums):
    """The rank with the error says it; the other one only that it stopped, with an exit code that says so."""
    _, code, text, logs = sums
    assert code == 2
    assert text.count("error: the disk is full (rank 1") == 1
    assert (logs / "rank_0.exit").read_text().strip() == "3"
    assert "stopped: rank 1 failed in saving" in (logs / "worker_0.log").read_text()


def test_a_rank_that_hangs(tmp_path):
    """A rank that freezes must not hold the others for ever: after the limit they say where they waited, and end."""
    begin = time.monotonic()
    code, text, logs = job(tmp_path, "hang")
    assert code == 1, text
    said = (logs / "worker_0.log").read_text()
    assert "stopped: rank 0 waited 3 s for the others, in a training step" in said
    assert "stopped: rank 0 waited 3 s" in text
    assert time.monotonic() - begin < 60


def probe_recipe(folder: Path, **changes) -> Path:
    """A linear probe, whose batch statistics are those of all devices."""
    write_builtin_images(folder / "images", size=40, train_per_class=2, val_per_class=1, progress=False)
    values = {"task": "linear_probe", "device": "CPU", "batch_size": 4, "output_dir": str(folder / "run"), **changes}
    values["model"] = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
    values["model"] |= {"num_heads": 2, "num_classes": 10}
    values["optimizer"] = {"kind": "sgd", "warmup_epochs": 0}
    values["data"] = {"dir": str(folder / "images" / "train"), "workers": 1}
    path = folder / "probe.yaml"
    set_seed(0)
    encoder = create_model("vit_tiny_patch16_224", **{k: v for k, v in values["model"].items() if k != "name"})
    header = weights_header(0, config_from_dict({"task": "finetune", "model": values["model"]}).as_dict())
    write_weights(folder / "encoder.safetensors", weights_of(encoder), header)
    path.write_text(yaml.safe_dump({**values, "init": str(folder / "encoder.safetensors")}))
    return path


def test_a_device_whose_loss_is_not_finite(tmp_path):
    """All devices stop at the same step, and the one that has the image writes which it is; nobody waits in vain."""
    code, text, logs = job(tmp_path, "nonfinite", str(probe_recipe(tmp_path, max_bad_steps=1)))
    assert code == 1
    path = tmp_path / "run" / "nonfinite_step_2.json"
    assert f"stopped: 1 steps in a row had a non-finite loss or gradient; step, images and layer are in {path}" in text
    found = json.loads(path.read_text())
    assert found["layer"] == "input images"
    assert np.isnan(np.load(path.with_suffix(".npz"))["input_0"]).sum() == 1
    assert all((logs / f"rank_{rank}.exit").read_text().strip() == "1" for rank in range(2))


def test_machines_with_different_recipes(tmp_path):
    """A recipe that was changed on one machine only would train something that nobody wrote down."""
    write_builtin_images(tmp_path / "images", size=40, train_per_class=1, val_per_class=1, progress=False)
    model = {"name": "mae_vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "embed_dim": 32}
    model |= {"num_heads": 2, "depth": 1, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    values = {"device": "CPU", "batch_size": 2, "output_dir": str(tmp_path / "run"), "model": model}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "data": {"dir": str(tmp_path / "images/train")}}))
    code, text, _ = job(tmp_path, "recipe", str(tmp_path / "recipe.yaml"))
    assert code == 2
    assert "error: rank 1 differs from rank 0 in the recipe" in text
    assert not (tmp_path / "run").exists()


def test_alone():
    """One process: nothing is exchanged, errors are its own."""
    alone = Ranks()
    assert alone.first and alone.total(np.array([2.5])).tolist() == [2.5]
    assert alone.gather(3, 4).tolist() == [[3], [4]]
    assert alone.union({4, 2}) == {2, 4}
    alone.agree(None, "anything")
    with pytest.raises(UserError, match="no"):
        alone.agree(UserError("no"), "anything")

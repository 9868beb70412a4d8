"""The loop as commands use it: metrics, odd inputs from config alone, non-finite steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from localmim import cli
from localmim.config import load_config
from localmim.errors import RunError
from localmim.training.checkpoint import read_checkpoint
from localmim.training.loop import Run, introduction, train
from localmim.training.same_recipe import flatten

RECIPE = {
    "epochs": 2,
    "batch_size": 2,
    "accumulate": 2,
    "log_every": 1,
    "report_every": None,
    "compile_cache": False,
    "max_bad_steps": 2,
    "device": "CPU",
    "model": {
        "name": "localmim_vit_tiny_patch16_224",
        "image_size": [16, 32],
        "patch_size": 8,
        "in_chans": 4,
        "embed_dim": 32,
        "depth": 7,
        "taps": [0, 1],
        "num_heads": 2,
        "decoder_dim": 16,
        "decoder_heads": 2,
        "scales": [2, 1],
    },
    "optimizer": {"blr": 0.5, "warmup_epochs": 0},
}


@pytest.fixture()
def recipe(tmp_path):
    """Four-channel .npy images and a recipe of rectangular crops of them, two scales, two parts a step."""
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        np.save(images / f"{i}.npy", rng.random((24, 40, 4)).astype(np.float32))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "data": {"dir": str(images), "workers": 1}}))
    return path


def test_rectangular_four_channel_run_from_config_alone(recipe, tmp_path):
    """Nothing hard-codes 3 channels or squares: the run trains, logs each step and leaves a checkpoint."""
    output = tmp_path / "run"
    config = load_config(["--config", str(recipe), "--output_dir", str(output)])
    train(config)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["loss"] == pytest.approx(sum(lines[0]["loss_scales"]), rel=1e-6)
    checkpoint = read_checkpoint(output)
    assert checkpoint.step == 4
    assert checkpoint.config == config.as_dict()
    assert yaml.safe_load((output / "config.yaml").read_text()) == config.as_dict()
    assert list((output / "tensorboard").iterdir())


def test_nonfinite_steps_are_skipped_counted_and_then_stop_with_a_dump(recipe, tmp_path):
    """A NaN image costs its step's update and nothing else; too many in a row stop the run and name step and layer."""
    output = tmp_path / "run"
    one_scale = ["--model.scales", "[1]", "--model.taps", "[0]"]
    run = Run(load_config(["--config", str(recipe), "--output_dir", str(output), *one_scale]))
    before = {n: p.asnumpy() for n, p in run.model.parameters_and_names()}
    output.mkdir()
    batch = next(run.pipeline.epoch(0))
    batch.images[1, 0, 3, 4] = np.nan
    assert not run.advance(run.row(run.step, 0, batch)).finite
    assert (run.step, run.updates, run.skipped) == (1, 0, 1)
    with pytest.raises(RunError, match="nonfinite_step_2"):
        run.advance(run.row(run.step, 0, batch))
    assert all(np.array_equal(before[n], p.asnumpy()) for n, p in run.model.parameters_and_names())
    report = json.loads((output / "nonfinite_step_2.json").read_text())
    assert report["step"] == 2
    assert report["layer"] == "input images"
    assert len(report["images"]) == 4
    assert np.isnan(np.load(output / "nonfinite_step_2.npz")["input_0"]).any()


def test_the_dump_names_the_layer_that_breaks(recipe, tmp_path):
    """A weight that overflows inside the network is found by name, and so is an output that does."""
    from localmim.training.diagnose import first_nonfinite

    run = Run(load_config(["--config", str(recipe), "--output_dir", str(tmp_path / "run")]))
    part = run.row(0, 0, next(run.pipeline.epoch(0)))[1][0]
    assert first_nonfinite(run.task.network, run.optimizer, part) is None
    weight = run.model.encoder.blocks[1].mlp.fc2.weight
    kept = weight.asnumpy()
    weight.set_data(weight * 1e38 * 1e3)
    assert first_nonfinite(run.task.network, run.optimizer, part) == "weight encoder.blocks.1.mlp.fc2.weight"
    from mindspore import Tensor

    weight.set_data(Tensor(np.full_like(kept, 3e38)))
    assert first_nonfinite(run.task.network, run.optimizer, part) == "output of encoder.blocks.1"


def test_introduction_shows_the_arithmetic(recipe, tmp_path):
    """People on one device must see which learning rate they get, and which blocks no tap reads."""
    run = Run(load_config(["--config", str(recipe), "--output_dir", str(tmp_path / "run")]))
    text = "\n".join(introduction(run))
    assert "lr = 0.5 x 4 / 256 = 0.0078125; effective batch, devices x batch x forward passes: 1 x 2 x 2 = 4" in text
    assert "2 of 8 patches visible" in text
    assert "the top 5 of 7 blocks lie above the last tap" in text


def test_exit_codes():
    """Commands end with 0, 2 for the user's mistakes and 1 for anything else, and say one line."""
    from localmim.errors import UserError

    def fail(error):
        def main(_argv):
            raise error

        return main

    assert cli.run(lambda argv: None, []) == 0
    assert cli.run(fail(UserError("x")), []) == 2
    assert cli.run(fail(RunError("x")), []) == 1


def test_flatten():
    """Nested keys become dotted, as on the command line."""
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": 3}) == {"a.b": 1, "a.c.d": [2], "e": 3}

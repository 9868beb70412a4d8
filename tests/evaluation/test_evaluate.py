"""eval.py and the feature commands as users call them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from job_environment import job_environment
from localmim.config import config_from_dict
from localmim.data.builtin import write_builtin_images
from localmim.errors import UserError
from localmim.evaluation import __main__ as commands
from localmim.evaluation.evaluate import evaluate
from localmim.training.loop import Run

ROOT = Path(__file__).parents[2]
VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, a classifier's run with an average, and a pre-training run; one checkpoint each, nothing trained."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_builtin_images(folder / "images", size=40, train_per_class=3, val_per_class=3, progress=False)
    data = {"dir": str(folder / "images/train"), "val_dir": str(folder / "images/val"), "workers": 1}
    common = {"batch_size": 8, "device": "CPU", "epochs": 1, "data": data}
    optimizer = {"warmup_epochs": 0}
    finetune = {"task": "finetune", "model": {"name": "vit_tiny_patch16_224", **VIT}}
    finetune["optimizer"] = {**optimizer, "ema_decay": 0.9}
    pretrain = {
        "model": {"name": "mae_vit_tiny_patch16_224", **VIT, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    }
    pretrain["optimizer"] = optimizer
    for name, values in (("finetune", finetune), ("pretrain", pretrain)):
        Run(config_from_dict({**common, **values, "output_dir": str(folder / name)})).save()
    return folder


def test_a_classifier_by_its_own_recipe(folder, tmp_path):
    """Nothing but the checkpoint is given; the result lies beside it, and says what it is of."""
    result = evaluate(str(folder / "finetune"), device="CPU")
    assert result["images"] == 30 and 0 <= result["top1"] <= result["top5"] <= 100
    written = json.loads((folder / "finetune/eval_step_00000000.json").read_text())
    assert written == result
    assert written["model"] == "vit_tiny_patch16_224" and written["data_dir"].endswith("val")

    weights = folder / "finetune/checkpoints/step_00000000/weights.safetensors"
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(weights.read_bytes())
    again = evaluate(str(copied), str(folder / "images/val"), batch_size=7, device="CPU")
    assert (again["top1"], again["images"]) == (result["top1"], 30)
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert (tmp_path / "copied.eval.json").is_file()
    average = evaluate(str(folder / "finetune"), average=True, out=str(tmp_path / "a.json"), device="CPU")
    assert average["loss"] == pytest.approx(result["loss"], rel=1e-5)  # at step 0 the average is the weights
    evaluate(str(weights.with_name("average.safetensors")), device="CPU")
    assert (folder / "finetune/eval_step_00000000_average.json").is_file()


def test_another_image_size_by_config(folder, tmp_path):
    """--config replaces keys of the checkpoint's own recipe; position codes are resized for it."""
    recipe = tmp_path / "larger.yaml"
    recipe.write_text("model: {image_size: 48}\n")
    result = evaluate(str(folder / "finetune"), config=str(recipe), out=str(tmp_path / "r.json"), device="CPU")
    usual = evaluate(str(folder / "finetune"), out=str(tmp_path / "r.json"), device="CPU")
    assert result["images"] == 30 and result["loss"] != usual["loss"]


def test_a_pretraining_model_by_neighbours(folder, tmp_path):
    """What has no classes is measured by k-NN, by the recipe's own images or by --data-dir."""
    out = str(tmp_path / "r.json")
    result = evaluate(str(folder / "pretrain"), str(folder / "images"), out=out, device="CPU")
    assert result["task"] == "pretrain" and result["k"] == 20 and result["n_test"] == 30
    own = evaluate(str(folder / "pretrain"), out=out, device="CPU")
    assert own["top1"] == result["top1"]
    recipe = tmp_path / "grey.yaml"  # a recipe's keys count here, too: other features, other neighbours
    recipe.write_text("data: {mean: [0.9, 0.1, 0.5], std: [0.01, 5.0, 0.01]}\n")
    other = evaluate(str(folder / "pretrain"), config=str(recipe), out=out, device="CPU")
    assert (other["top1"], other["top5"]) != (own["top1"], own["top5"])


def test_wrong_arguments(folder, tmp_path):
    """Each is one line that names the argument or the file."""
    with pytest.raises(UserError, match="holds no moving average"):
        evaluate(str(folder / "pretrain"), average=True, device="CPU")
    with pytest.raises(UserError, match="does not exist"):
        evaluate(str(tmp_path / "none"), device="CPU")
    with pytest.raises(UserError, match="--batch-size is 0"):
        evaluate(str(folder / "finetune"), batch_size=0, device="CPU")
    with pytest.raises(UserError, match="images without a class"):
        evaluate(str(folder / "finetune"), str(folder / "images/val/ball"), device="CPU")


def test_features_are_the_encoders(folder, tmp_path):
    """One row an image, with names, labels and classes; pooling by the class token differs from the mean."""
    arguments = ["features", "--ckpt", str(folder / "finetune"), "--data-dir", str(folder / "images/val")]
    for pool in ("mean", "token"):
        commands.main([*arguments, "--pool", pool, "--device", "CPU", "--out", str(tmp_path / f"{pool}.npz")])
    mean, token = np.load(tmp_path / "mean.npz"), np.load(tmp_path / "token.npz")
    assert mean["features"].shape == token["features"].shape == (30, 24)
    assert np.abs(mean["features"] - token["features"]).max() > 1e-3
    assert mean["classes"].tolist() == sorted(mean["classes"].tolist())
    assert all(name.startswith(mean["classes"][label]) for name, label in zip(mean["names"], mean["labels"]))
    assert str(mean["pool"]) == "mean"
    with pytest.raises(UserError, match="pool 'max'"):
        commands.main([*arguments, "--pool", "max", "--device", "CPU", "--out", str(tmp_path / "x.npz")])
    with pytest.raises(UserError, match=r"ends in \.npz"):
        commands.main([*arguments, "--device", "CPU", "--out", str(tmp_path / "x.txt")])


def test_two_processes_count_each_image_once(folder, tmp_path):
    """The real launcher, two workers on the CPU: the figures of one process."""
    out = tmp_path / "two.json"
    command = ["bash", str(ROOT / "scripts" / "run_eval_cpu.sh"), "--ckpt", str(folder / "finetune")]
    command += ["--batch-size", "4", "--out", str(out)]
    environment = job_environment(DEVICE_NUM="2")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    both = json.loads(out.read_text())
    alone = evaluate(str(folder / "finetune"), out=str(tmp_path / "one.json"), batch_size=4, device="CPU")
    assert (both["devices"], alone["devices"]) == (2, 1)
    assert all(both[key] == alone[key] for key in ("top1", "top5", "images"))
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-5)

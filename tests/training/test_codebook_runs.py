"""Runs whose target is a codebook: they step, and go on only with the codebook that they began with."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from localmim.config import load_config
from localmim.errors import UserError
from localmim.mim.tokenizers import FORMAT
from localmim.training.loop import Run, train

RECIPE = {
    "epochs": 1,
    "batch_size": 2,
    "accumulate": 2,
    "log_every": 1,
    "report_every": None,
    "compile_cache": False,
    "device": "CPU",
    "model": {
        "name": "localmim_swin_tiny_patch4_window7_224",
        "image_size": [32, 48],
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [2, 1],
        "num_heads": [1, 2],
        "window_size": 3,
        "decoder_dim": 16,
        "decoder_heads": 2,
        "scales": [1, 0.5],
    },
    "optimizer": {"blr": 0.1, "warmup_epochs": 0},
}


def write_codebook(path, seed: int) -> None:
    """Random centroids for cells of 8 and 16 px."""
    rng = np.random.default_rng(seed)
    tables = {f"cell_{cell}": rng.normal(size=(6, 192)).astype(np.float32) for cell in (8, 16)}
    save_file(tables, path, {"format": FORMAT, "in_chans": "3"})


@pytest.fixture()
def recipe(tmp_path):
    """Eight images, a codebook of six ids, a recipe for a two-stage Swin."""
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        cv2.imwrite(str(images / f"{i}.png"), rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    write_codebook(tmp_path / "codebook.safetensors", 0)
    path = tmp_path / "recipe.yaml"
    target = {"kind": "codebook", "codebook": [str(tmp_path / "codebook.safetensors")], "vocab": 6}
    path.write_text(yaml.safe_dump({**RECIPE, "target": target, "data": {"dir": str(images), "workers": 1}}))
    return path


def config_of(recipe, *overrides: str):
    return load_config(["--config", str(recipe), "--output_dir", str(recipe.parent / "run"), *overrides])


def test_steps(recipe):
    """A Swin with a scale of its own, accumulation, ids from a file: the first loss is near log(vocab) a scale."""
    train(config_of(recipe))
    lines = [json.loads(line) for line in (recipe.parent / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0.5 * np.log(6) < x < 2 * np.log(6) for x in lines[0]["loss_scales"])


def test_goes_on_with_the_same_codebook_only(recipe):
    """The file may move; another one under the same name would change the task without a sign."""
    Run(config_of(recipe)).save()
    moved = recipe.parent / "moved.safetensors"
    shutil.move(recipe.parent / "codebook.safetensors", moved)
    assert Run(config_of(recipe, "--target.codebook", f"[{moved}]")).store.latest() is not None
    write_codebook(moved, 1)
    with pytest.raises(UserError, match=r"target\.codebook is not the one that the run in"):
        Run(config_of(recipe, "--target.codebook", f"[{moved}]"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--target.vocab", "7"], "has 6 ids, but target.vocab is 7"),
        (["--target.vocab", "1"], "target.vocab is 1, expected at least 2"),
        (["--target.codebook", "[]"], "target.codebook is empty"),
        (["--target.codebook", "[nowhere.safetensors]"], "nowhere.safetensors does not exist"),
        (["--model.scales", "[2, 1]"], "but none of 4 px"),
    ],
)
def test_mistakes_are_one_line(recipe, overrides, said):
    """Before anything is written."""
    with pytest.raises(UserError, match=said) as caught:
        Run(config_of(recipe, *overrides))
    assert "\n" not in str(caught.value) and not (recipe.parent / "run").exists()

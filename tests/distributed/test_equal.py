"""Two devices at batch 4 train what one does at batch 8: through the real launcher, with the recipe's own crops."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jobs import differences, on_one, on_two, records

from localmim.data.builtin import write_builtin_images

STEPS = 20  # two epochs
TOLERANCE = 2e-6  # of weights; each of the 20 steps moves one by up to 1e-3
COMMON = {
    "device": "CPU",
    "epochs": 3,
    "max_steps": STEPS,
    "batch_size": 8,
    "log_every": 5,
    "data": {"workers": 1},
    "checkpoint": {"every_steps": 0},
}
VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
PRETRAIN = {
    "optimizer": {"blr": 0.03, "warmup_epochs": 1},
    "model": {
        "name": "localmim_vit_tiny_patch16_224",
        **VIT,
        "depth": 7,
        "scales": [2, 1],
        "decoder_dim": 16,
        "decoder_heads": 2,
    },
}
SWIN = {
    "shared_draws": True,
    "optimizer": {"blr": 0.03, "warmup_epochs": 1},
    "model": {
        "name": "localmim_swin_tiny_patch4_window7_224",
        "image_size": 32,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
        "taps": [1],
        "scales": [1],
        "decoder_dim": 16,
        "decoder_heads": 2,
    },
}
FINETUNE = {
    "task": "finetune",
    "shared_draws": True,
    "model": {"name": "vit_tiny_patch16_224", **VIT, "depth": 2, "drop_path": 0.2},
    "classification": {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "eval_every": 0},
    "optimizer": {"blr": 0.03, "warmup_epochs": 1, "layer_decay": 0.7, "ema_decay": 0.8, "clip_grad": 1.0},
}
PROBE = {
    "task": "linear_probe",
    "model": {"name": "vit_tiny_patch16_224", **VIT, "depth": 7},
    "classification": {"eval_every": 0},
    "optimizer": {"kind": "lars", "blr": 0.1, "warmup_epochs": 1, "weight_decay": 0.0},
}


def assert_equal_weights(one: Path, other: Path, part: str = "weights") -> None:
    """Rounding apart. Keys' biases have no gradient but rounding, which AdamW blows up to its step: they stay out."""
    found = differences(one, other, part, leave_out_key_biases=True)
    name = max(found, key=found.get)
    print(f"{part}: {found[name]:.1e} at most, in {name}")
    assert found[name] < TOLERANCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """80 training images and 30 others, so that the last batches of an evaluation are short."""
    folder = tmp_path_factory.mktemp("equal")
    write_builtin_images(folder / "images", size=40, train_per_class=8, val_per_class=3, progress=False)
    return folder


def recipe(folder: Path, name: str, values: dict, **data) -> Path:
    path = folder / f"{name}.yaml"
    values = {**COMMON, **values, "data": {**COMMON["data"], "dir": str(folder / "images" / "train"), **data}}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def pretrained(folder) -> tuple[Path, Path]:
    """The same run on one device and on two."""
    path = recipe(folder, "pretrain", PRETRAIN)
    on_one(path, folder / "one")
    text = on_two(path, folder / "two", "--batch_size", "4")
    assert "devices x batch x forward passes: 2 x 4 x 1 = 8" in text
    return folder / "one", folder / "two"


def test_vit(pretrained):
    """Weights after 20 steps, and the loss on the way."""
    one, two = pretrained
    assert_equal_weights(one, two)
    for ours, theirs in zip(records(one), records(two), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["loss_scales"] == pytest.approx(theirs["loss_scales"], rel=1e-5)


def test_metrics_of_each_device(pretrained):
    """A slow disk of one machine must be seen: throughput and waiting, one by one."""
    for record in records(pretrained[1]):
        assert len(record["images_per_s_rank"]) == len(record["data_wait_s_rank"]) == 2
        assert sum(record["images_per_s_rank"]) == pytest.approx(record["images_per_s"], rel=0.1)
    assert "images_per_s_rank" not in records(pretrained[0])[0]


def test_accumulation(pretrained, folder):
    """Two forward passes of 4 equal one of 8, on one device."""
    on_one(folder / "pretrain.yaml", folder / "passes", "--batch_size", "4", "--accumulate", "2")
    assert_equal_weights(pretrained[0], folder / "passes")


def test_swin(folder):
    """With shared_draws both devices, and both halves of the batch, see one mask."""
    path = recipe(folder, "swin", SWIN)
    on_one(path, folder / "swin_one")
    on_two(path, folder / "swin_two", "--batch_size", "4")
    assert_equal_weights(folder / "swin_one", folder / "swin_two")


@pytest.mark.parametrize("task", ["finetune", "linear_probe"])
def test_classifier(task, folder, pretrained):
    """Mixup, stochastic depth, clipping, the moving average, batch statistics and accuracy are those of one device."""
    values, init = (FINETUNE, "") if task == "finetune" else (PROBE, str(pretrained[0]))
    augment = {"rand_augment": "m9-mstd0.5-inc1", "erase": 0.25} if task == "finetune" else {}
    val = str(folder / "images" / "val")
    path = recipe(folder, task, {**values, "init": init}, val_dir=val, **augment)
    one, two = folder / f"{task}_one", folder / f"{task}_two"
    on_one(path, one)
    on_two(path, two, "--batch_size", "4")
    parts = ("weights", "average") if task == "finetune" else ("weights",)
    for part in parts:
        assert_equal_weights(one, two, part)
    ours, theirs = records(one)[-1], records(two)[-1]
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)
    assert ours["val_top5"] == pytest.approx(theirs["val_top5"], abs=100 / 30 + 0.1)  # one image may tip over

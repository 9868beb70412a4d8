"""Two devices at batch 4 train what one does at batch 8: through the real launcher, with the recipe's own crops.

One job trains all recipes on two devices, one after the other: starting a job takes longer than a small run.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from jobs import differences, finish, on_one, records, start

from localmim.data.builtin import write_builtin_images

RUNS = Path(__file__).with_name("runs_task.py")
STEPS = 20  # two epochs
TOLERANCE = 2e-6  # of weights; each of the 20 steps moves one by up to 1e-3
COMMON = {
    "device": "CPU",
    "epochs": 3,
    "max_steps": STEPS,
    "batch_size": 8,
    "log_every": 5,
    "report_every": None,
    "compile_cache": False,
    "data": {"workers": 1},
    "checkpoint": {"every_steps": 0},
}
VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}
PRETRAIN = {
    "optimizer": {"blr": 0.03, "warmup_epochs": 1},
    "model": {
        "name": "localmim_vit_tiny_patch16_224",
        **VIT,
        "depth": 7,  # of which two are computed: none above the last tap is
        "taps": [0, 1],
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


class Pair(NamedTuple):
    """The folders of the same run on one device and on two."""

    one: Path
    two: Path


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


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, Pair]:
    """Each recipe on one device and on two."""
    train, val = (str(folder / "images" / part) for part in ("train", "val"))
    augment = {"rand_augment": "m9-mstd0.5-inc1", "erase": 0.25}
    recipes = {
        "pretrain": (PRETRAIN, {}),
        "swin": (SWIN, {}),
        "finetune": (FINETUNE, {"val_dir": val, **augment}),
        "linear_probe": ({**PROBE, "init": str(folder / "pretrain_one")}, {"val_dir": val}),
    }
    pairs = {name: Pair(folder / f"{name}_one", folder / f"{name}_two") for name in recipes}
    for name, (values, data) in recipes.items():
        values = {**COMMON, **values, "data": {**COMMON["data"], "dir": train, **data}}
        for output, batch_size in zip(pairs[name], (8, 4)):
            changed = {**values, "batch_size": batch_size, "output_dir": str(output)}
            if output == pairs["pretrain"].two:  # a report beside it changes nothing
                changed |= {"report_every": 0, "data": {**values["data"], "val_dir": val}}
            output.with_suffix(".yaml").write_text(yaml.safe_dump(changed))
    job = start(RUNS, *(str(pair.two.with_suffix(".yaml")) for pair in pairs.values()), folder=folder)
    for pair in pairs.values():
        on_one(pair.one.with_suffix(".yaml"))
    code, text = finish(job)
    assert code == 0, text
    assert "devices x batch x forward passes: 2 x 4 x 1 = 8" in text
    return pairs


def test_vit(runs):
    """Weights after 20 steps, and the loss on the way."""
    one, two = runs["pretrain"]
    assert_equal_weights(one, two)
    for ours, theirs in zip(records(one), records(two), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["loss_scales"] == pytest.approx(theirs["loss_scales"], rel=1e-5)


def test_metrics_of_each_device(runs):
    """A slow disk of one machine must be seen: throughput and waiting, one by one."""
    for record in records(runs["pretrain"].two):
        assert len(record["images_per_s_rank"]) == len(record["data_wait_s_rank"]) == 2
        assert sum(record["images_per_s_rank"]) == pytest.approx(record["images_per_s"], rel=0.1)
    assert "images_per_s_rank" not in records(runs["pretrain"].one)[0]


def test_report_of_two_devices(runs):
    """The first one writes it, and both share the images of its k-NN."""
    two = runs["pretrain"].two
    assert 0 <= records(two)[-1]["knn_top1"] <= 100 and "knn_top1" not in records(two)[0]
    assert (two / "report.html").is_file() and [p.name for p in (two / "report").iterdir()] == [f"step_{STEPS:08d}"]


def test_accumulation(runs, folder):
    """Two forward passes of 4 equal one of 8, on one device."""
    one, output = runs["pretrain"].one, folder / "passes"
    on_one(one.with_suffix(".yaml"), "--batch_size", "4", "--accumulate", "2", "--output_dir", str(output))
    assert_equal_weights(one, output)


def test_swin(runs):
    """With shared_draws both devices, and both halves of the batch, see one mask."""
    assert_equal_weights(*runs["swin"])


@pytest.mark.parametrize("task", ["finetune", "linear_probe"])
def test_classifier(task, runs):
    """Mixup, stochastic depth, clipping, the moving average, batch statistics and accuracy are those of one device."""
    one, two = runs[task]
    parts = ("weights", "average") if task == "finetune" else ("weights",)
    for part in parts:
        assert_equal_weights(one, two, part)
    ours, theirs = records(one)[-1], records(two)[-1]
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)
    assert ours["val_top5"] == pytest.approx(theirs["val_top5"], abs=100 / 30 + 0.1)  # one image may tip over

"""What goes wrong in a job of two devices does not cost the run: through the real launcher."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml
from jobs import differences, finish, launch, on_two, records, wait_for_step

from localmim.data.builtin import write_builtin_images
from localmim.training.checkpoint import read_checkpoint

STEPS = 40
RECIPE = {
    "device": "CPU",
    "epochs": 4,
    "batch_size": 4,
    "log_every": 5,
    "report_every": None,
    "compile_cache": False,
    "optimizer": {"blr": 0.03, "warmup_epochs": 1},
    "checkpoint": {"every_steps": 5, "keep": 8},
    "model": {
        "name": "mae_vit_tiny_patch16_224",
        "image_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "num_heads": 2,
        "depth": 1,
        "decoder_dim": 16,
        "decoder_depth": 1,
        "decoder_heads": 2,
    },
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """80 images, one of them unreadable: ten steps an epoch on two devices."""
    folder = tmp_path_factory.mktemp("survive")
    write_builtin_images(folder / "images", size=40, train_per_class=8, val_per_class=1, progress=False)
    broken = sorted((folder / "images" / "train").rglob("*.jpg"))[7]
    broken.write_bytes(broken.read_bytes()[:200])
    path = folder / "recipe.yaml"
    data = {"workers": 1, "dir": str(folder / "images" / "train"), "max_bad_share": 0.2}
    path.write_text(yaml.safe_dump({**RECIPE, "data": data}))
    return path


@pytest.fixture(scope="module")
def whole(recipe) -> Path:
    """A run on two devices that nobody interrupts."""
    on_two(recipe, recipe.parent / "whole")
    return recipe.parent / "whole"


def rank_process(output: Path, rank: int) -> psutil.Process:
    """A rank of the newest job."""
    record = max((output / "logs").iterdir()) / f"rank_{rank}.pid"
    while not record.exists():
        time.sleep(0.05)
    return psutil.Process(int(record.read_text()))


def test_ctrl_c_and_kill(recipe, whole):
    """Ctrl-C, then kill -9 of a device: each ends the job, and the end is that of a whole run, bit for bit."""
    output = recipe.parent / "broken"
    arguments = (2, recipe, "--output_dir", str(output))
    process = launch(*arguments)
    wait_for_step(process, output, 5)
    process.send_signal(signal.SIGINT)
    code, text = finish(process)
    assert code == 1
    assert "stopped: by SIGTERM after step" in text and "the same command goes on" in text
    stopped_at = read_checkpoint(output).step
    assert 5 < stopped_at < STEPS

    process = launch(*arguments)
    wait_for_step(process, output, 25)
    family = psutil.Process(process.pid).children(recursive=True)
    rank_process(output, 1).kill()
    code, text = finish(process)
    assert code == 1
    assert "rank 1 was killed by SIGKILL" in text
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    code, text = finish(launch(*arguments))
    assert code == 0, text
    assert "going on after step" in text or "is complete" in text
    for part in ("weights", "optimizer"):
        assert max(differences(output, whole, part).values()) == 0
    times = ("time", "step_s", "images_per_s", "data_wait_s", "images_per_s_rank", "data_wait_s_rank")
    ours, theirs = ([{k: v for k, v in r.items() if k not in times} for r in records(o)] for o in (output, whole))
    assert ours == theirs
    assert theirs[-1]["bad_images"] == 1
    assert len(list((output / "logs").iterdir())) == 3  # a folder a job, none deleted


def test_another_number_of_devices(recipe, whole):
    """Two devices, then one: the effective batch stays, which is said, and so do the weights but for rounding."""
    output = recipe.parent / "fewer"
    shutil.copytree(whole, output)
    for folder in (output / "checkpoints").glob("step_*"):
        if folder.name > "step_00000020":
            shutil.rmtree(folder)
    (output / "checkpoints" / "LATEST").write_text("step_00000020\n")
    code, text = finish(launch(1, recipe, "--output_dir", str(output)))
    assert code == 0, text
    assert "devices x batch x forward passes: 2 x 4 x 1 = 8 images a step before, 1 x 4 x 2 = 8 now" in text
    assert read_checkpoint(output).state["layout"] == {
        "world": 1,
        "batch_size": 4,
        "accumulate": 2,
        "effective_batch": 8,
    }
    assert max(differences(output, whole, leave_out_key_biases=True).values()) < 2e-6


def test_a_disk_that_takes_no_checkpoint(recipe):
    """Rank 0 alone writes; that it cannot is said once, and ends all of the job."""
    output = recipe.parent / "unwritable"
    output.mkdir()
    (output / "checkpoints").symlink_to("nowhere/at/all")
    code, text = finish(launch(2, recipe, "--output_dir", str(output), "--max_steps", "5"))
    assert code == 2, text
    assert text.count("error: cannot save the checkpoint of step 5") == 1
    log = max((output / "logs").iterdir()) / "worker_1.log"
    assert "stopped: rank 0 failed in saving step 5" in log.read_text()
    assert os.listdir(output / "logs")

"""A run that is killed goes on bit for bit: the real command, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from localmim import cli
from localmim.data.builtin import write_builtin_images
from localmim.training.checkpoint import read_checkpoint
from localmim.training.compile_cache import FOLDER

ROOT = Path(__file__).parents[2]
STEPS = 12  # 8 an epoch: the run crosses an epoch's border
RECIPE = """
epochs: 2
batch_size: 4
log_every: 3
report_every: null
device: CPU
model: {name: mae_vit_tiny_patch16_224, image_size: 32, patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2,
        decoder_dim: 16, decoder_depth: 1, decoder_heads: 2}
target: {kind: hog}
optimizer: {blr: 1.0e-1, warmup_epochs: 1}
data: {workers: 2}
checkpoint: {every_steps: 2, keep: 3}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_builtin_images(folder / "images", size=40, train_per_class=4, val_per_class=1, progress=False)
    broken = sorted((folder / "images" / "train").rglob("*.jpg"))[7]
    broken.write_bytes(broken.read_bytes()[:200])  # an unreadable image must not change the result either
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("data: {", f"data: {{dir: {folder / 'images' / 'train'}, max_bad_share: 0.2, "))
    return path


def start(recipe: Path, output: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--config", str(recipe), "--output_dir", str(output), *more]
    command += ["--max_steps", str(STEPS)] if "--max_steps" not in more else []
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, err = process.communicate(timeout=180)
    return process.returncode, out + err


def steps_logged(output: Path) -> list[int]:
    path = output / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")]


def wait_for_checkpoint(process: subprocess.Popen, output: Path, step: int) -> None:
    deadline = time.monotonic() + 150
    while not (output / "checkpoints" / f"step_{step:08d}").is_dir():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(recipe) -> Path:
    """A run that nobody interrupts."""
    output = recipe.parent / "whole"
    code, text = finish(start(recipe, output))
    assert code == 0, text
    assert "cannot read" in text
    return output


def assert_same_end(output: Path, whole: Path) -> None:
    ours, theirs = read_checkpoint(output), read_checkpoint(whole)
    assert ours.step == theirs.step == STEPS
    for part in ("weights", "optimizer"):
        a, b = getattr(ours, part)(), getattr(theirs, part)()
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[n], b[n]) for n in a), part
    times = {"time", "step_s", "images_per_s", "data_wait_s"}
    lines = [
        [{k: v for k, v in json.loads(line).items() if k not in times} for line in (o / "metrics.jsonl").open()]
        for o in (output, whole)
    ]
    assert lines[0] == lines[1]


def test_kill_at_several_steps_and_resume_is_bit_for_bit(recipe, whole):
    """SIGKILL in the middle of epochs, twice in one run; weights, moments and metrics end equal.

    The step is compiled by the first start alone: the others read what it kept.
    """
    output, written = recipe.parent / "killed", set()
    for step, extra in ((2, 0.0), (6, 0.15)):
        process = start(recipe, output)
        wait_for_checkpoint(process, output, step)
        time.sleep(extra)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        written |= {graph.stat().st_mtime_ns for graph in (output / FOLDER).rglob("*.mindir")}
    code, text = finish(start(recipe, output))
    assert code == 0, text
    assert "going on after step" in text or "is complete" in text
    assert len(written) == 1
    assert_same_end(output, whole)


def test_sigterm_saves_between_checkpoints_and_the_same_command_goes_on(recipe, whole):
    """SIGTERM leaves a checkpoint of the step it came in, exit code 1, one line that says how to go on."""
    output = recipe.parent / "terminated"
    process = start(recipe, output, "--checkpoint.every_steps", "1000", "--log_every", "3")
    deadline = time.monotonic() + 150
    while not steps_logged(output):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    code, text = finish(process)
    saved = read_checkpoint(output).step
    if saved < STEPS:  # the signal came before the last step, as it nearly always does
        assert code == 1
        assert f"SIGTERM after step {saved}" in text
    code, text = finish(start(recipe, output))
    assert code == 0, text
    assert_same_end(output, whole)


def test_a_closed_terminal_saves_as_well(recipe, whole):
    """SIGHUP, which a closed session sends, is as SIGTERM; lines that nobody reads any more are no reason to fail."""
    output = recipe.parent / "hung_up"
    process = start(recipe, output, "--checkpoint.every_steps", "1000")
    deadline = time.monotonic() + 150
    while not steps_logged(output):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.stderr.close()  # writing there is an error from now on
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) in (0, 1)
    assert read_checkpoint(output).step >= 3


def test_another_recipe_is_refused_and_a_finished_run_is_left_alone(recipe, whole):
    """A changed key that matters is named; nothing in the folder changes."""
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    code, text = finish(start(recipe, whole, "--optimizer.blr", "0.2"))
    assert code == 2
    assert "optimizer.blr" in text.splitlines()[-1]
    code, text = finish(start(recipe, whole))
    assert code == 0
    assert "is complete" in text
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "many"], "epochs"),
        (["--data.dir", "no/such/folder"], "no/such/folder"),
        (["--mask.ratio", "1.2"], "mask.ratio"),
        (["--model.image_size", "36"], "not a multiple of patch_size 8"),
        (
            ["--model.name", "localmim_vit_tiny_patch16_224", "--model.decoder_depth", "1", "--model.depth", "6"],
            "at least 7 blocks",
        ),
        (["--batch_size", "4000"], "fewer than batch_size"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(recipe, tmp_path, monkeypatch, capfd, arguments, said):
    """Each mistake of the issue: one line on stderr, nothing written."""
    monkeypatch.syspath_prepend(str(ROOT))
    from train import main

    given = ["--config", str(recipe), "--output_dir", str(tmp_path / "out"), "--max_steps", str(STEPS), *arguments]
    assert cli.run(main, given) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1, err
    assert said in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--optimizer.blrr", "1"], "did you mean 'blr'"), (["--device", "GPU"], "this MindSpore")],
)
def test_bad_input_of_the_command(recipe, tmp_path, arguments, said):
    """The same in a process of its own, where nothing else may be on stderr either."""
    if arguments[0] == "--device" and os.environ.get("CUDA_VISIBLE_DEVICES"):
        arguments = ["--device", "Ascend"]
    process = start(recipe, tmp_path / "out", *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert len(err.strip().splitlines()) == 1, err
    assert said in err
    assert not (tmp_path / "out").exists()

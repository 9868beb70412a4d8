"""Jobs on two CPU devices, started as a user starts them."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from job_environment import job_environment
from localmim.config import load_config
from localmim.training.checkpoint import read_checkpoint
from localmim.training.loop import train

ROOT = Path(__file__).parents[2]


def launch(devices: int, recipe: Path, *more: str) -> subprocess.Popen:
    """scripts/run_distribute_train_cpu.sh, with this Python."""
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "run_distribute_train_cpu.sh"), str(devices), str(recipe), *more],
        env=job_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start(task: Path, *arguments: str, folder: Path) -> subprocess.Popen:
    """A script of these tests on two devices, in a folder that gets the job's logs."""
    return subprocess.Popen(
        [sys.executable, "-m", "localmim.launch", "--devices", "2", str(task), *arguments],
        cwd=folder,
        env=job_environment(PYTHONPATH=str(ROOT / "src")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and what was on the terminal."""
    text = process.communicate(timeout=240)[0]
    return process.returncode, text


def on_two(recipe: Path, output: Path, *more: str) -> str:
    """A job that must end well; what was on the terminal."""
    code, text = finish(launch(2, recipe, "--output_dir", str(output), *more))
    assert code == 0, text
    return text


def on_one(recipe: Path, *more: str) -> str:
    """The same recipe on one device, in this process; what was on the terminal."""
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        train(load_config(["--config", str(recipe), *more]))
    return text.getvalue()


def wait_for_step(process: subprocess.Popen, output: Path, step: int) -> None:
    """Until a checkpoint of that step is there."""
    deadline = time.monotonic() + 200
    while not (output / "checkpoints" / f"step_{step:08d}").is_dir():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def differences(a: Path, b: Path, part: str = "weights", leave_out_key_biases: bool = False) -> dict[str, float]:
    """Largest difference of each array of two runs' newest checkpoints."""
    ours, theirs = (getattr(read_checkpoint(run), part)() for run in (a, b))
    assert ours.keys() == theirs.keys()
    found = {n: np.abs(ours[n].astype(np.float64) - theirs[n]) for n in ours}
    for name in found:
        if leave_out_key_biases and name.endswith("qkv.bias"):
            found[name].reshape(3, -1)[1] = 0
    return {n: float(d.max()) for n, d in found.items()}


def records(run: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

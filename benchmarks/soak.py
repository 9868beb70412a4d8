"""A long run with resumes at random: does memory stay flat, do file handles stay few?

    python benchmarks/soak.py [--config RECIPE] [--steps 2000] [--stops 6] [--seed 0] [--out DIR] [--key value …]

Trains STEPS steps of a recipe and stops it STOPS times at random steps, by SIGKILL and by SIGTERM in turn; the same
command goes on each time. Meanwhile resident memory, file handles and threads of the process are read once a second.
Memory of a session is fitted by a line over steps, its first WARM_UP steps left out; what is printed is the mean slope
of all sessions weighted by their steps, with its standard error, and the fewest and most handles and threads.
Everything is written to DIR/soak.json.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from localmim.config import load_config

WARM_UP = 100  # steps
LEAVING = 3  # last readings of a session: the process frees what it has before it ends


def last_step(metrics: Path) -> int:
    """Of the last whole record."""
    if not metrics.is_file():
        return 0
    lines = [line for line in metrics.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return json.loads(lines[-1])["step"] if lines else 0


def session(command: list[str], metrics: Path, stop_at: int | None, how: signal.Signals, log: Path) -> list[dict]:
    """Runs the command until it ends, or stops it after a step; what was read, once a second."""
    readings = []
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    watched, begun, stopped = psutil.Process(process.pid), last_step(metrics), False
    while process.poll() is None:
        step = last_step(metrics)
        try:
            with watched.oneshot():
                reading = {
                    "rss": watched.memory_info().rss,
                    "handles": watched.num_fds(),
                    "threads": watched.num_threads(),
                }
        except psutil.Error:
            break
        if step > begun:
            readings.append({"step": step, **reading})
        if stop_at is not None and step >= max(stop_at, begun + 1) and not stopped:
            process.send_signal(how)
            stopped = True
        time.sleep(1)
    code = process.wait()
    expected = {None: 0, signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 1}[how if stop_at is not None else None]
    if code != expected:
        raise SystemExit(f"exit code {code}, expected {expected}: see {log}")
    return readings


def slope(readings: list[dict]) -> tuple[float, float, int] | None:
    """Bytes a step by least squares, its standard error, and the steps it covers; None for too short a session.

    Least squares, so that the allocator's jumps of some megabytes count as growth as well.
    """
    begin = readings[0]["step"] + WARM_UP if readings else 0
    used = [r for r in readings[:-LEAVING] if r["step"] >= begin]
    if len(used) < 10 or used[-1]["step"] - used[0]["step"] < WARM_UP:
        return None
    x, y = (np.array([r[key] for r in used], np.float64) for key in ("step", "rss"))
    x -= x.mean()
    b = (x * (y - y.mean())).sum() / (x * x).sum()
    error = math.sqrt(((y - y.mean() - b * x) ** 2).sum() / (len(x) - 2) / (x * x).sum())
    return b, error, int(used[-1]["step"] - used[0]["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description="A long run with resumes at random.")
    parser.add_argument("--config", default="config/demo/localmim_vit.yaml")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--stops", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="outputs/soak")
    options, overrides = parser.parse_known_args()
    out = Path(options.out)
    if options.steps < 4 * WARM_UP:
        raise SystemExit(f"--steps is {options.steps}, expected at least {4 * WARM_UP}")
    if out.exists():
        raise SystemExit(f"{out} exists: give another --out")
    out.mkdir(parents=True)

    # Long enough a schedule; checkpoints often enough that a kill costs little
    arguments = ["--config", options.config, *overrides, "--output_dir", str(out / "run"), "--epochs", "100000"]
    arguments += ["--max_steps", str(options.steps), "--checkpoint.every_steps", "100", "--report_every", "null"]
    load_config(arguments)
    command = [sys.executable, "train.py", *arguments]
    metrics = out / "run" / "metrics.jsonl"
    draw = np.random.default_rng(options.seed)
    # At random, one in each of as many equal parts of the run, not close to one another
    part = options.steps // max(options.stops, 1)
    stops = [i * part + int(draw.integers(part // 4, 3 * part // 4)) for i in range(options.stops)]
    sessions = []
    for i, stop_at in enumerate([*stops, None]):
        how = signal.SIGTERM if i % 2 else signal.SIGKILL
        readings = session(command, metrics, stop_at, how, out / "train.log")
        sessions.append({"stop_at": stop_at, "how": how.name if stop_at else "done", "readings": readings})
        fit = slope(readings)
        print(
            f"session {i + 1}: to step {readings[-1]['step'] if readings else '-'}, {sessions[-1]['how']}"
            + (f", {fit[0] / 1024:+.2f} KiB a step over {fit[2]} steps" if fit else ""),
            flush=True,
        )
    fits = [fit for s in sessions if (fit := slope(s["readings"]))]
    if not fits:
        raise SystemExit("no session was long enough to fit a line: expected more --steps or fewer --stops")
    weights = np.array([n for _, _, n in fits], np.float64)
    mean = float((np.array([b for b, _, _ in fits]) * weights).sum() / weights.sum())
    error = float(np.sqrt(((np.array([e for _, e, _ in fits]) * weights) ** 2).sum()) / weights.sum())
    settled = [r for s in sessions for r in s["readings"][5:-LEAVING]]
    summary = {
        "steps": last_step(metrics),
        "sessions": len(sessions),
        "slope_kib_a_step": mean / 1024,
        "slope_error_kib": error / 1024,
        "fitted_steps": int(weights.sum()),
        "rss_mib": [round(f(r["rss"] for r in settled) / 2**20) for f in (min, max)],
        "handles": [f(r["handles"] for r in settled) for f in (min, max)],
        "threads": [f(r["threads"] for r in settled) for f in (min, max)],
    }
    (out / "soak.json").write_text(json.dumps({"summary": summary, "sessions": sessions}), encoding="utf-8")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()

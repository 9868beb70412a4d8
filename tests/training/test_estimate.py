"""How long steps take and a run will take, on a clock of our own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from localmim.distributed import Ranks
from localmim.training import loop
from localmim.training.layout import Layout


@pytest.fixture()
def clock(monkeypatch):
    """time.perf_counter, moved by hand."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now.s)
    return now


def run_of(devices: int, step: int):
    config = SimpleNamespace(epochs=10)
    return SimpleNamespace(
        total_steps=72000, last_step=36000, step=step, config=config, layout=Layout(devices, 8, 1, 8 * devices)
    )


@pytest.mark.parametrize(("step_s", "said_at"), [(0.5, 21), (4.0, 5)])
def test_estimate(clock, step_s, said_at):
    """Once, within a minute of a first step of half a minute, which is left out; hours in all, and those left."""
    estimate, lines = loop.Estimate(), {}
    for step in range(1, 40):
        clock.s += 30.0 if step == 1 else step_s
        if line := estimate.line(run_of(2, step)):
            lines[step] = line
    assert list(lines) == [said_at]
    left = (36000 - said_at) * step_s / 3600
    assert lines[said_at] == (
        f"{step_s:.2f} s a step: the whole recipe, 72000 steps in 10 epochs, takes about {20 * step_s:.1f} hours "
        f"on each of 2 devices without evaluations; {left:.1f} are left to step 36000"
    )


def test_pace(clock):
    """Waiting for images is part of a step; a save between steps is not."""
    pace = loop.Pace(Ranks())
    for _ in range(4):
        clock.s += 0.5
        pace.waited()
        clock.s += 1.5
        pace.stepped()
    clock.s += 60
    pace.begin()
    clock.s += 1.0
    pace.waited()
    clock.s += 1.0
    pace.stepped()
    assert pace.record(Layout(1, 8, 2, 16)) == {"images_per_s": 8.0, "step_s": 2.0, "data_wait_s": 0.6}

"""How long steps take and a run will take, on a clock of our own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from localmim.distributed import Ranks
from localmim.training import pace
from localmim.training.layout import Layout


@pytest.fixture()
def clock(monkeypatch):
    """time.perf_counter, moved by hand."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now.s)
    return now


@pytest.mark.parametrize(("step_s", "said_at"), [(0.5, 21), (4.0, 5)])
def test_estimate(clock, step_s, said_at):
    """Once, within a minute of a first step of half a minute, which is left out; hours in all, and those left."""
    estimate, lines = pace.Estimate(72000, 36000, 10, 2), {}
    for step in range(1, 40):
        clock.s += 30.0 if step == 1 else step_s
        if line := estimate.line(step):
            lines[step] = line
    assert list(lines) == [said_at]
    left = (36000 - said_at) * step_s / 3600
    assert lines[said_at] == (
        f"{step_s:.2f} s a step: the whole recipe, 72000 steps in 10 epochs, takes about {20 * step_s:.2f} hours "
        f"on each of 2 devices without evaluations; {left:.2f} are left to step 36000"
    )


def test_pace(clock):
    """Waiting for images is part of a step; a save between steps is not."""
    paced = pace.Pace(Ranks())
    for _ in range(4):
        clock.s += 0.5
        paced.waited()
        clock.s += 1.5
        paced.stepped()
    clock.s += 60
    paced.begin()
    clock.s += 1.0
    paced.waited()
    clock.s += 1.0
    paced.stepped()
    assert paced.record(Layout(1, 8, 2, 16)) == {"images_per_s": 8.0, "step_s": 2.0, "data_wait_s": 0.6}

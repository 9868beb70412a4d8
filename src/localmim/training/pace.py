"""How long steps take on each device, and how long a recipe will take."""

from __future__ import annotations

import time

from localmim.distributed import Ranks
from localmim.training.layout import Layout


class Pace:
    """How long steps take, and how much of it this device waits for images."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.steps, self.waiting, self.spent = 0, 0.0, 0.0
        self.begin()

    def begin(self) -> None:
        """What came before is not counted."""
        self.since = time.perf_counter()

    def waited(self) -> None:
        """The images of a step are there."""
        self.waiting += time.perf_counter() - self.since

    def stepped(self) -> None:
        """A step is done."""
        now = time.perf_counter()
        self.spent, self.steps, self.since = self.spent + now - self.since, self.steps + 1, now

    def record(self, layout: Layout) -> dict:
        """Means since the last record: of all devices, and one by one where there are several."""
        spent, waiting = self.ranks.gather(self.spent / self.steps, self.waiting / self.steps)
        self.steps, self.waiting, self.spent = 0, 0.0, 0.0
        self.begin()
        one_by_one = {}
        if layout.world > 1:
            one_by_one = {"images_per_s_rank": layout.share / spent, "data_wait_s_rank": waiting}
        return {
            "images_per_s": layout.images / spent.mean(),
            "step_s": spent.mean(),
            "data_wait_s": waiting.mean(),
            **one_by_one,
        }


class Estimate:
    """One line in the first minute: how long all of the recipe takes. The first step compiles, and does not count."""

    STEPS, SECONDS = 20, 15.0  # enough of either

    def __init__(self, total_steps: int, last_step: int, epochs: int, devices: int):
        self.total_steps, self.last_step, self.epochs, self.devices = total_steps, last_step, epochs, devices
        self.since: float | None = None
        self.steps, self.said = 0, False

    def begin(self) -> None:
        """What came before is not counted."""
        self.since, self.steps = time.perf_counter(), 0

    def line(self, step: int) -> str | None:
        """After each step, `step` being done: the line when it is time for it."""
        if self.since is None:
            self.begin()
            return None
        self.steps += 1
        spent = time.perf_counter() - self.since
        if self.said or (self.steps < self.STEPS and spent < self.SECONDS):
            return None
        self.said = True
        step_s = spent / self.steps
        hours, left = (n * step_s / 3600 for n in (self.total_steps, self.last_step - step))
        each = f" on each of {self.devices} devices" if self.devices > 1 else ""
        return (
            f"{step_s:.2f} s a step: the whole recipe, {self.total_steps} steps in {self.epochs} epochs, takes about "
            f"{hours:.2f} hours{each} without evaluations; {left:.2f} are left to step {self.last_step}"
        )

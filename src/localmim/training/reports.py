"""The reports of a run that goes on: snapshots of moments, and the page. The run needs neither."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from localmim.analysis.history import PAGE, drop_snapshots, snapshot_path
from localmim.distributed import Ranks
from localmim.training.task import Task, is_due


class Reports:
    """Makes them of the model as it is; the first device does, and the others wait.

    Args:
        task: Has the recipe, the model and the images to show.
        output: The run's folder.
        ranks: The devices that share the run.
    """

    def __init__(self, task: Task, output: Path, ranks: Ranks):
        self.task, self.output, self.ranks = task, output, ranks
        self.snapshots = None  # compiled when the first is taken

    def begin(self, step: int) -> None:
        """What the run will make again from `step` on, or another run has left, goes."""
        drop_snapshots(self.output, step)

    def are_due(self, step: int, steps_per_epoch: int, last: bool) -> bool:
        """Whether the recipe asks for a report after a step, or before the first."""
        every = self.task.config.report_every
        return every is not None and is_due(every, step, steps_per_epoch, last)

    def add(self, step: int, tell: Callable[[str], object]) -> None:
        """Adds this moment, as far as it is not there. Whatever goes wrong with it, the run goes on.

        Args:
            step: Steps that are done.
            tell: Takes a line for the user.
        """
        if self.ranks.first:
            try:
                self.make(step, tell)
            except Exception as error:  # an operator without memory, a full disk, ...
                tell(f"step {step}: no report, {' '.join(str(error).split()) or type(error).__name__}")
            self.task.model.set_train(True)
        self.ranks.agree(None, "writing the report")

    def make(self, step: int, tell: Callable[[str], object]) -> None:
        """The snapshot, and from the first step on the page, unless it is newer."""
        from localmim.analysis.report import write_report  # here: drawing takes a second to import
        from localmim.analysis.snapshot import Snapshots

        snapshot, page = snapshot_path(self.output, step), self.output / PAGE
        if not snapshot.exists():
            if self.snapshots is None:
                self.snapshots = Snapshots(self.task.config, self.task.model, self.task.shown, self.output)
            self.snapshots.take(step)
        if step and not (page.exists() and page.stat().st_mtime >= snapshot.stat().st_mtime):
            tell(f"report: {write_report([self.output])}")

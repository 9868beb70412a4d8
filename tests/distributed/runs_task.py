"""Several runs one after the other in one job, for test_equal.py: python runs_task.py RECIPE…"""

from __future__ import annotations

import functools
import sys

from localmim import cli
from localmim.config import load_config
from localmim.training import loop


def main(argv: list[str]) -> None:
    """Trains each recipe; the first one that fails ends the job."""
    for once in ("set_device", "join"):  # MindSpore takes them once in a process; all recipes ask for the same
        setattr(loop, once, functools.cache(getattr(loop, once)))
    for recipe in argv:
        loop.train(load_config(["--config", recipe]))


if __name__ == "__main__":
    sys.exit(cli.run(main))

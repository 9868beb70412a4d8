"""A small job for the launcher's tests: two ranks that add up numbers, and what goes wrong is the argument.

python task.py HOW FOLDER; each rank leaves a file in FOLDER when SIGTERM has stopped it.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import numpy as np

from localmim import cli
from localmim.device import set_device
from localmim.distributed import join
from localmim.errors import RunError, UserError


def main(argv: list[str]) -> None:
    """Joins, adds, fails as asked or goes on until a signal comes."""
    how, folder = argv[0], Path(argv[1])
    received = []
    set_device("CPU")
    ranks = join()
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    print(f"sum {ranks.total(np.ones(1))[0]:g}", flush=True)
    if ranks.rank == 1:
        if how == "traceback":
            raise RuntimeError("rank one is broken")
        if how == "mistake":
            raise UserError("data.dir holds no images")
    if how != "done":
        while not ranks.total(np.array([len(received)]))[0]:
            time.sleep(0.02)
        (folder / f"stopped_{ranks.rank}").touch()
        raise RunError("SIGTERM: saved")


if __name__ == "__main__":
    sys.exit(cli.run(main))

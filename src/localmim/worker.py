"""What MindSpore's msrun starts for every process of a job: it runs the script and leaves a record of how that ended.

Started as `python worker.py LOG_FOLDER SCRIPT [ARGUMENTS]`, once as the job's scheduler and once a rank. In LOG_FOLDER
it writes NAME.pid when it begins and NAME.exit, the exit code, when the script has ended; NAME is scheduler or rank_R.
msrun kills every other process as soon as one has failed. So a process that failed stays until the launcher, which
reads these records, ends it: the others can say their last line, or save a checkpoint. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

LOCAL_DEVICES = "LOCALMIM_LOCAL_DEVICES"  # in the environment: processes that share this machine's cores
HOLD_S = 120.0  # a failed process stays that long where no launcher ends it
ORPHAN_S = 120.0  # a process that lost its parent got SIGTERM, and has that long to save a checkpoint
_PR_SET_PDEATHSIG = 1


def die_with_parent(number: int) -> None:
    """Asks Linux to send this process the signal `number` when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def member_name() -> str:
    """scheduler or rank_R, from what msrun put into the environment."""
    return "scheduler" if os.environ["MS_ROLE"] == "MS_SCHED" else f"rank_{os.environ['MS_NODE_ID']}"


def write_record(path: Path, number: int) -> None:
    """A number in a file, there whole or not at all; a full disk is no reason to fail: the exit code says it too."""
    aside = path.with_name(f".{path.name}")
    try:
        aside.write_text(f"{number}\n", encoding="ascii")
        aside.replace(path)
    except OSError as error:
        print(f"cannot write {path}: {error.strerror}", file=sys.stderr)


def read_record(path: Path) -> int | None:
    """The number that `write_record` left, or None."""
    try:
        return int(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        return None


def schedule() -> None:
    """The scheduler of the job: returns when every rank has left. It needs no device."""
    import mindspore as ms
    from mindspore.communication import init

    ms.set_device("CPU")
    init()


def run_script(script: str, arguments: list[str]) -> int:
    """Runs a script as `python SCRIPT ARGUMENTS` would, and returns its exit code."""
    import runpy

    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)  # not this file's folder: its names are not top-level modules
    runpy.run_path(script, run_name="__main__")
    return 0


def exit_code(work, *arguments) -> int:
    """The exit code of a Python process that does `work(*arguments)`; tells what went wrong as Python does."""
    try:
        return work(*arguments) or 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped: interrupted", file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    return 1


def end_orphan(parent: int) -> None:
    """Ends this process some time after its parent has gone, whatever it waits for by then."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(ORPHAN_S)
    os._exit(1)


def main(folder: Path, script: str, arguments: list[str]) -> None:
    """Runs the process's part of the job, and leaves the record."""
    parent, name = os.getppid(), member_name()
    die_with_parent(signal.SIGKILL if name == "scheduler" else signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the script has a better one: "interrupted"
    threading.Thread(target=end_orphan, args=[parent], daemon=True).start()
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only
    write_record(folder / f"{name}.pid", os.getpid())
    code = exit_code(schedule) if name == "scheduler" else exit_code(run_script, script, arguments)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing is left that could be saved
    sys.stdout.flush()
    sys.stderr.flush()
    write_record(folder / f"{name}.exit", code)
    if code:
        until = time.monotonic() + HOLD_S
        while time.monotonic() < until and os.getppid() == parent:
            time.sleep(0.2)
        os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])

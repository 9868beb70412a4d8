"""Watching a job that msrun started until all of it has ended: what is shown, whose failure it was, who ends whom.

msrun reports no more than that something failed, after minutes in which its scheduler notices. So the processes leave
records (worker.py), and this file reads them. While a job runs the launcher adopts what msrun leaves behind, so at the
end every process that it started, at whatever depth, is known and ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from localmim.worker import die_with_parent, read_record

POLL_S = 0.2
FAIL_GRACE_S = 5.0  # after the first failure: for the others to say their last line
STOP_GRACE_S = 60.0  # after the first process has left a job that is asked to stop: for the checkpoint
STOP_S = 600.0  # for a job that is asked to stop and nobody leaves
DONE_S = 60.0  # for msrun, when every rank is done
KILL_S = 30.0  # for killed processes to be gone: a device may take its time
PEER_FAILED = 3  # exit code of a process that stopped because another had failed
TAIL_LINES = 20
_PR_SET_CHILD_SUBREAPER = 36
_MSRUN_SAW = re.compile(r"Worker process (\d+) exit with exception\. Error code: (-?\d+)")


class Member:
    """One process of the job: the scheduler or a rank.

    Attributes:
        name: scheduler or rank_R, as in the names of its records.
        log: What it prints.
        code: Its exit code; negative: the signal that killed it; None: it runs, or nobody knows.
        ended: time.time() of its end; None: it runs.
        recorded: Whether it said its code itself. If not it was killed, or it crashed.
    """

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.log = folder / ("scheduler.log" if name == "scheduler" else f"{name.replace('rank', 'worker')}.log")
        self.process: psutil.Process | None = None
        self.code: int | None = None
        self.ended: float | None = None
        self.recorded = self.told = False

    @property
    def failed(self) -> bool:
        return self.ended is not None and self.code != 0

    def look(self) -> None:
        """Reads its records, and whether it is still there."""
        if self.ended is not None:
            return
        pid = read_record(self.folder / f"{self.name}.pid")
        alive = pid is None or self._alive(pid)
        record = self.folder / f"{self.name}.exit"
        self.code = read_record(record)
        if self.code is not None:
            self.ended, self.recorded = record.stat().st_mtime, True
        elif not alive:
            self.ended = time.time()

    def _alive(self, pid: int) -> bool:
        try:
            self.process = self.process or psutil.Process(pid)
        except psutil.NoSuchProcess:
            return False
        return is_running(self.process)

    def tell_to_stop(self) -> None:
        """SIGTERM, once, as soon as it is there."""
        if self.process is not None and not self.told and self.ended is None:
            self.told = True
            with contextlib.suppress(psutil.NoSuchProcess):
                self.process.send_signal(signal.SIGTERM)


class Follower:
    """Copies what a growing file holds to the terminal, without the lines in which MindSpore's cluster greets."""

    NOISE = b"[INFO] DISTRIBUTED("

    def __init__(self, path: Path):
        self.path, self.file, self.held = path, None, b""

    def copy(self, last: bool = False) -> None:
        """What was written since the last call. A terminal that is gone is no reason to stop a job."""
        if self.file is None and self.path.exists():
            self.file = open(self.path, "rb")  # noqa: SIM115  (read until the job has ended)
        if self.file is None or not (new := self.held + self.file.read()):
            return
        lines = new.splitlines(keepends=True)
        begun = (
            lines.pop() if not last and not new.endswith((b"\n", b"\r")) else b""
        )  # held until it is known what it is
        self.held = begun if begun.startswith(b"[") else b""
        shown = b"".join(line for line in lines if not line.startswith(self.NOISE)) + begun[len(self.held) :]
        with contextlib.suppress(OSError):
            sys.stdout.buffer.write(shown)
            sys.stdout.flush()


class Job:
    """A job on this machine.

    Args:
        command: The msrun command.
        environment: Of all processes.
        folder: Holds all logs and records, exists and is empty.
        ranks: The ranks of this machine.
        scheduler: Whether the job's scheduler runs here.
        follow: The rank whose log is copied to the terminal; None: none.
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        folder: Path,
        ranks: range,
        scheduler: bool,
        follow: int | None,
    ):
        self.command, self.environment, self.folder = command, environment, folder
        self.ranks = [Member(f"rank_{r}", folder) for r in ranks]
        self.members = self.ranks + ([Member("scheduler", folder)] if scheduler else [])
        self.msrun_log = folder / "msrun.log"
        self.followed = None if follow is None else folder / f"worker_{follow}.log"
        self.signals = 0
        self.began: dict[str, float] = {}

    def run(self) -> int:
        """Starts msrun and returns the exit code of the job: 0, 2 for a user's mistake, 1 for anything else.

        Nothing of the job is alive when it returns, or raises. It ends all descendants of this process, so call it in
        one that has no others.
        """
        adopt_orphans()
        follower = Follower(self.followed) if self.followed else None
        with self._signals(), open(self.msrun_log, "wb") as log:
            self.msrun = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C on the terminal reaches the launcher alone
                preexec_fn=lambda: die_with_parent(signal.SIGKILL),
            )
            try:
                self._watch(follower)
                self.msrun_code = self.msrun.returncode  # None: it still runs
            finally:
                end_descendants()
                if follower:
                    follower.copy(last=True)
        return self._verdict()

    @property
    def done(self) -> bool:
        """Whether every rank of this machine has done its work."""
        return all(rank.code == 0 for rank in self.ranks)

    def _watch(self, follower: Follower | None) -> None:
        """Returns when the job has ended, or must be ended."""
        while True:
            time.sleep(POLL_S)
            self.msrun.poll()
            for member in self.members:
                member.look()
            self._read_msrun_log()
            if follower:
                follower.copy()
            if self.done:
                over = self.msrun.returncode is not None or self._longer("done", DONE_S)
            elif self.signals:
                over = self._stopped()
            elif self.msrun.returncode is not None:
                over = all(rank.ended or not rank.process for rank in self.ranks) or self._longer("msrun", STOP_GRACE_S)
            else:
                over = self._failed()
            if over:
                return

    def _longer(self, than: str, seconds: float) -> bool:
        """Whether it was more than `seconds` ago that this was asked first."""
        return time.monotonic() - self.began.setdefault(than, time.monotonic()) > seconds

    def _failed(self) -> bool:
        """Whether a member has failed, and the others have said what they had to say."""
        if not any(member.failed for member in self.members):
            return False
        silent = [rank for rank in self.ranks if rank.failed and not rank.recorded]
        unknown = silent and all(rank.code is None for rank in silent)  # msrun is about to tell
        ended = all(rank.ended for rank in self.ranks)
        return (ended and not unknown) or self._longer("fail", FAIL_GRACE_S)

    def _stopped(self) -> bool:
        """Tells the ranks to stop, and whether they have, or waiting has no use."""
        if "stop" not in self.began:
            say("stopping after a checkpoint; Ctrl-C again ends it at once")
        for rank in self.ranks:
            rank.tell_to_stop()
        if self.signals > 1 or self._longer("stop", STOP_S) or all(rank.ended for rank in self.ranks):
            return True
        if any(rank.failed and not rank.recorded for rank in self.ranks):
            return self._longer("fail", FAIL_GRACE_S)
        return any(rank.ended for rank in self.ranks) and self._longer("leave", STOP_GRACE_S)

    @contextlib.contextmanager
    def _signals(self):
        """Counts the signals that ask to stop. Those that are ignored stay so: nohup, a shell's background jobs."""

        def count(_number, _frame):
            self.signals += 1

        asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {n: signal.signal(n, count) for n in asking if signal.getsignal(n) != signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _read_msrun_log(self) -> None:
        """The code of the rank that msrun found dead first, if that left none itself."""
        silent = {r.process.pid: r for r in self.ranks if r.failed and not r.recorded and r.process}
        if not silent or any(rank.code is not None for rank in silent.values()):
            return
        for pid, code in _MSRUN_SAW.findall(self.msrun_log.read_text(encoding="utf-8", errors="replace")):
            if int(pid) in silent:
                silent[int(pid)].code = int(code)

    def _verdict(self) -> int:
        """Says on stderr what failed first, unless rank 0's log has shown it, and returns the exit code."""
        if self.done:
            if self.msrun_code != 0:
                say(f"all ranks are done, but msrun did not end well; its log: {self.msrun_log}")
            return 0
        if self.signals:
            unsaid = [rank.name.replace("_", " ") for rank in self.ranks if not rank.recorded]
            if unsaid:
                say(f"stopped: {', '.join(unsaid)} ended before it could say whether it saved")
            return 1
        killed = (self.msrun_code or 0) < 0  # then the others were told to stop by its death
        first = None if killed else self._first_failed()
        name, log, code = (
            ("msrun", self.msrun_log, self.msrun_code)
            if first is None
            else (first.name.replace("_", " "), first.log, first.code)
        )
        lines, shown = tail(log), tail(self.followed) if self.followed else []
        said = [line for line in lines[-TAIL_LINES:] if line.startswith(("error: ", "stopped: "))]
        if said and (code or 0) > 0:
            if said[-1] not in shown:
                say(f"{said[-1]} ({name}; its log: {log})")
            return 2 if code == 2 else 1
        if trouble(lines) != trouble(shown):
            say(*trouble(lines))
        full = f"; the disk of {self.folder} is full" if shutil.disk_usage(self.folder).free < 2**20 else ""
        say(f"stopped: {name} {how_it_ended(code)}; its log: {log}{full}")
        return 1

    def _first_failed(self) -> Member | None:
        """Whose failure it was. What died without a record comes before what noticed that."""
        failed = [member for member in self.members if member.failed]
        silent = [member for member in failed if not member.recorded and member.code != PEER_FAILED]
        named = [member for member in silent if member.code is not None]
        primary = [member for member in failed if member.code != PEER_FAILED]
        return min(named or silent or primary or failed, key=lambda member: member.ended, default=None)


def say(*lines: str) -> None:
    """Lines on stderr. A terminal that is gone is no reason to leave a job alone."""
    with contextlib.suppress(OSError):
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def adopt_orphans() -> None:
    """Linux gives this process the children of a descendant that ends, so that none gets lost."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants() -> None:
    """Kills everything that this process has started, and waits until it is gone."""
    until = time.monotonic() + KILL_S
    while True:
        with contextlib.suppress(ChildProcessError):  # no child is left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        running = [child for child in psutil.Process().children(recursive=True) if is_running(child)]
        if not running:
            return
        if time.monotonic() > until:
            say(f"processes that do not end: {', '.join(str(child.pid) for child in running)}")
            return
        for child in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        time.sleep(0.05)


def is_running(process: psutil.Process) -> bool:
    """Whether a process is there, and not only its exit code."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tail(path: Path) -> list[str]:
    """The last lines of a file, of at most 64 KiB; none where there is no file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 2**16))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def trouble(lines: list[str]) -> list[str]:
    """What a log says about its end: the last lines, not more than its last traceback."""
    begins = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    return lines[begins[-1] if begins else 0 :][-TAIL_LINES:]


def how_it_ended(code: int | None) -> str:
    """An exit code in words; negative: a signal."""
    if code is None:
        return "ended without a word"
    if code >= 0:
        return f"failed with exit code {code}"
    memory = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{memory}"

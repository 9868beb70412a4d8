"""What a run says while it runs: `metrics.jsonl`, TensorBoard events, and one bar (or plain lines in a log file).

`metrics.jsonl` is the record: one JSON object a line, on disk as soon as it is logged. A run that goes on from step s
first drops the lines after s that the killed run had still written, so the file reads as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from localmim.errors import UserError

METRICS = "metrics.jsonl"
_TENSORBOARD_FLUSH_S = 10.0

logger = logging.getLogger("localmim.runlog")


class RunLog:
    """Records of one run in `directory`, from after `start_step` to `total_steps` optimizer steps.

    `line_every_s`: seconds between plain lines where stderr is not a terminal and so no bar is drawn.
    Opening it drops every record after `start_step`: open it when nothing can refuse the run any more.
    Use as a context manager, or call `close()`. A disk that does not take a line raises UserError.
    """

    def __init__(self, directory: str | os.PathLike, total_steps: int, start_step: int = 0, line_every_s: float = 30.0):
        self.directory = Path(directory)
        self.path = self.directory / METRICS
        self.total_steps = total_steps
        self.start_step = start_step
        self.last_step = start_step
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _drop_after(self.path, start_step)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._events: _TensorBoard | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=50)  # (step, seconds) of the last records
        self._line_every_s = line_every_s
        self._last_line_s = -math.inf
        self._terminal = _Terminal()  # one: tqdm tells by it which bar to move out of the way of a message
        self._bar = None
        if _is_terminal(sys.stderr):
            self._bar = tqdm(
                total=total_steps, initial=start_step, file=self._terminal, dynamic_ncols=True, mininterval=0.5,
                miniters=1, bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )  # fmt: skip

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def log(self, step: int, **values) -> None:
        """Record the values of optimizer step `step`, counted from 1, later than any step before.

        Values: numbers, strings, None, and lists or dicts of them; a number that is not finite becomes the string
        "nan", "inf" or "-inf". The bar shows `loss`, `lr`, `images_per_s`, and the share of `data_wait_s` (seconds
        spent waiting for images) in `step_s` (all seconds) where they are given. `time` (seconds since 1970) is added.
        """
        if step <= self.last_step:
            raise ValueError(f"step {step} was logged after step {self.last_step}")
        self.last_step = step
        record = {"step": int(step), **{key: _plain(value) for key, value in values.items()}}
        record.setdefault("time", round(time.time(), 3))
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            if self._events is None:
                self._events = _TensorBoard(self.directory / "tensorboard", self.start_step)
            self._events.add(record)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._recent.append((step, time.monotonic()))
        self._show(record)

    def message(self, text: str) -> None:
        """One line on stderr that leaves the bar whole."""
        if self._bar is None:
            print(text, file=self._terminal, flush=True)
        else:
            tqdm.write(text, file=self._terminal)

    def sync(self) -> None:
        """Force all records to the disk. Call it before a checkpoint is saved: no record before it can then be lost."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            if self._events is not None:
                self._events.flush()
        except OSError as error:
            raise self._cannot_write(error) from error

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._events is not None:
            self._events.close()
            self._events = None
        self._file.close()

    def _show(self, record: dict) -> None:
        step, now = record["step"], time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(self._summary(record)), refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._last_line_s >= self._line_every_s or step >= self.total_steps:
            self._last_line_s = now
            share = 100 * step / max(self.total_steps, 1)
            place = [f"step {step}/{self.total_steps} ({share:.1f}%)"]
            if isinstance(record.get("epoch"), (int, float)):
                place.append(f"epoch {record['epoch']:.2f}")
            print(", ".join(place + self._summary(record)), file=self._terminal, flush=True)

    def _summary(self, record: dict) -> list[str]:
        """Loss, rate, speed, share of time waiting for data, time left: what is known, in 80 columns with the bar."""
        parts = []
        if record.get("loss") is not None:
            parts.append(f"loss {float(record['loss']):.4f}")
        if record.get("lr") is not None:
            parts.append(f"lr {float(record['lr']):.1e}")
        if record.get("images_per_s") is not None:
            speed = float(record["images_per_s"])
            parts.append(f"{speed:.{0 if speed >= 100 else 1}f} img/s")
        wait, whole = (record.get(key) for key in ("data_wait_s", "step_s"))
        if isinstance(wait, (int, float)) and isinstance(whole, (int, float)) and whole > 0:
            parts.append(f"wait {100 * wait / whole:.0f}%")
        (first_step, first_s), (step, now_s) = self._recent[0], self._recent[-1]
        if step > first_step:
            seconds = (self.total_steps - step) * (now_s - first_s) / (step - first_step)
            parts.append(f"{_duration(seconds)} left")
        return parts

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"cannot write {error.filename or self.path}: {error.strerror or error}")


class NoLog:
    """What takes a run log's place on a device that does not write: it only tells, on stderr."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *_) -> None:
        pass

    def log(self, step: int, **values) -> None:
        """Nothing: the first device records."""

    def message(self, text: str) -> None:
        """One line on stderr, which is this device's log file."""
        print(text, file=_Terminal(), flush=True)

    def sync(self) -> None:
        """Nothing."""


@contextlib.contextmanager
def warnings_to(log: RunLog | NoLog):
    """Warnings of this package appear above the bar instead of through it."""

    class Handler(logging.Handler):
        def emit(self, record):
            log.message(record.getMessage())

    logger, handler = logging.getLogger("localmim"), Handler()
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


class _Terminal:
    """stderr as it is now. One that is gone, as that of a closed session, is no reason to stop a run."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str):
        return getattr(sys.stderr, name)


class _TensorBoard:
    """Scalars of one session of a run. Written without a thread, so that `flush` leaves nothing behind."""

    def __init__(self, directory: Path, start_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        # The suffix keeps the file of a session that started within the same second from being overwritten.
        suffix = f".{start_step:08d}.{os.getpid()}.{time.time_ns() % 10**9:09d}"
        self._writer = EventsWriter(str(directory / "events"), suffix)
        # Tells TensorBoard to forget what a killed session wrote after the step that this one starts from.
        purge = Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START), wall_time=time.time())
        self._writer.write_event(purge)
        self.flush()

    def add(self, record: dict) -> None:
        values = [
            Summary.Value(tag=tag, simple_value=value)
            for key, entry in record.items()
            if key not in ("step", "time")
            for tag, value in _scalars(key, entry)
        ]
        event = Event(step=record["step"], wall_time=record["time"], summary=Summary(value=values))
        self._writer.write_event(event)
        if time.monotonic() - self._flushed_s >= _TENSORBOARD_FLUSH_S:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed_s = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _is_terminal(stream) -> bool:
    """Whether a bar can be drawn: on a terminal, but not on one of no width, as some containers give."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:  # not a file of the system
        return True


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole lines of `path` up to `step`; the file is replaced in one move, or left alone if all stay."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    lines, kept, broken = content.splitlines(), [], []
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            broken.append(number)
    if broken and broken != [len(lines)]:  # a torn last line is what a kill leaves; any other was damaged later
        logger.warning("%s: dropped what is no record, line %s", path, ", ".join(map(str, broken)))
    if b"".join(kept) == content:
        return
    aside = path.with_name(f".{path.name}")
    with open(aside, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _plain(value):
    """A value as JSON has it: numpy numbers and arrays as Python's, what is not finite as a string."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def _scalars(tag: str, value) -> Iterator[tuple[str, float]]:
    """The finite numbers in a plain value, named tag, tag/key or tag/index."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _scalars(f"{tag}/{key}", entry)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _scalars(f"{tag}/{index}", entry)
    elif isinstance(value, (int, float)):
        yield tag, float(value)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

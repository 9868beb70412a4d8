"""The record of a run, across kills, resumes, terminals and log files."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from localmim.errors import UserError
from localmim.training import runlog
from localmim.training.runlog import RunLog


class Screen(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


def records(directory: Path) -> list[dict]:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def events(directory: Path) -> list[Event]:
    """All events under tensorboard/, files in order of their names; each is length, crc, bytes, crc."""
    found = []
    for path in sorted((directory / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def scalars(directory: Path) -> dict[tuple[int, str], float]:
    """What TensorBoard shows: (step, tag) to value, purged where a later session says so."""
    shown = {}
    for event in events(directory):
        if event.session_log.status == SessionLog.START:
            shown = {key: value for key, value in shown.items() if key[0] < event.step}
        for value in event.summary.value:
            assert (event.step, value.tag) not in shown, "shown twice"
            shown[event.step, value.tag] = value.simple_value
    return shown


def test_a_line_is_there_as_soon_as_it_is_logged(tmp_path):
    """Who follows the file, and who reads it after a kill, must find every step that was logged, with its keys."""
    with RunLog(tmp_path / "new" / "run", total_steps=10) as log:
        log.log(1, epoch=0.1, loss=np.float32(0.5), loss_scales=np.array([1, 2], np.float32), skipped=np.int64(3))
        (record,) = records(tmp_path / "new" / "run")
        assert abs(record.pop("time") - time.time()) < 60
        assert record == {"step": 1, "epoch": 0.1, "loss": 0.5, "loss_scales": [1.0, 2.0], "skipped": 3}
        assert next(iter(record)) == "step"


def test_non_finite_numbers_stay_json(tmp_path):
    """A diverged run is the one whose metrics are read most: every reader must be able to parse them."""
    with warnings.catch_warnings(), RunLog(tmp_path, total_steps=10) as log:
        warnings.simplefilter("error")
        log.log(1, loss=math.nan, norms={"a": np.float32("inf"), "b": -math.inf}, lr=1.0, note=None, good=True)
    (record,) = records(tmp_path)
    assert record["loss"] == "nan" and record["norms"] == {"a": "inf", "b": "-inf"} and record["note"] is None
    assert math.isnan(float(record["loss"]))
    assert scalars(tmp_path) == {(1, "lr"): 1.0, (1, "good"): 1.0}


def test_resume_reads_like_one_run(tmp_path):
    """Steps after the checkpoint, and a line torn by the kill, are written once more: none may stand there twice."""
    with RunLog(tmp_path / "whole", total_steps=6) as log:
        for step in range(1, 7):
            log.log(step, loss=step / 10, time=step)
    with RunLog(tmp_path / "killed", total_steps=6) as log:
        for step in range(1, 6):
            log.log(step, loss=step / 10 if step <= 3 else -1.0, time=step)
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    with RunLog(tmp_path / "killed", total_steps=6, start_step=3) as log:
        assert [record["step"] for record in records(tmp_path / "killed")] == [1, 2, 3]
        for step in range(4, 7):
            log.log(step, loss=step / 10, time=step)
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert scalars(tmp_path / "killed") == scalars(tmp_path / "whole")
    assert len(list((tmp_path / "killed" / "tensorboard").iterdir())) == 2, "a session overwrote the one before"


def test_dropping_lines_is_atomic(tmp_path, monkeypatch):
    """A kill or a full disk while lines are dropped must not cost those that stay."""
    with RunLog(tmp_path, total_steps=9) as log:
        for step in range(1, 6):
            log.log(step, loss=0.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            with pytest.raises(UserError, match="No space left on device"):
                RunLog(tmp_path, total_steps=9, start_step=2)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_untouched_when_nothing_is_dropped(tmp_path):
    """A resume from the last step logged has no reason to rewrite a long file."""
    with RunLog(tmp_path, total_steps=9) as log:
        log.log(1, loss=0.0)
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    RunLog(tmp_path, total_steps=9, start_step=1).close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode
    assert len(records(tmp_path)) == 1


def test_a_damaged_line_in_the_middle_is_named(tmp_path, caplog):
    """Only the last line may be torn by a kill; anything else was damaged later, and that is worth a warning."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n[2]\n{"step": 3}\n{"st')
    RunLog(tmp_path, total_steps=9, start_step=3).close()
    assert [record["step"] for record in records(tmp_path)] == [1, 3]
    (message,) = [record.getMessage() for record in caplog.records if record.name == "localmim.runlog"]
    assert "line 2, 3, 5" in message


def test_steps_only_go_up(tmp_path):
    """A step logged twice would be a mistake of the loop that curves hide."""
    with RunLog(tmp_path, total_steps=9, start_step=4) as log:
        log.log(6, loss=1.0)
        for step in (4, 6):
            with pytest.raises(ValueError, match=f"step {step} "):
                log.log(step, loss=1.0)
    assert len(records(tmp_path)) == 1


def test_kill_9_after_sync_loses_nothing(tmp_path):
    """sync() before a checkpoint: both records then hold all that came before it, also TensorBoard's buffered one."""
    script = (
        "import os, signal, sys; from localmim.training.runlog import RunLog\n"
        "log = RunLog(sys.argv[1], total_steps=99)\n"
        "for step in range(1, 21): log.log(step, loss=step)\n"
        "log.sync(); log.log(21, loss=21); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 22))
    assert {step for step, _ in scalars(tmp_path)} >= set(range(1, 21))


def test_tensorboard_tags_and_laziness(tmp_path):
    """Nested values become tags that group in TensorBoard; a run that never logged leaves no event file."""
    log = RunLog(tmp_path, total_steps=9)
    assert not (tmp_path / "tensorboard").exists()
    log.log(1, loss=0.25, loss_scales={"x4": 1.0, "x1/2": 2.0}, lrs=[3.0, 4.0], note="text")
    log.close()
    assert scalars(tmp_path) == {
        (1, tag): value
        for tag, value in {
            "loss": 0.25, "loss_scales/x4": 1.0, "loss_scales/x1/2": 2.0, "lrs/0": 3.0, "lrs/1": 4.0,
        }.items()
    }  # fmt: skip
    assert events(tmp_path)[0].file_version == "brain.Event:2"


def test_plain_lines_in_a_log_file(tmp_path, capsys, monkeypatch):
    """Under a batch system stderr is a file: a line now and then, the last step always, no control characters."""
    clock = iter(range(0, 10_000, 4))
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    with RunLog(tmp_path, total_steps=100, line_every_s=30) as log:
        for step in range(10, 101, 10):
            now[0] = next(clock)
            log.log(step, epoch=step / 50, loss=0.5, lr=1e-4, images_per_s=81.25, data_wait_s=0.1, step_s=0.4)
            if step == 50:
                log.message("saved step 50")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 10/100 (10.0%), epoch 0.20, loss 0.5000, lr 1.0e-04, 81.2 img/s, wait 25%",
        "saved step 50",
        "step 90/100 (90.0%), epoch 1.80, loss 0.5000, lr 1.0e-04, 81.2 img/s, wait 25%, 0:04 left",
        "step 100/100 (100.0%), epoch 2.00, loss 0.5000, lr 1.0e-04, 81.2 img/s, wait 25%, 0:00 left",
    ]
    assert not set(err) & set("\r\x1b")


def test_bar_on_a_terminal(tmp_path, monkeypatch):
    """The bar starts where the run resumes, shows what the issue asks for, and messages get lines of their own."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with RunLog(tmp_path, total_steps=100, start_step=50) as log:
        log.log(60, loss=0.5, lr=1e-4, images_per_s=81.25, data_wait_s=0.1, step_s=0.4)
        log.message("a message")
        for step in range(61, 101):  # faster than the bar is drawn
            log.log(step, loss=math.nan, lr=1e-4, images_per_s=81.25, data_wait_s=0.1, step_s=0.4)
    text = screen.getvalue()
    assert "50/100" in text and "100/100, loss nan lr 1.0e-04 81.2 img/s wait 25% 0:00 left" in text
    assert any(line.strip("\r ") == "a message" for line in text.replace("\r", "\n").splitlines())
    assert text.count("img/s") < 10, "the bar is redrawn too often"
    log.close()


@pytest.mark.parametrize("columns", [0, 80])
def test_narrow_terminals(tmp_path, monkeypatch, columns):
    """80 columns hold a long run's whole bar; a container's terminal of width 0 gets plain lines, not an empty bar."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        with RunLog(tmp_path, total_steps=1_000_000) as log:
            values = {"loss": 0.1234, "lr": 1e-4, "images_per_s": 812.0, "data_wait_s": 0.1, "step_s": 1.0}
            log.log(100_000, **values)
            log._recent[0] = (100_000, log._recent[0][1] - 3)
            log.log(100_100, **values)
        text = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "812 img/s" in text
    assert ("|" in text) == (columns == 80)
    assert columns == 0 or " left" in text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (360_000, "100:00:00")])
def test_time_left(seconds, text):
    """Long runs take days: hours are not cut at 24."""
    assert runlog._duration(seconds) == text


def test_a_disk_that_refuses_is_one_line(tmp_path, monkeypatch):
    """No traceback for a full disk or a path that is a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        RunLog(tmp_path / "file", total_steps=1)
    log = RunLog(tmp_path, total_steps=9)
    full = open("/dev/full", "w")  # noqa: SIM115 (closed by the log)
    log._file.close()
    log._file = full
    with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
        log.log(1, loss=1.0)
    log._file = open(os.devnull, "w")  # noqa: SIM115 (closed by the log)
    log.close()


def test_tensorboard_imports_in_silence():
    """Every command imports it: this protobuf and numpy must give no warning, and no other framework may come."""
    script = (
        "import sys, tensorboardX.event_file_writer, tensorboardX.proto.event_pb2\n"
        "assert not {'torch', 'tensorflow', 'tensorboard', 'matplotlib', 'onnx'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

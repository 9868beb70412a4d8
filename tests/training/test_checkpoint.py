"""Checkpoints under kills, damage and full disks.

Run as a script (`test_checkpoint.py DIR`), this file kills saves at each of their file operations: `kill_everywhere`.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from localmim.errors import UserError
from localmim.training import checkpoint as module
from localmim.training.checkpoint import FILES, CheckpointStore, read_checkpoint

CONFIG = {"model": {"name": "tiny", "taps": [1, 3]}, "optimizer": {"lr": 2e-4, "betas": (0.9, 0.95), "clip": None}}


def content(step: int) -> dict:
    """What a run would save at `step`: small, and different at each step."""
    random = np.random.default_rng(step)
    return {
        "weights": {"w": random.standard_normal((3, 4)).astype(np.float32), "b": np.float32(step)},
        "optimizer": {"m.w": random.standard_normal((3, 4)).astype(np.float32), "t": np.int32(step)},
        "state": {"step": step, "epoch": step / 7, "scaler": 65536.0, "data": {"seed": 2**100 + step}},
        "config": CONFIG,
    }


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, **content(step))


def same(got: dict, expected: dict) -> bool:
    return got.keys() == expected.keys() and all(
        got[name].dtype == np.asarray(value).dtype
        and got[name].shape == np.shape(value)
        and got[name].tobytes() == np.asarray(value).tobytes()
        for name, value in expected.items()
    )


def assert_holds(checkpoint, step: int) -> None:
    """The checkpoint is the one of `step`, whole."""
    expected = content(step)
    assert checkpoint is not None and checkpoint.step == step
    assert checkpoint.state == expected["state"]
    assert checkpoint.config == {**CONFIG, "optimizer": {**CONFIG["optimizer"], "betas": [0.9, 0.95]}}
    assert same(checkpoint.weights(), expected["weights"])
    assert same(checkpoint.optimizer(), expected["optimizer"])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def two(tmp_path):
    """A store that holds steps 10 and 20."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2)
    save(store, 10)
    save(store, 20)
    return store


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if (r.name, r.levelno) == ("localmim.checkpoint", logging.WARNING)]


# Round trip


def test_round_trip_is_bit_exact(tmp_path):
    """Resuming bit for bit needs every type, layout, NaN payload and negative zero back as it was."""
    random = np.random.default_rng(0)
    weights = {
        f"{dtype}.{name}": array
        for dtype in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8")
        for name, array in {
            "matrix": random.integers(0, 100, (3, 6)).astype(dtype),
            "scalar": np.array(1, dtype),
            "empty": np.zeros((0, 3), dtype),
        }.items()
    }
    weights["transposed"] = random.standard_normal((4, 6)).astype(np.float32).T
    weights["strided"] = random.standard_normal((4, 6))[::2, 1::2]
    weights["odd"] = np.array([0x7FC12345, 0xFFFFFFFF, 0x80000000, 1], np.uint32).view(np.float32)
    weights["ünïcode/name"] = np.arange(3, dtype=np.float16)
    folder = CheckpointStore(tmp_path).save(3, weights, {}, {}, {})
    assert same(read_checkpoint(folder).weights(), weights)
    assert read_checkpoint(folder).optimizer() == {}
    header = (folder / "weights.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    starts = {k: v["data_offsets"][0] for k, v in json.loads(header[8 : 8 + length]).items() if k != "__metadata__"}
    assert length % 8 == 0 and all(start % weights[name].itemsize == 0 for name, start in starts.items())
    big_endian = CheckpointStore(tmp_path).save(4, {"w": np.arange(5, dtype=">f4")}, {}, {}, {})
    assert same(read_checkpoint(big_endian).weights(), {"w": np.arange(5, dtype="f4")})


def test_layout(two):
    """Other tools read these names, and the weights file alone must know its model and recipe."""
    folder = two.directory / "step_00000020"
    assert names(two.directory) == ["LATEST", "step_00000010", "step_00000020"]
    assert names(folder) == sorted([*FILES, "manifest.json"])
    assert (two.directory / "LATEST").read_text() == "step_00000020\n"
    with safe_open(folder / "weights.safetensors", "np") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["step"]) == ("localmim-1", "20")
    assert metadata["config"] == (folder / "config.yaml").read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        name: (folder / name).stat().st_size for name in FILES
    }


def test_every_way_to_name_a_checkpoint(two, tmp_path):
    """A run's folder, its checkpoints folder, a step folder under any name, and the weights file all work."""
    run, step = two.directory.parent, two.directory / "step_00000010"
    assert_holds(read_checkpoint(run), 20)
    assert_holds(read_checkpoint(str(two.directory)), 20)
    assert_holds(read_checkpoint(step), 10)
    assert_holds(read_checkpoint(shutil.copytree(step, tmp_path / "best")), 10)
    for file in (step / "weights.safetensors", shutil.copy(step / "weights.safetensors", tmp_path / "my.safetensors")):
        alone = read_checkpoint(file)
        assert alone.step == 10 and alone.config["model"] == CONFIG["model"]
        assert same(alone.weights(), content(10)["weights"])
        for part in (alone.optimizer, lambda alone=alone: alone.state):
            with pytest.raises(UserError, match="weights only"):
                part()


def test_reading_what_is_no_checkpoint(tmp_path):
    """A wrong --ckpt is one line that names the path."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("hello, world")
    (tmp_path / "net.ckpt").write_text("hello")
    module._write_file(tmp_path / "foreign.safetensors", module._tensor_chunks({"a": np.zeros(2)}, {"by": "others"}))
    for name in ("absent", "empty", "text.safetensors", "net.ckpt", "foreign.safetensors"):
        with pytest.raises(UserError, match=name) as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_stored_is_refused_before_anything_is_written(two):
    """A type that would come back changed must not be saved, and must not cost the disk anything."""
    before = names(two.directory)
    for change in ({"weights": {"w": np.array(["text"])}}, {"state": {"x": object()}}, {"config": {"x": object()}}):
        with pytest.raises(Exception, match=r"(?i)cannot|not JSON serializable|represent"):
            two.save(30, **{**content(30), **change})
    assert names(two.directory) == before


# Keeping and replacing


def test_keeps_the_newest(tmp_path):
    """Disks are finite: `keep` checkpoints stay, the newest ones."""
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 30, 4_000, 123_456_789):
        save(store, step)
    assert names(tmp_path) == ["LATEST", "step_00000030", "step_00004000", "step_123456789"]
    assert_holds(store.latest(), 123_456_789)
    with pytest.raises(UserError, match="keep"):
        CheckpointStore(tmp_path, keep=0)


def test_never_removes_what_it_did_not_make(two):
    """A user's own folder beside the checkpoints stays, whatever its name."""
    for name in ("step_00000001", "notes", "step_1"):
        (two.directory / name).mkdir()
        (two.directory / name / "mine.txt").write_text("mine")
    for step in (30, 40):
        save(two, step)
    assert names(two.directory) == ["LATEST", "notes", "step_00000001", "step_00000030", "step_00000040", "step_1"]


def test_saving_a_step_again_replaces_it(two):
    """A resumed run comes to the same step once more, after other steps or with `keep` at 1."""
    two.keep = 1
    again = {**content(20), "weights": {"w": np.ones(2, np.float32)}}
    two.save(20, **again)
    assert names(two.directory) == ["LATEST", "step_00000020"]
    assert same(two.latest().weights(), again["weights"])


def test_an_older_step_saved_later_is_the_latest_and_stays(two):
    """After a fall-back the run saves steps below the damaged newest one: those count, not the number."""
    two.keep = 1
    save(two, 15)
    assert_holds(two.latest(), 15)


def test_damaged_ones_do_not_push_out_good_ones(two):
    """`keep` counts checkpoints that can be used."""
    weights = two.directory / "step_00000020" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert_holds(two.latest(), 10)
    save(two, 30)
    assert "step_00000010" in names(two.directory)
    flip(two.directory / "step_00000030" / "state.json")
    assert_holds(two.latest(), 10)


def test_put_aside_and_then_refused(two, monkeypatch):
    """A kill between the two renames of a replacement, then a full disk: the one put aside is still the newest."""
    two.keep = 1
    os.rename(two.directory / "step_00000020", two.directory / ".replaced_step_00000020")
    shutil.rmtree(two.directory / "step_00000010")
    assert_holds(two.latest(), 20)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Refusing(errno.ENOSPC, 1, os.fsync))
        with pytest.raises(UserError, match="No space left"):
            save(two, 30)
    assert_holds(two.latest(), 20)
    assert names(two.directory) == ["LATEST", "step_00000020"]


# Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damage_is_named_and_the_one_before_used(two, caplog, name, harm):
    """Each file, each kind of damage: one line of warning, and the run goes on from the checkpoint before."""
    folder = two.directory / "step_00000020"
    if name == "manifest.json" and harm is truncate:
        (folder / name).write_text((folder / name).read_text().rstrip())  # only a newline ends it
    harm(folder / name)
    assert_holds(two.latest(), 10)
    (line,) = warnings(caplog)
    assert str(folder) in line and "\n" not in line
    assert name in line or name == "manifest.json"  # a wrong hash in there speaks of the file it belongs to
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(folder)


def test_a_folder_under_a_wrong_name(two, caplog):
    """A folder copied under another step's name must not pass for that step."""
    shutil.copytree(two.directory / "step_00000020", two.directory / "step_00000099")
    (two.directory / "LATEST").write_text("step_00000099\n")
    assert_holds(two.latest(), 20)
    assert "step_00000099" in warnings(caplog)[0]


def test_damaged_weights_file_in_its_folder(two):
    """eval --ckpt FILE must not measure damaged weights while their hash lies beside them."""
    path = two.directory / "step_00000020" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="hash"):
        read_checkpoint(path)


@pytest.mark.parametrize("text", [None, b"", b"step_00000077\n", b"\xff\x00garbage", b"../step_00000010"])
def test_pointer_lost(two, caplog, text):
    """LATEST missing, empty or pointing to nothing: the newest good checkpoint is used, and the log says so."""
    pointer = two.directory / "LATEST"
    pointer.unlink()
    if text is not None:
        pointer.write_bytes(text)
    assert_holds(two.latest(), 20)
    (line,) = warnings(caplog)
    assert "LATEST" in line
    save(two, 30)
    assert pointer.read_text() == "step_00000030\n"


def test_nothing_saved_is_none_but_nothing_good_is_an_error(two, tmp_path):
    """A run must never start anew in silence over what it had learnt."""
    assert CheckpointStore(tmp_path / "fresh").latest() is None
    assert not (tmp_path / "fresh").exists()
    for step in (10, 20):
        flip(two.directory / f"step_000000{step}" / "optimizer.safetensors")
    with pytest.raises(UserError, match=r"no usable checkpoint.*step_00000020.*step_00000010") as caught:
        two.latest()
    assert "\n" not in str(caught.value)
    for step in (10, 20):
        shutil.rmtree(two.directory / f"step_000000{step}")
    with pytest.raises(UserError, match="LATEST"):
        two.latest()


# A disk that refuses


class Refusing:
    """Stands in for a file operation that fails with `code` at its `at`-th call."""

    def __init__(self, code: int, at: int, real):
        self.code, self.at, self.real, self.calls = code, at, real, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise OSError(self.code, os.strerror(self.code), str(args[0]))
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("step", [20, 30])
@pytest.mark.parametrize("operation", ["fsync", "rename", "replace", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_full_or_read_only_disk(two, monkeypatch, step, operation, code):
    """At whichever call the disk refuses: one line with the reason, nothing left over, and a good checkpoint there."""
    for at in itertools.count(1):
        refusing = Refusing(code, at, getattr(os, operation))
        with monkeypatch.context() as patch:
            patch.setattr(os, operation, refusing)
            try:
                save(two, step)
                break
            except UserError as error:
                assert str(error) == (
                    f"cannot save the checkpoint of step {step} in {two.directory}: {os.strerror(code)}; "
                    "the checkpoints before it are untouched"
                )
        assert not [name for name in names(two.directory) if name.startswith((".saving", ".removing"))]
        assert two.latest().step in (20, step)
        assert_holds(read_checkpoint(two.directory / "step_00000010"), 10)
    assert at > 1, "the operation was never reached"
    assert_holds(two.latest(), step)
    assert not [name for name in names(two.directory) if name.startswith(".s")]


def test_disk_fills_up_within_a_file(two, monkeypatch):
    """The real order of events on a full disk: part of the arrays is written, then write() fails."""

    def chunks(tensors, metadata):
        yield from list(real(tensors, metadata))[:2]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = module._tensor_chunks
    before = names(two.directory)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_tensor_chunks", chunks)
        with pytest.raises(UserError, match=r"step 30 .*No space left on device"):
            save(two, 30)
    assert names(two.directory) == before
    assert_holds(two.latest(), 20)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always-full device")
def test_real_enospc_is_an_oserror():
    """The writer itself must pass the system's own error on: nothing here is simulated but the file's place."""
    with pytest.raises(OSError) as caught:
        module._write_file(Path("/dev/full"), module._tensor_chunks(content(1)["weights"], {}))
    assert caught.value.errno == errno.ENOSPC


def test_the_place_is_a_file(tmp_path):
    """A path that cannot be a folder is the user's mistake, also when root runs it."""
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"cannot save the checkpoint of step 1 in .*(exists|Not a directory)"):
        save(CheckpointStore(tmp_path / "run" / "checkpoints"), 1)


def test_an_old_one_that_cannot_be_removed_does_not_stop_the_run(two, monkeypatch, caplog):
    """The new checkpoint is safe by then; the log names the old one."""
    monkeypatch.setattr(shutil, "rmtree", Refusing(errno.EACCES, 1, shutil.rmtree))
    save(two, 30)
    (line,) = warnings(caplog)
    assert "step_00000010" in line and "Permission denied" in line
    assert_holds(two.latest(), 30)


def test_interrupt_leaves_nothing_behind(two, monkeypatch):
    """Ctrl-C in the middle of a save is no disk error, and no rubbish stays."""
    before = names(two.directory)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(two, 30)
    assert names(two.directory) == before


# kill -9


def test_kill_9_at_every_file_operation_of_a_save(tmp_path):
    """Between any two file operations a SIGKILL leaves a complete checkpoint to start from, and no trap for later."""
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    assert kills.keys() == {"first", "next", "again", "only"}
    assert all(count >= 12 for count in kills.values()), kills
    # Each stage of a save was hit: before its end the older checkpoint was found, after it the newer one.


def kill_everywhere(directory: Path) -> dict[str, int]:
    """Save in child processes that kill themselves before their 1st, 2nd, … file operation; look at what remains.

    Python announces each open, mkdir, rename, remove, rmdir and rmtree to an audit hook before it is done. Runs in a
    process of its own, since a hook cannot be taken off, and since what is forked here should have no other work.
    Returns the number of kills of each case.
    """
    cases = {  # name: (steps saved before, step whose save is killed, keep, steps allowed afterwards)
        "first": ((), 10, 2, {None, 10}),
        "next": ((10, 20), 30, 2, {20, 30}),
        "again": ((10, 20), 20, 2, {20}),
        "only": ((10,), 10, 1, {10}),
    }
    kills = {}
    for name, (before, step, keep, allowed) in cases.items():
        template = directory / name
        template.mkdir()
        for earlier in before:
            save(CheckpointStore(template, keep), earlier)
        seen = set()
        for at in itertools.count(1):
            place = directory / f"{name}_{at}"
            shutil.copytree(template, place)
            child = os.fork()
            if child == 0:
                die_before_operation(at)
                save(CheckpointStore(place, keep), step)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            assert killed or status == 0, (name, at, status)

            latest = CheckpointStore(place, keep).latest()
            found = None if latest is None else latest.step
            assert found in allowed, (name, at, found)
            if latest is not None:
                assert_holds(latest, found)
            seen.add(found)
            store = CheckpointStore(place, keep)
            for later in (40, 50):  # the resumed run goes on, and clears up
                save(store, later)
            assert_holds(store.latest(), 50)
            kept = ["step_00000050"] if keep == 1 else ["step_00000040", "step_00000050"]
            assert names(place) == ["LATEST", *kept]
            shutil.rmtree(place)
            if not killed:
                break
        assert seen == allowed, (name, seen)
        kills[name] = at - 1
    return kills


def die_before_operation(at: int) -> None:
    operations = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
    count = itertools.count(1)

    def hook(event: str, _) -> None:
        if event in operations and next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    print(json.dumps(kill_everywhere(Path(sys.argv[1]))))

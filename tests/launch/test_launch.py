"""The launchers: what they refuse, what they would start, and what becomes of real jobs of two processes."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from job_environment import job_environment
from localmim import job, launch
from localmim.errors import UserError

ROOT = Path(__file__).parents[2]
TASK = Path(__file__).with_name("task.py")
RECIPE = "config/demo/localmim_vit.yaml"


def script(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """One of scripts/, with this Python."""
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *arguments],
        env=job_environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
    )


def flags(text: str) -> dict[str, str]:
    """The --name=value flags of msrun in the last line of a dry run."""
    return dict(re.findall(r"--(\w+)=(\S+)", text.splitlines()[-1]))


# ---- What would be started


@pytest.mark.parametrize("device", ["cpu", "gpu", "ascend"])
def test_dry_run_prints_the_command_and_makes_nothing(device, tmp_path):
    """What a user checks before days of training; it works where the device is missing."""
    name = {"cpu": "CPU", "gpu": "GPU", "ascend": "Ascend"}[device]
    output = tmp_path / "run"
    extra = ["--output_dir", str(output), "--dry-run"]
    done = script(f"run_distribute_train_{device}.sh", "8", RECIPE, *extra)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[0] == sys.executable
    found = flags(done.stdout)
    assert found["worker_num"] == found["local_worker_num"] == "8"
    assert found["master_addr"] == "127.0.0.1"
    folder = Path(found["log_dir"])
    assert folder.parent == output / "logs"
    task = ["train.py", "--config", RECIPE, "--output_dir", str(output), "--device", name]
    assert command[-len(task) - 1 :] == [str(folder), *task]
    alone = script(f"run_standalone_train_{device}.sh", RECIPE, *extra)
    assert shlex.split(alone.stdout.splitlines()[-1]) == [sys.executable, *task]
    one = script(f"run_distribute_train_{device}.sh", "1", RECIPE, *extra)
    assert one.stdout.splitlines()[-1] == alone.stdout.splitlines()[-1]
    assert not output.exists()


def test_dry_run_of_several_machines():
    """Each machine starts its own share of the ranks, and logs apart even on a shared disk."""
    there = {"NNODES": "4", "MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "8118"}
    done = script("run_distribute_train_cpu.sh", "8", RECIPE, "--dry-run", NODE_RANK="2", **there)
    found = flags(done.stdout)
    assert (found["worker_num"], found["local_worker_num"], found["node_rank"]) == ("32", "8", "2")
    assert (found["master_addr"], found["master_port"]) == ("10.1.2.3", "8118")
    assert found["log_dir"].endswith("-node2")


def test_dry_run_of_evaluation_and_export():
    """They take their own arguments; evaluation is shared by DEVICE_NUM devices."""
    ckpt = ["--ckpt", "a run", "--dry-run"]
    alone = script("run_eval_cpu.sh", *ckpt).stdout.splitlines()[-1]
    assert shlex.split(alone) == [sys.executable, "eval.py", "--ckpt", "a run", "--device", "CPU"]
    shared = script("run_eval_cpu.sh", *ckpt, DEVICE_NUM="2").stdout
    assert flags(shared)["worker_num"] == "2"
    assert shlex.split(shared.splitlines()[-1])[-5:] == ["eval.py", "--ckpt", "a run", "--device", "CPU"]
    exported = script("run_export.sh", *ckpt).stdout.splitlines()[-1]
    assert shlex.split(exported) == [sys.executable, "export.py", "--ckpt", "a run"]


def test_log_folder_is_a_new_one_each_time(tmp_path):
    """Two runs in one second must not share, or delete, logs."""
    first = launch.new_folder(tmp_path, "-node0")
    while not re.fullmatch(r"\d{8}-\d{6}-node0-3", launch.new_folder(tmp_path, "-node0").name):
        launch.new_folder(tmp_path, "-node0").mkdir()
    assert not first.name.endswith("-3")


# ---- What is refused


@pytest.mark.parametrize(
    "name", [*(f"run_{k}_cpu.sh" for k in ("distribute_train", "standalone_train", "eval")), "run_export.sh"]
)
def test_usage(name):
    """A launcher without arguments says in one line what it takes, before it installs anything."""
    done = script(name, PYTHON="/no/such/python")
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"usage: bash scripts/{name} .*\n", done.stderr)
    asked = script(name, "-h", PYTHON="/no/such/python")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, done.stderr, "")


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"NNODES": "0"}, "NNODES is '0', expected a whole number of at least 1"),
        ({"NNODES": "2"}, "NODE_RANK is not set"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "x"}, "MASTER_PORT is not set"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "8118"}, "from 0 to 1"),
        ({"MASTER_PORT": "80"}, "MASTER_PORT is '80', expected a whole number from 1024 to 65535"),
    ],
)
def test_wrong_machines(variables, named):
    """A job over several machines hangs for minutes when one of these is wrong."""
    with pytest.raises(UserError, match=re.escape(named)):
        launch.find_machines(variables)


def test_port_in_use():
    """The scheduler could not start, and every rank would wait for it."""
    import socket

    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with pytest.raises(UserError, match=f"MASTER_PORT is {port}, which another process"):
            launch.find_machines({"MASTER_PORT": port})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--devices", "two", str(TASK)], "DEVICE_NUM is 'two', expected a whole number of at least 1"),
        (["--devices", "0", str(TASK)], "DEVICE_NUM is '0'"),
        (["no_such.py"], "no_such.py is no file"),
        ([str(ROOT / "train.py"), "--config", str(ROOT / RECIPE), "--epoch", "3"], "unknown key '--epoch'"),
        ([str(ROOT / "train.py")], "no recipe"),
        ([str(ROOT / "train.py"), "--config", str(ROOT / RECIPE), "--device=GPU"], "this launcher is for CPU"),
        ([], "SCRIPT"),
    ],
)
def test_wrong_arguments(arguments, named):
    """They are said in one line, at once, and once: not by every rank after its start."""
    with pytest.raises(UserError, match=re.escape(named)) as error:
        launch.main(["--device", "CPU", *arguments])
    assert "\n" not in str(error.value)


def test_device_that_is_missing():
    """One line that says what is missing, exit code 2: the machine of the tests may have a GPU, but not 1,000."""
    done = script("run_distribute_train_gpu.sh", "1000", RECIPE)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: .*GPU.*\n", done.stderr)


def test_python_without_its_name(tmp_path, monkeypatch):
    """msrun starts `python` of the PATH: with another one there, ranks would run on other packages."""
    (tmp_path / "python3.11").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3.11"))
    with pytest.raises(UserError, match="msrun starts `python`"):
        launch.python_folder()


def test_starts_without_mindspore(tmp_path):
    """The launcher must come up where MindSpore cannot be imported, to say so, and in a moment where it can."""
    (tmp_path / "mindspore.py").write_text("raise ImportError('not here')")
    done = script("run_eval_cpu.sh", "--ckpt", "x", "--dry-run", PYTHONPATH=str(tmp_path))
    assert done.stdout.endswith("eval.py --ckpt x --device CPU\n"), done.stderr


# ---- Which failure is named


def test_first_failing_rank():
    """A rank that only noticed a failure, or that msrun killed, must not be named instead of the one that failed."""

    def member(number: int, ended: float, code: int | None, recorded: bool) -> job.Member:
        made = job.Member(f"rank_{number}", Path())
        made.ended, made.code, made.recorded = ended, code, recorded
        return made

    def first(*members: job.Member) -> str:
        made = job.Job([], {}, Path(), range(0), scheduler=False, follow=None)
        made.members = list(members)
        return made._first_failed().name

    assert first(member(0, 1.0, 3, True), member(1, 2.0, 1, True), member(2, 0.5, 0, True)) == "rank_1"
    assert first(member(0, 1.0, 1, True), member(1, 2.0, 2, True)) == "rank_0"
    assert first(member(0, 1.0, 1, True), member(1, 1.2, None, False)) == "rank_1"
    assert first(member(0, 1.0, None, False), member(1, 1.2, -9, False)) == "rank_1"
    assert first(member(0, 2.0, 3, True), member(1, 1.0, 3, False)) == "rank_1"


def test_follower_copies_all_but_noise(tmp_path, capfdbinary):
    """Rank 0's lines appear while they are written, also half ones; MindSpore's greeting does not."""
    log = tmp_path / "worker_0.log"
    follower = job.Follower(log)
    follower.copy()
    pieces = [b"step 1\nste", b"p 2\n[INF", b"O] DISTRIBUTED(1): x\n[1", b", 2]\n", b"end"]
    shown = [b"step 1\nste", b"p 2\n", b"", b"[1, 2]\n", b"end"]
    with open(log, "wb", buffering=0) as file:
        for piece, expected in zip(pieces, shown):
            file.write(piece)
            follower.copy()
            assert capfdbinary.readouterr().out == expected
        file.write(b"\n[no newline")
        follower.copy(last=True)
    assert capfdbinary.readouterr().out == b"\n[no newline"
    follower.file.close()


# ---- Real jobs


class Launched:
    """A job of two processes on the CPU, started by the launcher in a folder of its own."""

    def __init__(self, how: str, folder: Path):
        command = [sys.executable, "-m", "localmim.launch", "--device", "CPU", "--devices", "2"]
        self.folder = folder
        self.process = subprocess.Popen(
            [*command, str(TASK), how, str(folder)],
            cwd=folder,
            env=job_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.known: dict[int, psutil.Process] = {}

    def lines(self, until: str) -> None:
        """Reads the terminal until a line has come, and remembers the processes there are by then."""
        for line in self.process.stdout:
            if line.strip() == until:
                break
        else:
            raise AssertionError(self.process.stderr.read())
        self.known = {p.pid: p for p in psutil.Process(self.process.pid).children(recursive=True)}
        assert len(self.known) == 4  # msrun, the scheduler, two ranks

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr; nothing of the job may be left."""
        output, errors = self.process.communicate(timeout=90)
        return self.process.returncode, output, errors

    def left(self) -> list[psutil.Process]:
        return [p for p in self.known.values() if job.is_running(p)]

    def log(self, rank: int) -> str:
        return next((self.folder / "outputs/logs").glob(f"*/worker_{rank}.log")).read_text()


@contextmanager
def side_by_side(tmp_path_factory, *how: str):
    """Two jobs that start together, as a job mostly waits; what no test has ended is killed."""
    jobs = [Launched(word, tmp_path_factory.mktemp(word)) for word in how]
    yield jobs
    for started in jobs:
        started.process.kill()


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """One job with a traceback on rank 1, and one that goes on until a rank is killed."""
    with side_by_side(tmp_path_factory, "traceback", "wait") as jobs:
        yield jobs


@pytest.fixture(scope="module")
def waiting(tmp_path_factory):
    """Two jobs that go on until they are stopped."""
    with side_by_side(tmp_path_factory, "wait", "wait") as jobs:
        yield jobs


@pytest.fixture
def ending(tmp_path_factory):
    """One job that is done by itself, and one with a user's mistake on rank 1."""
    with side_by_side(tmp_path_factory, "done", "mistake") as jobs:
        yield jobs


def test_job_that_is_done_and_job_with_a_mistake(ending):
    """Exit code 0 and rank 0's lines; then a user's mistake on rank 1: its one line, exit code 2. New folders."""
    done, wrong = ending
    code, output, errors = done.end()
    assert (code, errors) == (0, ""), errors + done.log(0) + done.log(1)
    assert re.fullmatch(r"2 devices; logs in \S+\nsum 2\n", output)
    assert "worker.py" in next((done.folder / "outputs/logs").glob("*/command.txt")).read_text()
    code, output, errors = wrong.end()
    assert code == 2
    assert re.fullmatch(r"error: data.dir holds no images \(rank 1; its log: \S+worker_1.log\)\n", errors)


def test_traceback_of_another_rank(failing):
    """Rank 0 waits in vain for a rank that failed: its traceback is shown, all is ended, exit code 1."""
    failed = failing[0]
    failed.lines("sum 2")
    code, _, errors = failed.end()
    assert code == 1
    assert "RuntimeError: rank one is broken\nstopped: rank 1 failed with exit code 1" in errors
    assert errors.count("Traceback") == 1
    assert not failed.left()


def test_rank_killed(failing):
    """kill -9 of a rank in a collective: named, quickly, and the rank that waits for it is ended."""
    job_of_two = failing[1]
    job_of_two.lines("sum 2")
    (pid_file,) = (job_of_two.folder / "outputs/logs").glob("*/rank_1.pid")
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    begin = time.monotonic()
    code, _, errors = job_of_two.end()
    assert time.monotonic() - begin < 15
    assert code == 1
    assert "stopped: rank 1 was killed by SIGKILL" in errors
    assert not job_of_two.left()


def test_interrupt_reaches_every_rank(waiting):
    """Ctrl-C: each rank gets SIGTERM once and says its last line before anything is killed."""
    stopped = waiting[0]
    stopped.lines("sum 2")
    stopped.process.send_signal(signal.SIGINT)
    code, output, errors = stopped.end()
    assert code == 1
    assert errors == "stopping after a checkpoint; Ctrl-C again ends it at once\n"
    assert output == "stopped: SIGTERM: saved\n"
    assert sorted(p.name for p in stopped.folder.glob("stopped_*")) == ["stopped_0", "stopped_1"]
    assert not stopped.left()


def test_launcher_killed(waiting):
    """kill -9 of the launcher: the ranks get SIGTERM, may save, and nothing stays."""
    orphaned = waiting[1]
    orphaned.lines("sum 2")
    orphaned.process.kill()
    orphaned.end()
    psutil.wait_procs(orphaned.left(), timeout=20)
    assert not orphaned.left()
    assert sorted(p.name for p in orphaned.folder.glob("stopped_*")) == ["stopped_0", "stopped_1"]

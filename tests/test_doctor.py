"""The doctor: one line for what is missing, exit codes, and that it works where nothing is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bare_machine import BareMachine
from localmim import cuda, device, doctor
from localmim.errors import UserError

SRC = Path(doctor.__file__).parents[1]
BARE = {**{k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}, "PYTHONPATH": str(SRC)}


@pytest.fixture
def bare(tmp_path, monkeypatch):
    return BareMachine(tmp_path, monkeypatch)


def run(*args: str, site: bool = True) -> subprocess.CompletedProcess:
    """The command; `site=False`: on a Python that sees no installed package."""
    command = [sys.executable, *([] if site else ["-S"]), "-m", "localmim.doctor", *args]
    return subprocess.run(command, env=BARE, capture_output=True, text=True, timeout=120)


def test_where_nothing_is_installed():
    """It is run before the installation, so it may import nothing that is installed."""
    found = run("--json", site=False)
    assert (found.returncode, found.stderr) == (2, "")
    report = json.loads(found.stdout)
    missing = [f"{package.name} is missing: {doctor.INSTALL}" for package in doctor.PACKAGES]
    assert [entry["problem"] for entry in report["packages"].values()] == missing
    assert report["devices"]["CPU"] == {"usable": False, "count": 1, "problems": [doctor.COMMON]}
    need = run("--need", "CPU", site=False)
    line = f"error: device CPU cannot be used: mindspore is missing: {doctor.INSTALL}\n"
    assert (need.returncode, need.stdout, need.stderr) == (2, "", line)
    assert run("--need-driver", "CPU", site=False).returncode == 0


def test_table_of_this_machine():
    """The real MindSpore is asked, in a process of its own; the tests run, so the CPU is usable."""
    found = run()
    assert (found.returncode, found.stderr) == (0, "")
    rows = {line.split()[0]: line.split()[1] for line in found.stdout.splitlines() if line[0] != " "}
    assert rows["CPU"] == "usable" and rows["GPU"] in ("usable", "no") and rows["Ascend"] in ("usable", "no")
    assert rows["Python"] == ".".join(map(str, sys.version_info[:3]))


def test_numpy_2(bare):
    """With numpy 2 MindSpore imports and breaks later, so its version has to be looked at."""
    info = bare.root / "new/numpy-2.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 2.1.0\n")
    bare.monkeypatch.setattr(sys, "path", [str(info.parent), *sys.path])
    report = doctor.report()
    line = f"numpy 2.1.0 does not work here, expected below 2, with which MindSpore was built: {doctor.INSTALL}"
    assert report["packages"]["numpy"] == {"version": "2.1.0", "problem": line}
    assert report["devices"]["CPU"]["problems"] == [doctor.COMMON]
    assert f"{'numpy':<10} {'2.1.0':<10} {line}" in doctor.table(report)


def test_python_that_is_not_supported(monkeypatch):
    """MindSpore's wheels end at 3.12; pip only says that it finds none."""
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    assert doctor.python_problem() == "Python 3.13 is not supported: install Python 3.11 or 3.12"


def test_need_gpu(bare, capsys):
    """The launchers rely on it: silent, or one line."""
    with pytest.raises(UserError, match=r"^device GPU cannot be used: libcuda.so.1 is missing; .*: install the driver"):
        doctor.main(["--need-driver", "GPU"])
    bare.add_driver(gpus=2)
    assert doctor.main(["--need-driver", "GPU"]) == 0
    with pytest.raises(UserError, match=r"libcudart.so.11.0, .* are missing: pip install -r requirements-gpu.txt"):
        doctor.main(["--need", "GPU"])
    bare.add_wheels()
    assert doctor.main(["--need", "GPU", "--count", "2"]) == 0
    with pytest.raises(UserError, match=r"^3 GPU devices were asked for, and a job can use 2 here$"):
        doctor.main(["--need", "GPU", "--count", "3"])
    bare.monkeypatch.setenv(cuda.VISIBLE, "1")
    with pytest.raises(UserError, match=r"a job can use 1 here \(CUDA_VISIBLE_DEVICES=1\)"):
        doctor.require_driver("GPU", 2)
    assert capsys.readouterr() == ("", "")


def test_need_ascend(bare):
    """CANN has to be sourced: the line names the script where it is installed, and the installation page otherwise."""
    with pytest.raises(
        UserError, match=r"/dev/davinci0 is missing.*install driver.*libascendcl.so.*install CANN \(http"
    ):
        doctor.require("Ascend")
    bare.devices["davinci"] = 8
    set_env = bare.add(bare.root / "Ascend/ascend-toolkit", "set_env.sh") / "set_env.sh"
    with pytest.raises(UserError, match=rf"used: libascendcl.so, .* of CANN are missing: source {set_env}$"):
        doctor.require("Ascend")
    bare.library_path(bare.add(bare.root / "lib64", "libascendcl.so", "libge_runner.so", "libgraph.so"))
    assert doctor.require("Ascend", 8) == {}


def test_cpu_needs_nothing(bare):
    """A job on the CPU runs on any machine, with as many processes as are wanted."""
    assert doctor.require("CPU", 64) == {}


def test_env_is_for_eval(bare, capsys):
    """What is printed must come back from a shell as it was, with spaces in paths too."""
    bare.prefix = bare.root / "my prefix"
    bare.monkeypatch.setattr(sys, "prefix", str(bare.prefix))
    bare.add_driver(gpus=1)
    bare.add_wheels()
    assert doctor.main(["--env", "GPU"]) == 0
    names = ("CUDA_HOME", "PATH", "LD_LIBRARY_PATH")
    text = capsys.readouterr().out + "printf '%s\\n' " + " ".join(f'"${name}"' for name in names)
    shell = subprocess.run(["/bin/sh", "-c", text], capture_output=True, text=True, check=True)
    assert shell.stdout.splitlines() == [doctor.require("GPU")[name] for name in names]


def test_a_device_that_looks_right_and_is_not(bare):
    """MindSpore has the last word: with empty files for libraries it says no, and which one stopped it."""
    bare.add_driver(gpus=1)
    bare.add_wheels()
    bare.library_path(bare.root / "driver")
    gpu = doctor.report()["devices"]["GPU"]
    assert not gpu["usable"] and gpu["count"] == 1
    reason = gpu["problems"][0]
    assert reason.startswith(f"MindSpore cannot use GPU: {bare.root}") and reason.endswith("file too short")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "Load dynamic library: libmindspore_ascend.so.2 failed. libge_runner.so: cannot open\n"
            "Load dynamic library: libmindspore_gpu.so.11.6 failed. libcuda.so.1: cannot open\n",
            "libcuda.so.1: cannot open",
        ),
        (
            "RuntimeError: \n---\n- Cuda error:\n---\nThe cudaGetLastError[35], CUDA driver version is insufficient\n",
            "CUDA driver version is insufficient",
        ),
        ("Traceback\nImportError: libgomp.so.1: cannot open\nbye\n", "libgomp.so.1: cannot open"),
        ("something\nelse\n\n", "else"),
        ("", "it said nothing"),
    ],
)
def test_the_reason_is_found_in_what_mindspore_prints(output, reason):
    """MindSpore's errors are pages long; one line of them helps."""
    assert doctor.probe_error(output, "GPU") == reason


def test_set_device_points_here(monkeypatch):
    """Who runs train.py without the launcher gets no GPU environment, and is told about both."""
    monkeypatch.setattr(device, "available_devices", lambda: ["CPU"])
    with pytest.raises(
        UserError, match=r"finds CPU here; start it by scripts/run_standalone_train_gpu.sh, and `python -m"
    ):
        device.set_device("GPU")
    assert (SRC.parent / "scripts/run_standalone_train_gpu.sh").is_file()


@pytest.mark.parametrize("args", [["--need", "TPU"], ["--count", "0"], ["--count", "two"], ["--nonsense"]])
def test_wrong_arguments(args):
    """A mistake in the arguments is one line, like everywhere."""
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        doctor.main(args)

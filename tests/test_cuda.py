"""GPU libraries and environment on made-up machines; no GPU is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import mindspore
import numpy
import pytest
from mindspore.run_check import _check_version

from bare_machine import BareMachine
from localmim import cuda, machine
from localmim.errors import UserError


@pytest.fixture
def bare(tmp_path, monkeypatch):
    return BareMachine(tmp_path, monkeypatch)


def test_libraries_are_found_in_the_loaders_order(bare):
    """What the launcher prepares is only right if it sees the same file that the loader will take."""
    name = "libcublas.so.11"
    wheel = bare.add(bare.site / "nvidia/cublas/lib", name) / name
    cached = bare.add(bare.root / "usr_lib", name) / name
    bare.cached[name] = cached
    toolkit = bare.add_toolkit(bare.local / "cuda-11.8", "11.8", name) / "lib64" / name
    told = bare.add(bare.root / "told", name) / name
    bare.library_path(told.parent)
    rpath = bare.add(bare.local / "cuda/lib64", name) / name
    for expected in (rpath, told, toolkit, cached, wheel):
        assert cuda.find_libraries()[name] == expected
        expected.unlink()
        bare.cached = {key: path for key, path in bare.cached.items() if path.exists()}
    assert cuda.find_libraries()[name] is None


def test_a_folder_of_cuda_12_does_not_count(bare):
    """CUDA 12 has libraries of the same names; with the wheels' others they would be a mixture."""
    bare.add_wheels()
    twelve = bare.add(bare.root / "cuda-12/lib64", "libcudart.so.12", "libcusolver.so.11", "libcurand.so.10")
    bare.library_path(twelve)
    bare.monkeypatch.setenv("CUDA_HOME", str(twelve.parent))
    bare.cached["libcurand.so.10"] = twelve / "libcurand.so.10"
    assert all(path.is_relative_to(bare.site) for path in cuda.find_libraries().values())
    folders = cuda.environment()["LD_LIBRARY_PATH"].split(":")
    assert str(bare.site / "nvidia/curand/lib") in folders and folders[-1] == str(twelve)


def test_environment_of_the_wheels(bare):
    """MindSpore loads no GPU plugin without these variables."""
    bare.add_wheels()
    bare.library_path(bare.root / "mine")
    environment = cuda.environment()
    home = bare.prefix / "share/localmim/cuda"
    folders = environment["LD_LIBRARY_PATH"].split(":")
    assert environment["CUDA_HOME"] == str(home)
    assert environment["PATH"] == f"{home}/bin:{bare.commands}"
    assert folders[0] == f"{home}/lib64" and folders[-1] == str(bare.root / "mine")
    assert sorted(folders[1:-1]) == sorted(map(str, bare.site.glob("nvidia/*/lib")))
    assert int(environment["CUDA_CACHE_MAXSIZE"]) >= 2**31 and environment["CUDA_MODULE_LOADING"] == "LAZY"

    said = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    assert said == "Cuda compilation tools, release 11.6, V11.6.124\n"
    cudart = bare.site / "nvidia/cudart/lib/libcudart.so.11.0"
    assert {link.name: link.resolve() for link in home.glob("lib64/*")} == {
        "libcudart.so.11.0": cudart,
        "libcudart.so.11.6.55": cudart,
    }

    bare.monkeypatch.setenv("CUDA_CACHE_MAXSIZE", "1")
    for name in ("CUDA_HOME", "PATH", "LD_LIBRARY_PATH"):
        bare.monkeypatch.setenv(name, environment[name])
    assert cuda.environment() == {**environment, "CUDA_CACHE_MAXSIZE": "1"}, "not the same when it is set already"


def test_links_follow_the_library(bare):
    """A folder made when another cudart was here must not keep MindSpore on the old one."""
    bare.add_wheels()
    cuda.environment()
    told = bare.add(bare.root / "told", "libcudart.so.11.0") / "libcudart.so.11.0"
    bare.library_path(told.parent)
    link = Path(cuda.environment()["CUDA_HOME"]) / "lib64/libcudart.so.11.6.55"
    assert link.resolve() == told


@pytest.mark.parametrize("release", ["11.6", "11.1"])
def test_a_cuda_that_mindspore_knows_is_taken_as_it_is(bare, release):
    """Nothing of our own is needed where the right CUDA is installed; the plugin for 11.1 wants another nvrtc."""
    nvrtc = cuda.NVRTC[release]
    toolkit = bare.add_toolkit(bare.local / f"cuda-{release}", release, *cuda.SONAMES, nvrtc)
    environment = cuda.environment()
    assert environment["CUDA_HOME"] == str(toolkit) and environment["LD_LIBRARY_PATH"] == f"{toolkit}/lib64"
    assert cuda.find_libraries()[nvrtc] == toolkit / "lib64" / nvrtc
    assert not bare.prefix.exists()


def test_libraries_of_the_loaders_cache_stay_where_they_are(bare):
    """/usr/lib in front of LD_LIBRARY_PATH would hide libraries of the user's own environment."""
    folder = bare.add(bare.root / "usr_lib", *cuda.SONAMES, cuda.NVRTC["11.6"])
    bare.cached = {path.name: path for path in folder.iterdir()}
    assert cuda.environment()["LD_LIBRARY_PATH"] == str(bare.prefix / "share/localmim/cuda/lib64")


def test_read_only_python_environment(bare):
    """Images often have the Python environment read-only; then the user's cache serves, or one line says so."""
    bare.add_wheels()
    bare.prefix.touch()  # a file: nothing can be made in it, by root neither
    assert cuda.environment()["CUDA_HOME"] == str(bare.root / "cache/localmim/cuda")
    shutil.rmtree(bare.root / "cache")
    (bare.root / "cache").touch()
    with pytest.raises(UserError, match=r"cannot write a folder for CUDA_HOME.*XDG_CACHE_HOME"):
        cuda.environment()


def test_what_is_missing_is_named(bare):
    """The user has to read which library, and the command that brings it."""
    assert cuda.driver_problems()[0].startswith("libcuda.so.1 is missing; it is part of the NVIDIA driver: install")
    bare.add_driver(gpus=0)
    assert "no GPU found" in cuda.driver_problems()[0]
    bare.devices["nvidia"] = 2  # no nvidia-smi, as in some containers
    assert cuda.driver_problems() == [] and cuda.device_count() == 2

    bare.add_wheels()
    assert cuda.library_problems() == []
    (bare.site / "nvidia/cudnn/lib/libcudnn.so.8").unlink()
    line = "libcudnn.so.8 is missing: pip install -r requirements-gpu.txt"
    assert cuda.library_problems() == [line]
    with pytest.raises(UserError, match=line):
        cuda.environment()


@pytest.mark.parametrize(
    ("chosen", "count"),
    [(None, 4), ("0,2", 2), ("3,9,1", 1), ("-1", 0), ("", 0), ("GPU-0,GPU-3", 2), (" 1, 2 ", 2)],
)
def test_visible_devices(bare, chosen, count):
    """A job gets the devices that the variable leaves, as the driver reads it."""
    bare.add_driver(gpus=4)
    if chosen is not None:
        bare.monkeypatch.setenv(cuda.VISIBLE, chosen)
    assert cuda.device_count() == count
    problems = cuda.driver_problems()
    assert problems == [] if count else problems[0].startswith(f"CUDA_VISIBLE_DEVICES={chosen!r} hides every GPU")


def test_mindspore_accepts_the_environment(bare):
    """MindSpore's own check of versions, on its real plugin, finds CUDA 11.6 in our folder and warns of nothing."""
    plugin = Path(mindspore.__file__).parent / "lib/plugin/libmindspore_gpu.so.11.6"
    if Path("/usr/local/cuda/lib64/libcudart.so.11.0").exists():
        pytest.skip("the plugin's rpath takes the CUDA of this machine")
    bare.add_wheels()
    real = min(Path(numpy.__file__).parent.rglob("*.so"), key=lambda path: path.stat().st_size)
    shutil.copy(real, bare.site / "nvidia/cudart/lib/libcudart.so.11.0")  # the loader wants a true library
    for soname in set(cuda.find_libraries()) - {"libcudart.so.11.0"}:
        shutil.copy(real, cuda.find_libraries()[soname])
    for name, value in cuda.environment().items():
        bare.monkeypatch.setenv(name, value)
    said = []
    for level in ("warning", "error"):
        bare.monkeypatch.setattr(_check_version.logger, level, lambda text, *rest: said.append(text))
    checker = _check_version.GPUEnvChecker(str(plugin))
    checker.check_version()
    assert said == []
    assert checker.get_cudart_version() == "11.6.55" and checker._get_nvcc_version(False) == "11.6"

    os.unlink(Path(os.environ["CUDA_HOME"]) / "lib64/libcudart.so.11.6.55")
    _check_version.GPUEnvChecker(str(plugin)).check_version()
    assert "Cannot find cuda libs" in said[0]  # so the check above could have failed


def test_loader_cache_reads_ldconfig(tmp_path, monkeypatch):
    """A library of another processor has the same name in the cache and cannot be loaded."""
    library, other = tmp_path / "libcuda.so.1", tmp_path / "lib32.so.1"
    library.touch()
    other.touch()
    text = (
        "2 libs found in cache `/etc/ld.so.cache'\n"
        f"\tlibcuda.so.1 (libc6) => {other}\n"
        f"\tlibcuda.so.1 (libc6,x86-64) => {library}\n"
        f"\tlibgone.so.1 (libc6,x86-64) => {tmp_path}/gone\n"
    )
    monkeypatch.setattr(machine, "command_output", lambda *command: text)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    assert machine.loader_cache() == {"libcuda.so.1": library}

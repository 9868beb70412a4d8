"""A made-up machine for the tests of devices: its folders lie under one path, and hold nothing until a test adds it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from localmim import ascend, cuda, machine


class BareMachine:
    """Stands in for the real machine in `localmim.machine`, `cuda` and `ascend`.

    Args:
        root: The folder under which /usr/local, the Python environment and the user's cache are.
        monkeypatch: Undoes everything after the test.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.root = root
        self.local, self.site, self.prefix = root / "usr_local", root / "site", root / "prefix"
        self.cached: dict[str, Path] = {}
        self.devices: dict[str, int] = {}
        self.monkeypatch = monkeypatch
        packages = [entry for entry in sys.path if not (Path(entry or ".") / "nvidia").exists()]
        for target, name, value in (
            (cuda, "LOCAL", self.local),
            (ascend, "ROOTS", (root / "Ascend",)),
            (machine, "DEFAULT_FOLDERS", ()),
            (machine, "loader_cache", lambda: dict(self.cached)),
            (machine, "device_files", lambda pattern: self.devices.get(pattern.split("[")[0], 0)),
            (sys, "path", [*packages, str(self.site)]),
            (sys, "prefix", str(self.prefix)),
        ):
            monkeypatch.setattr(target, name, value)
        for variable in ("LD_LIBRARY_PATH", "CUDA_HOME", cuda.VISIBLE, ascend.VISIBLE, "ASCEND_HOME_PATH"):
            monkeypatch.delenv(variable, raising=False)
        for variable in ("CUDA_CACHE_MAXSIZE", "CUDA_MODULE_LOADING"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        self.commands = root / "bin"
        self.commands.mkdir()
        for name in ("sh", "env", "ldd", "grep", "ls"):  # and no nvcc, no nvidia-smi
            (self.commands / name).symlink_to(shutil.which(name))
        monkeypatch.setenv("PATH", str(self.commands))

    def library_path(self, *folders: Path) -> None:
        self.monkeypatch.setenv("LD_LIBRARY_PATH", ":".join(map(str, folders)))

    def add(self, folder: Path, *sonames: str) -> Path:
        """Empty files with the names of libraries."""
        folder.mkdir(parents=True, exist_ok=True)
        for soname in sonames:
            (folder / soname).touch()
        return folder

    def add_wheels(self) -> None:
        """All CUDA libraries as the wheels lay them out: a folder nvidia/NAME/lib each, in site-packages."""
        for soname in (*cuda.SONAMES, cuda.NVRTC["11.6"]):
            self.add(self.site / "nvidia" / soname.partition(".")[0].removeprefix("lib") / "lib", soname)

    def add_toolkit(self, folder: Path, release: str, *sonames: str) -> Path:
        """A CUDA as NVIDIA's installers lay it out."""
        self.add(folder / "lib64", *sonames)
        script(
            folder / "bin/nvcc", f"echo 'nvcc: NVIDIA (R) Cuda'\necho 'Cuda compilation tools, release {release}, V1'"
        )
        return folder

    def add_driver(self, gpus: int) -> None:
        self.cached["libcuda.so.1"] = self.add(self.root / "driver", "libcuda.so.1") / "libcuda.so.1"
        lines = "\n".join(f"echo 'GPU {n}: Made Up (UUID: GPU-{n})'\necho '  MIG 1g'" for n in range(gpus))
        script(self.commands / "nvidia-smi", lines)


def script(path: Path, lines: str) -> None:
    """A program that a shell runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)

"""NVIDIA GPUs: which libraries MindSpore's plugin needs, where they are, and the environment in which it loads them.

MindSpore 2.10 holds plugins for CUDA 11.1 and 11.6 and chooses by what `$CUDA_HOME/bin/nvcc --version` prints; without
CUDA_HOME it loads none. A CUDA of the machine that says one of the two is taken as it is. In any other case the plugin
for 11.6 is loaded with the CUDA 11 libraries that are found, such as the wheels of requirements-gpu.txt (any CUDA 11.x
serves it: NVIDIA keeps libraries compatible within 11), and CUDA_HOME is a small folder of our own:

    bin/nvcc                      prints the line of 11.6
    lib64/libcudart.so.11.0       a link to the library that was found; the loader takes it by this name
    lib64/libcudart.so.11.6.55    the same; MindSpore's Python side reads the version from this name, or warns

The plugin's own rpath names /usr/local/cuda/lib64, so the loader takes libraries from there before all others; where
that is CUDA 11.8, MindSpore works and warns about the version.
NCCL is inside MindSpore's wheel. Needs the standard library only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from localmim import machine
from localmim.errors import UserError

DRIVER = "libcuda.so.1"
OWN_RELEASE = "11.6"
NVRTC = {"11.1": "libnvrtc.so.11.1", "11.6": "libnvrtc.so.11.2"}  # one for each plugin; the other libraries are shared
SONAMES = (
    "libcudart.so.11.0",
    "libcublas.so.11",
    "libcudnn.so.8",
    "libcurand.so.10",
    "libcusolver.so.11",
    "libcufft.so.10",
    "libcusparse.so.11",
)
LOCAL = Path("/usr/local")  # where NVIDIA's installers put a toolkit
VISIBLE = "CUDA_VISIBLE_DEVICES"
NVCC = "#!/bin/sh\necho 'Cuda compilation tools, release 11.6, V11.6.124'\n"
INSTALL = "pip install -r requirements-gpu.txt"


def find_driver() -> Path | None:
    """The driver's library, libcuda.so.1."""
    return machine.find_loadable(DRIVER)


def machine_devices() -> int:
    """The number of GPUs in this machine."""
    listed = [line for line in machine.command_output("nvidia-smi", "-L").splitlines() if line.startswith("GPU ")]
    return len(listed) or machine.device_files("nvidia[0-9]*")


def device_count() -> int:
    """The number of GPUs that a job may use here: those that CUDA_VISIBLE_DEVICES leaves visible."""
    return machine.visible(machine_devices(), VISIBLE)


def driver_problems() -> list[str]:
    """What is missing of driver and devices, each with the step that brings it; empty: nothing."""
    if find_driver() is None:
        return [
            f"{DRIVER} is missing; it is part of the NVIDIA driver: install the driver "
            "(https://www.nvidia.com/drivers), or start the container with --gpus all"
        ]
    total = machine_devices()
    if total == 0:
        return [
            f"no GPU found by `nvidia-smi -L` or in /dev/nvidia*, though the driver's {DRIVER} is there: "
            "load the driver's kernel module, or start the container with --gpus all"
        ]
    return [] if device_count() else [machine.hidden(total, VISIBLE, "GPU")]


def library_problems() -> list[str]:
    """The CUDA libraries that are missing, with the command that brings them; empty: none."""
    names = [soname for soname, path in find_libraries().items() if path is None]
    return [f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing: {INSTALL}"] if names else []


def find_libraries() -> dict[str, Path | None]:
    """The CUDA libraries that the plugin links, by soname; None where there is none.

    Searched in the order in which the loader will: the plugin's rpath, LD_LIBRARY_PATH, a CUDA 11 of the machine,
    the loader's cache, and last the wheels of the running Python, which fill what the machine lacks. Folders of another
    CUDA than 11 do not count: CUDA 12 has libcurand.so.10 and libcusolver.so.11 too, made for its own other libraries.
    """
    toolkit = system_cuda()
    toolkits = [folder / lib for folder in _toolkits() for lib in ("lib64", "targets/x86_64-linux/lib")]
    folders = [folder for folder in (LOCAL / "cuda/lib64", *_library_path(), *toolkits) if not _other_cuda(folder)]
    cached = {name: path for name, path in machine.loader_cache().items() if not _other_cuda(path.parent)}
    wheels = [lib for entry in sys.path for lib in sorted(Path(entry or ".").absolute().glob("nvidia/*/lib"))]
    sonames = (*SONAMES, NVRTC[toolkit[1] if toolkit else OWN_RELEASE])
    return {
        name: machine.find_in(folders, name) or cached.get(name) or machine.find_in(wheels, name) for name in sonames
    }


def system_cuda() -> tuple[Path, str] | None:
    """The first CUDA of this machine that MindSpore has a plugin for, and its release ("11.6")."""
    for folder in _toolkits():
        said = machine.command_output(folder / "bin/nvcc", "--version").partition("release ")[2].partition(",")[0]
        if said in NVRTC:
            return folder, said
    return None


def environment() -> dict[str, str]:
    """The variables, with their whole values, with which MindSpore must be started to load its GPU plugin.

    CUDA_HOME, PATH and LD_LIBRARY_PATH, and unless they are set already CUDA_CACHE_MAXSIZE (kernels are compiled at
    their first use on newer GPUs, and kept) and CUDA_MODULE_LOADING.

    Raises:
        UserError: A CUDA library is missing, or no folder can be written for CUDA_HOME.
    """
    problems = library_problems()
    if problems:
        raise UserError(problems[0])
    libraries = find_libraries()
    toolkit = system_cuda()
    home = toolkit[0] if toolkit else _own_home(libraries["libcudart.so.11.0"].resolve())
    cache = machine.loader_cache()
    # Folders that the loader searches anyway stay where they are: one of the system's in front would hide others.
    known = {LOCAL / "cuda/lib64", *_library_path(), *(cache[name].parent for name in libraries if name in cache)}
    folders = [home / "lib64", *(path.parent for path in libraries.values() if path.parent not in known)]
    return {
        "CUDA_HOME": str(home),
        "PATH": machine.in_front([home / "bin"], "PATH"),
        "LD_LIBRARY_PATH": machine.in_front(folders, "LD_LIBRARY_PATH"),
        "CUDA_CACHE_MAXSIZE": os.environ.get("CUDA_CACHE_MAXSIZE", "4000000000"),  # bytes; MindSpore's own figure
        "CUDA_MODULE_LOADING": os.environ.get("CUDA_MODULE_LOADING", "LAZY"),
    }


def _own_homes() -> list[Path]:
    """Where our own CUDA_HOME may be: in the Python environment, or where that is read-only in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    roots = (f"{sys.prefix}/share", cache)
    return [Path(root) / "localmim/cuda" for root in roots if os.path.isabs(root)]  # "~/.cache": a user without a home


def _toolkits() -> list[Path]:
    """Folders that may hold a CUDA of the machine: CUDA_HOME, then NVIDIA's default places."""
    named = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    own = _own_homes()
    return [folder for folder in (*named, LOCAL / "cuda", *sorted(LOCAL.glob("cuda-11*"))) if folder not in own]


def _other_cuda(folder: Path) -> bool:
    """Whether a folder holds the runtime of another CUDA than 11."""
    return any(folder.glob("libcudart.so.*")) and not (folder / "libcudart.so.11.0").exists()


def _library_path() -> list[Path]:
    """LD_LIBRARY_PATH without our own folder, whose links may be of another day."""
    own = [home / "lib64" for home in _own_homes()]
    return [folder for folder in map(Path, machine.path_entries("LD_LIBRARY_PATH")) if folder not in own]


def _own_home(cudart: Path) -> Path:
    """Makes our CUDA_HOME if it is not there as it should be; processes may do so at the same time."""
    errors = []
    for home in _own_homes():
        nvcc = home / "bin/nvcc"
        links = [home / "lib64/libcudart.so.11.0", home / "lib64/libcudart.so.11.6.55"]
        try:
            if not (nvcc.is_file() and os.access(nvcc, os.X_OK) and nvcc.read_text() == NVCC):
                _place(nvcc, _write_nvcc)
            for link in links:
                if not (link.is_symlink() and link.readlink() == cudart):
                    _place(link, lambda path: path.symlink_to(cudart))
            return home
        except OSError as error:
            errors.append(f"{home} ({error.strerror or error})")
    raise UserError(
        f"cannot write a folder for CUDA_HOME: {', '.join(errors)}; set XDG_CACHE_HOME to one you can write"
    )


def _write_nvcc(path: Path) -> None:
    path.write_text(NVCC)
    path.chmod(0o755)


def _place(path: Path, make: Callable[[Path], None]) -> None:
    """Makes a file aside and moves it into place, so that it is there whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        make(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)

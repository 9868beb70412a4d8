"""What the machine offers to a device: shared libraries that the loader finds, and how many devices a job may see.

Needs the standard library only, like everything that the doctor uses.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

DEFAULT_FOLDERS = tuple(
    Path(root) / folder for root in ("/", "/usr") for folder in (f"lib/{platform.machine()}-linux-gnu", "lib64", "lib")
)  # where the loader looks last, without being told


def command_output(*command: str | Path) -> str:
    """What a program prints on stdout; "" where there is no such program, or it fails."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "LC_ALL": "C"}
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout


def path_entries(variable: str) -> list[str]:
    """The folders of PATH, LD_LIBRARY_PATH and the like, in order."""
    return [entry for entry in os.environ.get(variable, "").split(":") if entry]


def in_front(entries: Iterable[str | Path], variable: str) -> str:
    """The value of PATH, LD_LIBRARY_PATH and the like with `entries` in front, each folder once."""
    return ":".join(dict.fromkeys([*map(str, entries), *path_entries(variable)]))


def find_in(folders: Iterable[Path], soname: str) -> Path | None:
    """The first of the folders' files of this name."""
    return next((folder / soname for folder in folders if (folder / soname).exists()), None)


def loader_cache() -> dict[str, Path]:
    """The shared libraries in the loader's cache (`ldconfig -p`) that suit this processor, by soname."""
    tag = {"x86_64": "x86-64", "aarch64": "AArch64"}.get(platform.machine(), "")
    text = command_output("/sbin/ldconfig", "-p") or command_output("ldconfig", "-p")
    found: dict[str, Path] = {}
    for line in text.splitlines():
        name, arrow, path = line.partition(" => ")
        if arrow and tag in name and Path(path).exists():
            found.setdefault(name.split()[0], Path(path))
    return found


def find_loadable(soname: str) -> Path | None:
    """The file that the loader takes for a soname: LD_LIBRARY_PATH, then its cache, then its default folders."""
    return (
        find_in(map(Path, path_entries("LD_LIBRARY_PATH")), soname)
        or loader_cache().get(soname)
        or find_in(DEFAULT_FOLDERS, soname)
    )


def device_files(pattern: str) -> int:
    """The number of files /dev/`pattern`."""
    return len(list(Path("/dev").glob(pattern)))


def visible(total: int, variable: str) -> int:
    """How many of `total` devices a variable such as CUDA_VISIBLE_DEVICES ("0,2") leaves to a job; unset: all.

    As the drivers read it: what follows the first number that is no device does not count.
    """
    chosen = os.environ.get(variable)
    if chosen is None:
        return total
    count = 0
    for entry in filter(None, map(str.strip, chosen.split(","))):
        number = entry.removeprefix("-").isdigit()
        if number and not 0 <= int(entry) < total:
            break
        count += 1
    return min(count, total)


def hidden(total: int, variable: str, device: str) -> str:
    """The line for a machine whose devices are all hidden by a variable."""
    return (
        f"{variable}={os.environ.get(variable, '')!r} hides every {device} of this machine ({total}): "
        f"unset it, or name one, as in {variable}=0"
    )


def give_back_memory() -> None:
    """Returns to the system what this process has freed and the C library keeps; nothing where that is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

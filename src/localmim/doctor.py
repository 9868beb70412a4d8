"""What is here and what is missing: Python, packages, and for each device whether MindSpore can use it.

    python -m localmim.doctor                        a table; exit code 0 when the CPU works, otherwise 2
    python -m localmim.doctor --json                 the same as JSON
    python -m localmim.doctor --need GPU --count 8   silent and 0, or one line that names what is missing, and 2
    python -m localmim.doctor --need-driver GPU      the same for driver and devices only, before anything is installed
    eval "$(python -m localmim.doctor --env GPU)"    sets what MindSpore needs to load its GPU plugin

Needs the standard library only, so that it works on a machine where nothing is installed yet. MindSpore itself is asked
in a process of its own, which may crash, and only where nothing known is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

from localmim import ascend, cuda
from localmim.errors import UserError

ACCELERATORS: dict[str, ModuleType] = {"GPU": cuda, "Ascend": ascend}
DEVICES = ("CPU", *ACCELERATORS)
INSTALL = "pip install -r requirements.txt"
PYTHONS = ((3, 11), (3, 12))
COMMON = "Python or a package is not as it should be (above)"
PROBE_SECONDS = 900  # the first use of a new GPU compiles MindSpore's kernels
PROBE = """
import sys
import mindspore as ms
ms.set_device(sys.argv[1])
assert (ms.Tensor([1.0, 2.0]) + 1).asnumpy().tolist() == [2.0, 3.0], "1 + 1 is not 2 on this device"
"""


class Package(NamedTuple):
    """A package the project cannot do without: its names on disk, and which versions work."""

    name: str
    distributions: tuple[str, ...]
    works: Callable[[tuple[int, ...]], bool]
    expected: str


_OPENCV = tuple(f"opencv{contrib}-python{headless}" for contrib in ("", "-contrib") for headless in ("-headless", ""))
PACKAGES = (
    Package("MindSpore", ("mindspore",), lambda v: v[:2] == (2, 10), "2.10"),
    Package("numpy", ("numpy",), lambda v: v < (2,), "below 2, with which MindSpore was built"),
    Package("OpenCV", _OPENCV, lambda v: v < (4, 12), "below 4.12, which needs numpy 2"),
    Package("Numba", ("numba",), lambda v: True, "any"),
    Package("mindcv", ("mindcv",), lambda v: True, "any"),
)


def require(device: str, count: int = 1) -> dict[str, str]:
    """The environment variables, with their whole values, for the processes of a job on `count` devices; CPU: none.

    Looks at files only, which takes milliseconds; whether MindSpore then gets along with the driver, the table says.

    Raises:
        UserError: The device cannot be used, or there are fewer than `count`; one line with what is missing and the
            step that brings it.
    """
    accelerator = ACCELERATORS.get(device)
    problems = [*accelerator.driver_problems(), *accelerator.library_problems()] if accelerator else []
    _require(device, problems + build_problems(device), count)
    return accelerator.environment() if accelerator else {}


def require_driver(device: str, count: int = 1) -> None:
    """Looks for driver and devices only.

    Raises:
        UserError: As `require` does.
    """
    accelerator = ACCELERATORS.get(device)
    _require(device, accelerator.driver_problems() if accelerator else [], count)


def build_problems(device: str) -> list[str]:
    """What is missing of MindSpore itself: the package, or its plugin for the device."""
    spec = importlib.util.find_spec("mindspore")
    if spec is None or not spec.submodule_search_locations:
        return [f"mindspore is missing: {INSTALL}"]
    pattern = f"lib/plugin/libmindspore_{device.lower()}.so*"
    if device in ACCELERATORS and not any(any(Path(p).glob(pattern)) for p in spec.submodule_search_locations):
        return [f"this build of MindSpore has no plugin for {device} ({pattern}): {INSTALL}"]
    return []


def package_problem(package: Package) -> str | None:
    """What is wrong with a package, and the command that mends it."""
    version = installed_version(package)
    if version is None:
        return f"{package.name} is missing: {INSTALL}"
    if not package.works(tuple(int(part) for part in re.findall(r"\d+", version)[:3])):
        return f"{package.name} {version} does not work here, expected {package.expected}: {INSTALL}"
    return None


def installed_version(package: Package) -> str | None:
    """The version of a package as its installer wrote it down."""
    for name in package.distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def python_problem() -> str | None:
    """What is wrong with the running Python."""
    running = sys.version_info[:2]
    if running in PYTHONS:
        return None
    return f"Python {running[0]}.{running[1]} is not supported: install Python 3.11 or 3.12"


def probe(device: str, environment: dict[str, str]) -> str | None:
    """Has MindSpore add two numbers on a device, in a process of its own; None, or why it could not."""
    with tempfile.TemporaryDirectory() as folder:  # what a crash leaves behind goes with it
        try:
            result = subprocess.run(
                [sys.executable, "-c", PROBE, device],
                env={**os.environ, **environment, "GLOG_v": "3"},
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PROBE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"MindSpore did not answer on {device} within {PROBE_SECONDS} s"
    if result.returncode == 0:
        return None
    if result.returncode < 0:
        return f"MindSpore was ended by signal {-result.returncode} when it used {device}"
    return f"MindSpore cannot use {device}: {probe_error(result.stdout + result.stderr, device)}"


def probe_error(output: str, device: str) -> str:
    """The line that says why, from all that MindSpore prints."""
    for pattern in (
        rf"Load dynamic library: libmindspore_{device.lower()}\S* failed\. *(.+)",
        r"cudaGetLastError\[\d+\], *(.+)",
        r"^(?:\w+\.)*\w*(?:Error|Exception): *(\S.*)",
    ):
        if found := re.search(pattern, output, re.MULTILINE):
            return found[1].strip()
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def report() -> dict:
    """All that the table shows, and for each device the libraries that were found."""
    python = python_problem()
    packages = {
        package.name: {"version": installed_version(package), "problem": package_problem(package)}
        for package in PACKAGES
    }
    common = any((python, *(entry["problem"] for entry in packages.values())))
    devices = {device: _device_report(device, common) for device in DEVICES}
    devices["GPU"]["libraries"] = {name: path and str(path) for name, path in cuda.find_libraries().items()}
    return {
        "python": {"version": ".".join(map(str, sys.version_info[:3])), "problem": python},
        "packages": packages,
        "devices": devices,
    }


def _device_report(device: str, common: bool) -> dict:
    """Whether one device is usable; `common`: something that all devices need is wrong."""
    accelerator = ACCELERATORS.get(device)
    problems = [*accelerator.driver_problems(), *accelerator.library_problems()] if accelerator else []
    problems += [COMMON] if common else build_problems(device)
    if not problems:
        try:
            said = probe(device, accelerator.environment() if accelerator else {})
            problems = [said] if said else []
        except UserError as error:
            problems = [str(error)]
    return {
        "usable": not problems,
        "count": accelerator.device_count() if accelerator else 1,
        "problems": problems,
    }


def table(found: dict) -> str:
    """The report as lines of text: what, which version or whether it works, what is wrong."""
    rows = [("Python", found["python"]["version"], found["python"]["problem"] or "")]
    for name, entry in found["packages"].items():
        rows.append((name, entry["version"] or "-", entry["problem"] or ""))
    for name, entry in found["devices"].items():
        if entry["usable"]:
            rows.append((name, "usable", "" if name == "CPU" else f"devices: {entry['count']}"))
        else:
            first, *others = entry["problems"]
            rows += [(name, "no", first), *(("", "", other) for other in others)]
    return "\n".join(f"{name:<10} {value:<10} {text}".rstrip() for name, value, text in rows)


def main(argv: list[str]) -> int:
    """The command; the exit code."""
    parser = _Parser(
        prog="python -m localmim.doctor", description="Which devices MindSpore can use, and what is missing"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--json", action="store_true", help="print the report as JSON")
    mode.add_argument("--need", choices=DEVICES, help="only say whether this device can be used")
    mode.add_argument("--need-driver", choices=DEVICES, help="only look for its driver and devices")
    mode.add_argument("--env", choices=DEVICES, help="print the environment that this device needs, for eval")
    parser.add_argument("--count", type=int, default=1, help="with --need, --need-driver: how many devices (default 1)")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise UserError(f"--count is {args.count}, expected a whole number of at least 1")
    if args.need:
        require(args.need, args.count)
    elif args.need_driver:
        require_driver(args.need_driver, args.count)
    elif args.env:
        for name, value in require(args.env).items():
            print(f"export {name}={shlex.quote(value)}")
    else:
        found = report()
        print(json.dumps(found, indent=2) if args.json else table(found))
        return 0 if found["devices"]["CPU"]["usable"] else 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _require(device: str, problems: list[str], count: int) -> None:
    """UserError when there are problems, or a job may use fewer than `count` devices here."""
    if problems:
        raise UserError(f"device {device} cannot be used: {'; '.join(problems)}")
    if device in ACCELERATORS and (found := ACCELERATORS[device].device_count()) < count:
        variable = ACCELERATORS[device].VISIBLE
        hint = f" ({variable}={os.environ[variable]})" if variable in os.environ else ""
        raise UserError(f"{count} {device} devices were asked for, and a job can use {found} here{hint}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

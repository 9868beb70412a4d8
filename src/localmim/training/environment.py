"""What a run was computed with: `environment.json`, a list with an entry each time that its command was started."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from datetime import datetime
from pathlib import Path

import psutil

import localmim
from localmim.files import replace_text

ENVIRONMENT = "environment.json"
PACKAGES = ("mindspore", "mindcv", "numpy")


def add_session(output: Path, step: int, device: str, devices: int, precision: str) -> None:
    """Adds this process to the list in `output`. One that cannot be read is begun anew.

    Args:
        output: The run's folder.
        step: Steps that are done.
        device: CPU, GPU or Ascend.
        devices: How many.
        precision: Of the matrix products.

    Raises:
        UserError: The disk does not take it.
    """
    path = output / ENVIRONMENT
    session = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": step,
        "localmim": localmim.__version__,
        **{name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "device": device,
        "devices": devices,
        "precision": precision,
        "command": " ".join(sys.argv),
    }
    replace_text(path, json.dumps([*read_sessions(path), session], indent=1) + "\n")


def read_sessions(path: Path) -> list[dict]:
    """The sessions in a file, oldest first; none where it is missing or damaged."""
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [s for s in sessions if isinstance(s, dict)] if isinstance(sessions, list) else []


def version(package: str) -> str:
    """Of a package that is installed, as a distribution or by other means."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

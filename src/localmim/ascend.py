"""Ascend devices: the libraries of CANN that MindSpore's plugin needs, and the device files of the driver.

CANN brings its own script for the environment, which the user sources; nothing is set here. Standard library only.
"""

from __future__ import annotations

import os
from pathlib import Path

from localmim import machine

INSTALL_DOC = "https://www.mindspore.cn/install/en"
SONAMES = ("libascendcl.so", "libge_runner.so", "libgraph.so")
VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
ROOTS = (
    Path("/usr/local/Ascend"),
    Path(os.path.expanduser("~/Ascend")),
)  # where CANN's installer puts it: for root, for a user


def machine_devices() -> int:
    """The number of Ascend devices in this machine."""
    return machine.device_files("davinci[0-9]*")


def device_count() -> int:
    """The number of Ascend devices that a job may use here: those that ASCEND_RT_VISIBLE_DEVICES leaves visible."""
    return machine.visible(machine_devices(), VISIBLE)


def driver_problems() -> list[str]:
    """What is missing of driver and devices, each with the step that brings it; empty: nothing."""
    total = machine_devices()
    if total == 0:
        return [
            f"/dev/davinci0 is missing; it is made by the Ascend driver: install driver and firmware ({INSTALL_DOC})"
        ]
    return [] if device_count() else [machine.hidden(total, VISIBLE, "Ascend device")]


def library_problems() -> list[str]:
    """The libraries of CANN that the loader does not find, with the step that brings them; empty: none."""
    names = [soname for soname in SONAMES if machine.find_loadable(soname) is None]
    if not names:
        return []
    script = find_set_env()
    step = f"source {script}" if script else f"install CANN ({INSTALL_DOC}), then source its set_env.sh"
    return [f"{', '.join(names)} of CANN {'is' if len(names) == 1 else 'are'} missing: {step}"]


def find_set_env() -> Path | None:
    """CANN's script that sets its environment, where CANN is installed."""
    home = os.environ.get("ASCEND_HOME_PATH")
    folders = [Path(home), Path(home).parent] if home else []
    folders += [root / name for root in ROOTS for name in ("ascend-toolkit", "cann")]
    return next((folder / "set_env.sh" for folder in folders if (folder / "set_env.sh").is_file()), None)


def environment() -> dict[str, str]:
    """Nothing: sourcing CANN's set_env.sh has set everything."""
    return {}

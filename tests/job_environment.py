"""The environment of the jobs that tests start: no job around them shows, and their processes meet soon."""

from __future__ import annotations

import os
import sys

STRAYS = ("MS_", "DEVICE_NUM", "NNODES", "NODE_RANK", "MASTER_")
MEETING = {"MS_RETRY_INTERVAL_LOWER": "1", "MS_RETRY_INTERVAL_UPPER": "1"}  # seconds; MindSpore waits 3 to 5 else


def job_environment(**variables: str) -> dict[str, str]:
    """This process's variables for a launcher of scripts/ or `python -m localmim.launch`, and `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(STRAYS)}
    return {**kept, **MEETING, "PYTHON": sys.executable, **variables}

"""Masked image modelling for MindSpore, with LocalMIM first."""

import os
import sys

if sys.argv[:1] == ["-m"]:  # run as `python -m localmim.…`: MindSpore's own log shows errors only
    os.environ.setdefault("GLOG_v", "3")

from localmim.mim import localmim as _localmim  # noqa: F401  (registers its models)
from localmim.models import classifier as _classifier  # noqa: F401  (registers its models)
from localmim.models.registry import create_model, list_models

__version__ = "0.1.0"
__all__ = ["create_model", "list_models"]

"""Masked image modelling for MindSpore, with LocalMIM first."""

import os
import sys

__version__ = "0.1.0"
__all__ = ["create_model", "list_models"]

_module = ""  # `python -m localmim.…`: which, while Python looks it up
if sys.argv[:1] == ["-m"]:
    os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log shows errors only
    _module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""

if _module not in ("localmim.launch", "localmim.doctor"):  # these two do without MindSpore: it may not be usable yet
    from localmim.mim import methods as _methods  # noqa: F401  (registers their models)
    from localmim.models import classifier as _classifier  # noqa: F401  (registers its models)
    from localmim.models.registry import create_model, list_models

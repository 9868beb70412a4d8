"""Masked image modelling for MindSpore, with LocalMIM first."""

from localmim.mim import localmim as _localmim  # noqa: F401  (registers its models)
from localmim.models.registry import create_model, list_models

__version__ = "0.1.0"
__all__ = ["create_model", "list_models"]

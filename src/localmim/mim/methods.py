"""Every method of the project: importing this module registers their models."""

from localmim.mim import lomar, mae
from localmim.mim import localmim as localmim_presets

__all__ = ["localmim_presets", "lomar", "mae"]

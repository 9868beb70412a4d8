"""Every method of the project: importing this module registers their models."""

from localmim.mim import beit, convmae, greenmim, lomar, mae, maskfeat, simmim
from localmim.mim import localmim as localmim_presets

__all__ = ["beit", "convmae", "greenmim", "localmim_presets", "lomar", "mae", "maskfeat", "simmim"]

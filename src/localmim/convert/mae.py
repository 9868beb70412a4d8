"""Names of MAE's pre-training, whose decoder the authors of GreenMIM and ConvMAE have kept; and of LoMaR's.

Layouts are identical. LoMaR's models hold fixed position codes that nothing reads: they are left out when read, and
written anew.
"""

from __future__ import annotations

import re

import numpy as np

from localmim.convert.names import renamed, spelled
from localmim.models.layers import sincos_position_code

_UNUSED = "pos_embed"  # of LoMaR


def decoder_name(name: str) -> str:
    """The authors' name of a parameter of the one decoder or head; other names stay."""
    name = re.sub(r"^decoders\.0\.(embed|pos_embed|blocks|norm|pred)\b", r"decoder_\1", name)
    return re.sub(r"^decoders\.0\.mask_token$", "mask_token", name)


def torch_name(name: str) -> str:
    """The authors' name of one of our MAE parameters."""
    return decoder_name(re.sub(r"^encoder\.", "", re.sub(r"^encoder\.tap_norms\.0\.", "norm.", spelled(name))))


def from_torch(arrays: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """MAE's state dict under our names; what has no counterpart keeps its own name."""
    theirs = {torch_name(n): n for n in names}
    return renamed(arrays, lambda name: theirs.get(name, name))


def to_torch(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our MAE parameters under the authors' names; the inverse of `from_torch`."""
    return {torch_name(n): a for n, a in arrays.items()}


def lomar_torch_name(name: str) -> str:
    """The authors' name of one of our LoMaR parameters."""
    name = re.sub(r"^decoders\.0\.pred\.", "encoder_pred.", spelled(name))
    name = re.sub(r"\.attn\.relative\.table$", ".attn.rpe_k.lookup_table_weight", name)
    return re.sub(r"^encoder\.", "", re.sub(r"^encoder\.tap_norms\.0\.", "norm.", name))


def lomar_from_torch(arrays: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """LoMaR's state dict under our names; what has no counterpart keeps its own name."""
    theirs = {lomar_torch_name(n): n for n in names}
    return renamed({n: a for n, a in arrays.items() if n != _UNUSED}, lambda name: theirs.get(name, name))


def lomar_to_torch(arrays: dict[str, np.ndarray], grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """Our LoMaR parameters under the authors' names; the inverse of `lomar_from_torch`.

    Args:
        grid: Patches (h, w) of the images, which the unused position codes follow.
    """
    theirs = {lomar_torch_name(n): a for n, a in arrays.items()}
    dim = theirs["cls_token"].shape[-1]
    code = sincos_position_code(dim, grid)
    theirs[_UNUSED] = np.concatenate([np.zeros((1, dim), np.float32), code])[None]  # [1, 1+L, D]
    return theirs

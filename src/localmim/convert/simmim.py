"""Names of SimMIM's pre-training. Its head is a 1x1 convolution there, a Linear here: [out, in, 1, 1] for [out, in]."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from localmim.convert.greenmim import swin_buffers
from localmim.convert.names import renamed, spelled, without_buffers
from localmim.models.swin import Stage

_HEAD = "decoder.0.weight"


def torch_name(name: str) -> str:
    """The authors' name of one of our SimMIM parameters on a Swin."""
    name = re.sub(r"^encoder\.tap_norms\.0\.", "encoder.norm.", spelled(name))
    return re.sub(r"^decoders\.0\.pred\.", "decoder.0.", name)


def from_torch(arrays: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """SimMIM's state dict of a Swin under our names; what has no counterpart keeps its own name."""
    theirs = {torch_name(n): n for n in names}
    arrays = {n: a.reshape(a.shape[:2]) if n == _HEAD else a for n, a in without_buffers(arrays).items()}
    return renamed(arrays, lambda name: theirs.get(name, name))


def to_torch(arrays: dict[str, np.ndarray], stages: Sequence[Stage] = ()) -> dict[str, np.ndarray]:
    """Our SimMIM parameters of a Swin under the authors' names; the inverse of `from_torch`.

    Args:
        stages: The encoder's `stages`: where shifted windows lie, which its mask buffers tell.
    """
    theirs = {torch_name(n): a for n, a in arrays.items()}
    theirs[_HEAD] = theirs[_HEAD].reshape(*theirs[_HEAD].shape, 1, 1)
    return {**theirs, **swin_buffers(arrays, stages)}

"""Names of GreenMIM's pre-training: the official Swin's encoder, MAE's decoder. Layouts are identical."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from localmim.convert.mae import decoder_name
from localmim.convert.names import classifier_to_torch, is_constant, renamed, spelled, without_buffers
from localmim.models.swin import Stage


def torch_name(name: str) -> str:
    """The authors' name of one of our GreenMIM parameters."""
    return decoder_name(re.sub(r"^encoder\.tap_norms\.0\.", "encoder.norm.", spelled(name)))


def from_torch(arrays: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """GreenMIM's state dict under our names; what has no counterpart keeps its own name."""
    theirs = {torch_name(n): n for n in names}
    return renamed(without_buffers(arrays), lambda name: theirs.get(name, name))


def to_torch(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our GreenMIM parameters under the authors' names, with their index buffers; the inverse of `from_torch`."""
    return {**{torch_name(n): a for n, a in arrays.items()}, **swin_buffers(arrays)}


def swin_buffers(arrays: dict[str, np.ndarray], stages: Sequence[Stage] = ()) -> dict[str, np.ndarray]:
    """What the official Swin stores beside the parameters of our encoder: index buffers, and masks of shifted windows.

    Args:
        arrays: Our parameters, of which those of `encoder.` count.
        stages: The encoder's `stages`, for the masks; none: without masks.
    """
    encoder = {n: a for n, a in arrays.items() if n.startswith("encoder.")}
    theirs = classifier_to_torch(encoder, "mean", stages)
    return {f"encoder.{n}": a for n, a in theirs.items() if is_constant(n)}

"""Names of ConvMAE's and FastConvMAE's pre-training, and of their encoder by itself; layouts are identical.

Both have the same names. EasyCV's FastConvMAE says in front of each whether it is of the encoder or of the decoder.
Fine-tuning models have the names of `classifier_from_torch` (convert/names.py), ConvViT's among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from localmim.convert.mae import decoder_name
from localmim.convert.names import renamed, spelled

_INDEX = re.compile(
    r"(^|\.)relative_position_index$"
)  # a buffer of the detection backbone, which follows from the sizes


def torch_name(name: str, easycv: bool = False) -> str:
    """The authors' name of one of our parameters of pre-training.

    Args:
        easycv: As EasyCV spells it.
    """
    side = "decoder." if name.startswith("decoders.") else "encoder."
    name = decoder_name(encoder_torch_name(name.removeprefix("encoder.")))
    return side + name if easycv else name


def encoder_torch_name(name: str) -> str:
    """The authors' name of a parameter of a ConvViT, without `encoder.`."""
    name = re.sub(r"^tap_norms\.0\.norm\.", "norm.", spelled(name))
    return re.sub(r"^tap_norms\.0\.(stage\d)\.", r"\1_output_decode.", name)


def is_easycv(arrays: Iterable[str]) -> bool:
    """Whether these names are EasyCV's."""
    return any(n.startswith("encoder.patch_embed1.") for n in arrays)


def from_torch(arrays: Mapping[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """A pre-training state dict of the authors or of EasyCV under our names; what has no counterpart keeps its own."""
    easycv = is_easycv(arrays)
    theirs = {torch_name(n, easycv): n for n in names}
    return renamed(arrays, lambda name: theirs.get(name, name))


def to_torch(arrays: Mapping[str, np.ndarray], easycv: bool = False) -> dict[str, np.ndarray]:
    """Our parameters of pre-training under the authors' names; the inverse of `from_torch`."""
    return {torch_name(n, easycv): a for n, a in arrays.items()}


def encoder_from_torch(arrays: Mapping[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """A ConvViT by itself, for example the detection backbone, under our names."""
    theirs = {encoder_torch_name(n): n for n in names}
    return renamed({n: a for n, a in arrays.items() if not _INDEX.search(n)}, lambda name: theirs.get(name, name))


def encoder_to_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A ConvViT by itself under the authors' names."""
    return {encoder_torch_name(n): a for n, a in arrays.items()}

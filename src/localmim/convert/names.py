"""One place where the authors' PyTorch names and ours meet.

LayerNorm's weight and bias are gamma and beta here; the encoder, the taps' norms, the decoders and the HOG bias have a
prefix that says which part of the method they are. Layouts are identical. The fixed Sobel kernel of `hog_enc` and the
index buffers of window attention have no counterpart; the HOG biases, one tensor a scale there, are one array
[scales, 2] here.
"""

from __future__ import annotations

import math
import re

import numpy as np

from localmim.errors import UserError
from localmim.models.windows import whole_windows

_HEADS = {
    4.0: {"up1": "0", "norm": "1", "up2": "3", "out": "4"},
    2.0: {"up": "0", "out": "1"},
    1.0: {"out": "0"},
    0.5: {"out": "1"},
}
_HOG_BIAS = "target.hog.bias"
_SOBEL = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float32)


def is_pyramid(names) -> bool:
    """Whether these are the parameter names of a Swin, not of a ViT."""
    return any(n.startswith("encoder.layers.") for n in names)


def torch_name(name: str, scales: list[float], pyramid: bool = False) -> str:
    """The authors' name of one of our LocalMIM parameters.

    Args:
        scales: The decoders' in order.
        pyramid: Whether the encoder is a Swin: the authors' code of it keeps a prefix that their ViT does not have.
    """
    head = re.match(r"decoders\.(\d+)\.pred\.(\w+)\.", name)
    if head:
        k = int(head[1])
        name = name.replace(f"pred.{head[2]}.", f"pred.{_HEADS[scales[k]][head[2]]}.")
    name = re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name))
    name = re.sub(r"^encoder\.patch_embed\.", "encoder.patch_embed.proj.", name)
    name = re.sub(r"^encoder\.patch_norm\.", "encoder.patch_embed.norm.", name)
    name = re.sub(r"^encoder\.tap_norms\.", "encoder.norm.", name)
    name = name if pyramid else re.sub(r"^encoder\.", "", name)
    return re.sub(r"^decoders\.", "decoder.", name)


def from_torch(arrays: dict[str, np.ndarray], names: list[str], scales: list[float]) -> dict[str, np.ndarray]:
    """The authors' LocalMIM state dict under our names.

    Args:
        arrays: Their names to arrays.
        names: Our parameter names, of the model that will take them.
        scales: The decoders' scales in order.

    Returns:
        Our names to arrays; what has no counterpart keeps its own name, so that a strict load names it.

    Raises:
        UserError: `hog_enc` does not hold the Sobel kernel.
    """
    pyramid = is_pyramid(names)
    theirs = {torch_name(n, scales, pyramid): n for n in names if n != _HOG_BIAS}
    ours, biases = {}, {}
    for name, array in arrays.items():
        if pyramid and name.endswith(".relative_position_index"):
            continue
        hog = re.fullmatch(r"hog_enc\.(\d+)\.conv\.(weight|bias)", name)
        if hog is None:
            ours[theirs.get(name, name)] = array
        elif hog[2] == "bias":
            biases[int(hog[1])] = array
        elif array.shape != (2, 1, 3, 3) or not np.array_equal(array[:, 0], np.stack([_SOBEL, _SOBEL.T])):
            raise UserError(f"{name} is not the Sobel kernel that the HOG target uses")
    if biases:
        ours[_HOG_BIAS] = np.stack([biases[k] for k in sorted(biases)])
    return ours


def to_torch(arrays: dict[str, np.ndarray], scales: list[float], hog: bool = True) -> dict[str, np.ndarray]:
    """Our LocalMIM parameters under the authors' names; the inverse of `from_torch`.

    Args:
        hog: Whether the target is HOG, whose fixed Sobel kernels the authors store, one a scale.
    """
    pyramid = is_pyramid(arrays)
    theirs = {torch_name(n, scales, pyramid): a for n, a in arrays.items() if n != _HOG_BIAS}
    for name in [n for n in theirs if n.endswith(".relative_position_bias_table")]:
        window = (math.isqrt(len(theirs[name])) + 1) // 2
        index = whole_windows((window, window), window, 0).pairs[0].astype(np.int64)
        theirs[name.replace("bias_table", "index")] = index  # [window^2, window^2]
    for k in range(len(scales) if hog else 0):
        theirs[f"hog_enc.{k}.conv.weight"] = np.stack([_SOBEL, _SOBEL.T])[:, None]  # [2, 1, 3, 3]
        if _HOG_BIAS in arrays:
            theirs[f"hog_enc.{k}.conv.bias"] = arrays[_HOG_BIAS][k]
    return theirs

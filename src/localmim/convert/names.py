"""One place where PyTorch's names and ours meet: the authors' pre-training, and classifiers of ViT and Swin.

LayerNorm's weight and bias are gamma and beta here; the encoder, the taps' norms, the decoders and the HOG bias have a
prefix that says which part of the method they are. Layouts are identical. The fixed Sobel kernel of `hog_enc` and the
index and mask buffers of window attention have no counterpart: they are left out when read, and written anew. The HOG
biases, one tensor a scale there, are one array [scales, 2] here.

A classifier has the names of the authors' fine-tuning, which MAE's fine-tuning and timm's ViT share; those of timm's
Swin are turned into them first (`official_names`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from localmim.errors import UserError
from localmim.models.swin import Stage
from localmim.models.windows import whole_windows

_HEADS = {
    4.0: {"up1": "0", "norm": "1", "up2": "3", "out": "4"},
    2.0: {"up": "0", "out": "1"},
    1.0: {"out": "0"},
    0.5: {"out": "1"},
}
_HOG_BIAS = "target.hog.bias"
_BUFFER = re.compile(r"blocks\.\d+\.(attn\.relative_position_index|attn_mask)$")
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
    name = re.sub(r"^encoder\.tap_norms\.", "encoder.norm.", spelled(name))
    name = name if pyramid else name.removeprefix("encoder.")
    return re.sub(r"^decoders\.", "decoder.", name)


def classifier_torch_name(name: str, pool: str, pyramid: bool = False) -> str:
    """The authors' name of one of our classifier's parameters: a ViT's norm after the mean is `fc_norm`."""
    name = spelled(name).removeprefix("encoder.")
    name = re.sub(r"\.attn\.relative\.table$", ".attn.rpe_k.lookup_table_weight", name)
    return re.sub(r"^norm\.", "fc_norm.", name) if pool == "mean" and not pyramid else name


def spelled(name: str) -> str:
    """What PyTorch calls the layers."""
    name = re.sub(r"\bgamma$", "weight", re.sub(r"\bbeta$", "bias", name))
    name = re.sub(r"^encoder\.patch_embed\.", "encoder.patch_embed.proj.", name)
    return re.sub(r"^encoder\.patch_norm\.", "encoder.patch_embed.norm.", name)


def official_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """timm's newer names of a Swin in the official spelling; other names stay.

    There a merging opens a stage (`layers.1.downsample`) instead of closing the one before, and the head is `head.fc`.
    """
    if not any(n.startswith("layers.0.blocks.") for n in arrays):
        return arrays
    last = max(int(m[1]) for n in arrays if (m := re.match(r"layers\.(\d+)\.", n)))
    opening = last > 0 and f"layers.{last}.downsample.reduction.weight" in arrays

    def official(name: str) -> str:
        merging = re.match(r"layers\.(\d+)\.downsample\.(.*)", name)
        if merging and opening:
            return f"layers.{int(merging[1]) - 1}.downsample.{merging[2]}"
        return re.sub(r"^head\.fc\.", "head.", name)

    return renamed(arrays, official)


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
    rest, biases = {}, {}
    for name, array in (without_buffers(arrays) if pyramid else arrays).items():
        hog = re.fullmatch(r"hog_enc\.(\d+)\.conv\.(weight|bias)", name)
        if hog is None:
            rest[name] = array
        elif hog[2] == "bias":
            biases[int(hog[1])] = array
        elif array.shape != (2, 1, 3, 3) or not np.array_equal(array[:, 0], np.stack([_SOBEL, _SOBEL.T])):
            raise UserError(f"{name} is not the Sobel kernel that the HOG target uses")
    ours = renamed(rest, lambda name: theirs.get(name, name))
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
    theirs.update(_index_buffers(theirs))
    for k in range(len(scales) if hog else 0):
        theirs[f"hog_enc.{k}.conv.weight"] = np.stack([_SOBEL, _SOBEL.T])[:, None]  # [2, 1, 3, 3]
        if _HOG_BIAS in arrays:
            theirs[f"hog_enc.{k}.conv.bias"] = arrays[_HOG_BIAS][k]
    return theirs


def classifier_from_torch(arrays: dict[str, np.ndarray], names: list[str], pool: str) -> dict[str, np.ndarray]:
    """A classifier's or a lone encoder's state dict under our names.

    Args:
        arrays: Names of the authors' fine-tuning, of MAE's, of timm or of the official Swin, to arrays.
        names: Our parameter names, of the Classifier that will take them.
        pool: The Classifier's.

    Returns:
        Our names to arrays; what has no counterpart keeps its own name, so that a strict load names it.
    """
    pyramid = is_pyramid(names)
    theirs = {classifier_torch_name(n, pool, pyramid): n for n in names}
    arrays = without_buffers(official_names(arrays)) if pyramid else arrays
    return renamed(arrays, lambda name: theirs.get(name, name))


def classifier_to_torch(
    arrays: dict[str, np.ndarray], pool: str, stages: Sequence[Stage] = ()
) -> dict[str, np.ndarray]:
    """Our classifier's parameters under the names of the authors' fine-tuning; of an encoder where there is no head.

    Args:
        pool: The Classifier's.
        stages: A Swin encoder's `stages`: where shifted windows lie, which its mask buffers tell.
    """
    pyramid = is_pyramid(arrays)
    theirs = {classifier_torch_name(n, pool, pyramid): a for n, a in arrays.items()}
    theirs.update(_index_buffers(theirs))
    for s, stage in enumerate(stages):
        mask = _window_mask(stage) if len(stage.shifts) > 1 else None
        blocks = {m[1] for n in theirs if (m := re.match(rf"layers\.{s}\.blocks\.(\d+)\.", n))}
        for j in blocks:
            if mask is not None and int(j) % 2:
                theirs[f"layers.{s}.blocks.{j}.attn_mask"] = mask
    return theirs


def renamed(arrays: dict[str, np.ndarray], rename: Callable[[str], str]) -> dict[str, np.ndarray]:
    """The same arrays under other names, each of which must come from one."""
    renamed: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if rename(name) in renamed:
            raise UserError(f"two tensors are {rename(name)}, one of them named {name}")
        renamed[rename(name)] = array
    return renamed


def is_constant(name: str) -> bool:
    """Whether PyTorch's name is of an index or mask buffer or a Sobel kernel, which have no counterpart here."""
    return _BUFFER.search(name) is not None or re.fullmatch(r"hog_enc\.\d+\.conv\.weight", name) is not None


def without_prefix(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Names that begin with the prefix lose it; others stay."""
    return renamed(arrays, lambda name: name.removeprefix(prefix))


def without_buffers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the buffers of window attention, which follow from the sizes."""
    return {name: array for name, array in arrays.items() if not _BUFFER.search(name)}


def check_buffers(arrays: dict[str, np.ndarray]) -> None:
    """UserError when an index buffer is not what it must be: then the rows of its bias table mean something else."""
    for name, array in arrays.items():
        if not name.endswith(".relative_position_index"):
            continue
        if array.ndim != 2 or not np.array_equal(array, _index_buffer(math.isqrt(len(array)))):
            raise UserError(f"{name} is not the official order of relative positions")


def _index_buffers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The index buffer that stands beside each bias table."""
    return {
        n.replace("bias_table", "index"): _index_buffer((math.isqrt(len(a)) + 1) // 2)
        for n, a in arrays.items()
        if n.endswith(".relative_position_bias_table")
    }


def _index_buffer(window: int) -> np.ndarray:
    """Row of the bias table for each pair of tokens of a window: int64 [window^2, window^2]."""
    return whole_windows((window, window), window, 0).pairs[0].astype(np.int64)


def _window_mask(stage: Stage) -> np.ndarray:
    """What shifted windows add to scores, 0 or -100 where tokens lie in different ones: float32 [windows, w^2, w^2]."""
    pairs = whole_windows(stage.grid, stage.window, stage.shifts[1]).pairs
    return np.where(pairs == (2 * stage.window - 1) ** 2, np.float32(-100), np.float32(0))

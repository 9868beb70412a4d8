"""Names of ViTs that were pre-trained with mask tokens: MaskFeat's, BEiT's and SimMIM's, and of BEiT's classifiers.

BEiT's queries and values have a bias each and its keys none; here it is one bias whose key part is 0 when read and left
out when written: it cannot change a softmax. SimMIM's head is a 1x1 convolution. Index buffers and HOG kernels follow
from the sizes: they are compared when read, and written anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from localmim.convert.names import renamed, spelled
from localmim.errors import UserError
from localmim.mim.hog import gaussian
from localmim.models.relative import offset_classes

_SOBEL = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float32)
_INDEX = "relative_position_index"
_WINDOW = 16  # pixels a side of mmpretrain's Gaussian
_OPENMMLAB = (
    (r"\bpatch_embed\.proj\.", "patch_embed.projection."),
    (r"\bblocks\.", "layers."),
    (r"\.norm([12])\.", r".ln\1."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
)


@dataclass(frozen=True)
class Spelling:
    """How the authors of a model name its parts.

    Attributes:
        encoder: What the encoder's names begin with.
        norm, head: The layers above the blocks.
        openmmlab: Whether the layers of blocks have OpenMMLab's names.
        apart: Whether queries and values have a bias each.
        convolution: Whether the head is a 1x1 convolution.
        hog: What the names of the HOG kernels begin with; empty where there are none.
    """

    encoder: str
    norm: str
    head: str
    openmmlab: bool = False
    apart: bool = True
    convolution: bool = False
    hog: str = ""


SPELLINGS = {
    "maskfeat_slowfast": Spelling(
        "", "pred_head.transforms.0.0", "pred_head.projections.0", apart=False, hog="hogs.0."
    ),
    "maskfeat_mmpretrain": Spelling(
        "backbone.", "backbone.ln1", "neck.fc", openmmlab=True, apart=False, hog="target_generator."
    ),
    "beit_mmpretrain": Spelling("backbone.", "backbone.ln1", "head.cls_head", openmmlab=True),
    "beit_unilm": Spelling("", "norm", "lm_head"),
    "simmim_vit": Spelling("encoder.", "encoder.norm", "decoder.0", convolution=True),
}


def classifier_spelling(pool: str) -> Spelling:
    """Names of BEiT's fine-tuning, which SimMIM's ViT and timm share, for a Classifier that pools so."""
    return Spelling("", "fc_norm" if pool == "mean" else "norm", "head")


def spelling_of(names: Iterable[str]) -> str | None:
    """The key of SPELLINGS that fits the names of a state dict; None: no such pre-training."""
    names = set(names)
    for key, s in SPELLINGS.items():
        blocks = f"{s.encoder}{'layers' if s.openmmlab else 'blocks'}.0."
        if {f"{s.head}.weight", f"{s.norm}.weight", f"{s.encoder}mask_token"} <= names and any(
            n.startswith(blocks) for n in names
        ):
            return key
    return None


def torch_name(name: str, spelling: Spelling) -> str:
    """The authors' name of one of our parameters; of a bias that they store in parts, the one that it would have."""
    name = re.sub(r"^encoder\.relative\.table$", "encoder.rel_pos_bias.relative_position_bias_table", spelled(name))
    name = re.sub(r"\.attn\.relative\.table$", ".attn.relative_position_bias_table", name)
    name = re.sub(r"^(decoders\.0\.pred|head)\.", f"{spelling.head}.", name)
    above = re.match(r"(encoder\.tap_norms\.0|norm)\.", name)
    if above:
        return f"{spelling.norm}.{name[above.end() :]}"
    if name.startswith("encoder."):
        name = spelling.encoder + name.removeprefix("encoder.")
        for ours, theirs in _OPENMMLAB if spelling.openmmlab else ():
            name = re.sub(ours, theirs, name)
    return name


def from_torch(
    arrays: dict[str, np.ndarray], names: list[str], spelling: Spelling, grid: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The authors' state dict under our names.

    Args:
        arrays: Their names to arrays.
        names: Our parameter names, of the model that will take them.
        grid: Patches (h, w) of the images.

    Returns:
        Our names to arrays; what has no counterpart keeps its own name, so that a strict load names it.

    Raises:
        UserError: An index buffer or a HOG kernel is not what it must be.
    """
    theirs = {torch_name(n, spelling): n for n in names}
    rest = {}
    for name, array in arrays.items():
        if is_constant(name, spelling):
            _check_constant(name, array, spelling, grid)
        elif spelling.apart and name.endswith(".attn.q_bias"):
            value = arrays.get(name.replace("q_bias", "v_bias"), np.zeros(0, array.dtype))
            rest[name.replace("q_bias", "qkv.bias")] = np.concatenate([array, np.zeros_like(array), value])
        elif not (spelling.apart and name.endswith(".attn.v_bias")):
            rest[name] = array
    ours = renamed(rest, lambda name: theirs.get(name, name))
    head = "decoders.0.pred.weight"
    if spelling.convolution and head in ours and ours[head].shape[2:] == (1, 1):
        ours[head] = ours[head][:, :, 0, 0]
    return ours


def to_torch(
    arrays: dict[str, np.ndarray], spelling: Spelling, grid: tuple[int, int], hog: bool = True
) -> dict[str, np.ndarray]:
    """Our parameters under the authors' names, with their constants; the inverse of `from_torch`.

    Args:
        grid: Patches (h, w) of the images.
        hog: Whether the target is HOG, whose kernels MaskFeat's code stores.
    """
    theirs = parameters_to_torch(arrays, spelling)
    tables = [n for n in theirs if n.endswith("relative_position_bias_table")]
    theirs.update({n.replace("bias_table", "index"): offset_classes(grid).astype(np.int64) for n in tables})
    if spelling.hog and hog:
        chans = arrays["encoder.patch_embed.weight"].shape[1]
        theirs.update(_hog_constants(spelling, chans))
    return theirs


def parameters_to_torch(arrays: dict[str, np.ndarray], spelling: Spelling) -> dict[str, np.ndarray]:
    """Our parameters, or their gradients, under the authors' names."""
    theirs = {}
    for name, array in arrays.items():
        name = torch_name(name, spelling)
        if spelling.apart and name.endswith(".attn.qkv.bias"):
            query, _, value = np.split(array, 3)
            theirs[name.replace("qkv.bias", "q_bias")], theirs[name.replace("qkv.bias", "v_bias")] = query, value
        elif spelling.convolution and name == f"{spelling.head}.weight":
            theirs[name] = array[:, :, None, None]
        else:
            theirs[name] = array
    return theirs


def is_constant(name: str, spelling: Spelling) -> bool:
    """Whether the authors' name is of an index buffer or a HOG kernel, which have no counterpart here."""
    return name.endswith(_INDEX) or name in _hog_constants(spelling, 1)


def _hog_constants(spelling: Spelling, chans: int) -> dict[str, np.ndarray]:
    """The kernels of HOG under the authors' names."""
    if not spelling.hog:
        return {}
    kernels = {f"{spelling.hog}weight_x": _SOBEL, f"{spelling.hog}weight_y": _SOBEL.T}
    constants = {name: np.tile(kernel, (chans, 1, 1, 1)) for name, kernel in kernels.items()}  # [C, 1, 3, 3]
    if spelling.openmmlab:
        constants[f"{spelling.hog}gaussian_kernel"] = gaussian(_WINDOW)
    return constants


def _check_constant(name: str, array: np.ndarray, spelling: Spelling, grid: tuple[int, int]) -> None:
    """UserError when a constant is not what it must be: then the weights mean something else."""
    what, expected = f"the order of relative positions on a {grid[0]}x{grid[1]} grid", offset_classes(grid)
    if not name.endswith(_INDEX):
        what, expected = "HOG's", _hog_constants(spelling, len(array))[name]
    if array.shape != expected.shape or not np.allclose(array, expected, rtol=0, atol=1e-6):
        raise UserError(f"{name} is not {what}")

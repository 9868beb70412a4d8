"""Blocks that the compiler takes for one and the same are the same but for their weights.

`lazy_inline` compiles cells of one class and equal arguments of `__init__` once for all of them, whatever was changed
in them since: a constant that differs would be that of the first one, without a word.
"""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from localmim.models.layers import Block, set_compute_dtype
from localmim.models.registry import create_model

VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2}
SWIN = {"image_size": 64, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2}
CONV = {"embed_dims": [8, 8, 16], "depths": [2, 2, 2], "num_heads": 2}
DECODER = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
MODELS = (
    ("localmim_vit_base_patch16_224", {**VIT, "depth": 7, "decoder_dim": 16, "decoder_heads": 2}),
    ("localmim_swin_base_patch4_window7_224", {**SWIN, "decoder_dim": 16, "decoder_heads": 2}),
    ("mae_vit_base_patch16_224", {**VIT, "depth": 2, **DECODER}),
    ("beit_vit_base_patch16_224", {**VIT, "depth": 2}),
    ("lomar_vit_base_patch16_224", {**VIT, "depth": 2, "window": 3, "views": 1}),
    ("convmae_convvit_base_patch16_224", {**CONV, **DECODER}),
    ("vit_base_patch16_224", {**VIT, "depth": 2, "num_classes": 3}),
    ("swin_base_patch4_window7_224", {**SWIN, "num_classes": 3}),
    ("beit_base_patch16_224", {**VIT, "depth": 2}),
)
PLAIN = set(vars(nn.Cell()))  # what every cell has, which names and numbers it


def described(value) -> object:
    """A value as the compiler would see it; parameters by what is not trained in them."""
    if isinstance(value, ms.Parameter):
        return "parameter", value.shape, str(value.dtype)
    if isinstance(value, nn.Cell):
        parts = {**value._params, **value._cells}
        own = {k: v for k, v in vars(value).items() if k not in PLAIN and k not in parts and k != "cell_init_args"}
        return type(value).__qualname__, {k: described(v) for k, v in {**own, **parts}.items()}
    if isinstance(value, (ms.Tensor, np.ndarray)):
        array = value.asnumpy() if isinstance(value, ms.Tensor) else value
        return str(array.dtype), array.shape, array.tobytes()
    if isinstance(value, (list, tuple)):
        return [described(v) for v in value]
    if isinstance(value, ms.ops.Primitive):
        return type(value).__qualname__, {k: str(v) for k, v in value.attrs.items()}
    if isinstance(value, (bool, int, float, str, type(None))) or value in (ms.float32, ms.float16):
        return str(value)
    return type(value).__qualname__, {k: described(v) for k, v in getattr(value, "__dict__", {}).items()}


def groups(model: nn.Cell) -> dict[str, list]:
    """Descriptions of the cells that are compiled once, by what they are known by."""
    found: dict[str, list] = {}
    for _, cell in model.cells_and_names():
        if hasattr(cell, "cell_init_args"):
            found.setdefault(cell.cell_init_args, []).append(described(cell))
    return found


@pytest.mark.parametrize(("name", "options"), MODELS, ids=[name for name, _ in MODELS])
def test_what_is_compiled_once_is_alike(name, options):
    """In every kind of model, as it is trained in float16."""
    shared = groups(set_compute_dtype(create_model(name, **options), ms.float16))
    assert max(map(len, shared.values())) > 1
    for alike in shared.values():
        assert all(one == alike[0] for one in alike)


def test_a_difference_would_be_seen():
    """A constant changed after `__init__` in one of two blocks."""
    blocks = nn.CellList([Block(8, 2), Block(8, 2)])
    (alike,) = groups(blocks).values()
    assert alike[0] == alike[1]
    blocks[1].norm1.normalise.eps = 1e-3
    (alike,) = groups(blocks).values()
    assert alike[0] != alike[1]

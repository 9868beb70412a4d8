"""MaskFeat's, BEiT's and SimMIM's names: there and back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

import localmim
from localmim.convert.load import load_weights, weights_of
from localmim.convert.mask_token_names import SPELLINGS, classifier_spelling, from_torch, spelling_of, to_torch
from localmim.errors import UserError
from localmim.mim.beit import beit_vit
from localmim.mim.maskfeat import maskfeat_vit
from localmim.mim.simmim import simmim_vit

SIZES = {"image_size": (32, 64), "embed_dim": 8, "depth": 2, "num_heads": 2}
PRESETS = {
    "maskfeat_slowfast": lambda: maskfeat_vit(**SIZES),
    "maskfeat_mmpretrain": lambda: maskfeat_vit(**SIZES),
    "beit_mmpretrain": lambda: beit_vit(**SIZES),
    "beit_unilm": lambda: beit_vit(**SIZES),
    "simmim_vit": lambda: simmim_vit(**SIZES),
}


@pytest.mark.parametrize("key", SPELLINGS)
def test_there_and_back(key):
    """Their state dict is recognised, and loads strictly into another model with other weights."""
    model, other, spelling = PRESETS[key](), PRESETS[key](), SPELLINGS[key]
    grid, ours = model.encoder.grid, weights_of(model)
    theirs = to_torch(ours, spelling, grid)
    assert spelling_of(theirs) == key and spelling_of(list(theirs)[:5]) is None
    assert not any(n.startswith(("decoders.", "target.")) or "gamma" in n.split(".") for n in theirs)
    load_weights(other, from_torch(theirs, list(ours), spelling, grid))
    for name, array in weights_of(other).items():
        np.testing.assert_array_equal(array, ours[name])


def test_biases_of_queries_and_values():
    """Joined with a key part of 0 when read; that part, which changes nothing, is left out when written."""
    spelling, name = SPELLINGS["beit_unilm"], "encoder.blocks.1.attn.qkv.bias"
    ours = weights_of(beit_vit(**SIZES))
    ours[name] = np.arange(24, dtype=np.float32)
    theirs = to_torch(ours, spelling, (2, 4))
    np.testing.assert_array_equal(theirs["blocks.1.attn.q_bias"], np.arange(8))
    np.testing.assert_array_equal(theirs["blocks.1.attn.v_bias"], np.arange(16, 24))
    joined = from_torch(theirs, list(ours), spelling, (2, 4))[name]
    np.testing.assert_array_equal(joined, [*range(8), *[0] * 8, *range(16, 24)])


def test_classifiers_of_beit():
    """A table and its index a block, the norm after the mean is fc_norm; another grid's index is refused."""
    model, spelling = (
        localmim.create_model("beit_tiny_patch16_224", **SIZES, num_classes=3),
        classifier_spelling("mean"),
    )
    ours = weights_of(model)
    theirs = to_torch(ours, spelling, (2, 4))
    own = {
        f"blocks.1.attn.{n}" for n in ("relative_position_bias_table", "relative_position_index", "q_bias", "v_bias")
    }
    assert own | {"fc_norm.weight", "head.bias", "cls_token", "blocks.0.gamma_2"} <= theirs.keys()
    assert spelling_of(theirs) is None
    back = from_torch(theirs, list(ours), spelling, (2, 4))
    assert back.keys() == ours.keys() and all(np.array_equal(back[n], ours[n]) for n in ours)
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.relative_position_index is not the order"):
        from_torch(theirs, list(ours), spelling, (4, 2))


def test_strange_constants_are_refused():
    """Another order of relative positions or another kernel: the weights would mean something else."""
    for key, name in (
        ("beit_unilm", "rel_pos_bias.relative_position_index"),
        ("maskfeat_slowfast", "hogs.0.weight_x"),
        ("maskfeat_mmpretrain", "target_generator.gaussian_kernel"),
    ):
        spelling, ours = SPELLINGS[key], weights_of(PRESETS[key]())
        theirs = to_torch(ours, spelling, (2, 4))
        theirs[name] = np.flip(theirs[name]) + 1
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            from_torch(theirs, list(ours), spelling, (2, 4))
    assert not any(n.startswith("hogs.") for n in to_torch(ours, SPELLINGS["maskfeat_slowfast"], (2, 4), hog=False))

"""Weight decay in pre-training: what decays is what decays in the authors' code, for all five published models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import localmim
from localmim.convert.names import torch_name
from localmim.training.optimizer import pretraining_groups

GOLDEN = Path(__file__).parents[1] / "golden"
VIT = {"image_size": 32, "embed_dim": 16, "num_heads": 2, "decoder_dim": 8, "decoder_heads": 2}
SWIN = {"embed_dim": 4, "num_heads": (1, 2, 2, 4), "decoder_dim": 8, "decoder_heads": 2}


@pytest.mark.parametrize(
    ("file", "name", "kwargs"),
    [
        ("vit_base", "localmim_vit_base_patch16_224", VIT),
        ("vit_large", "localmim_vit_large_patch16_224", {**VIT, "hog_bias": True}),
        ("swin_base_hog", "localmim_swin_base_patch4_window7_224", {**SWIN, "hog_bias": True}),
        ("swin_base_pixel", "localmim_swin_base_patch4_window7_224", {**SWIN, "target": "pixels"}),
        ("swin_large_hog", "localmim_swin_large_patch4_window14_224", {**SWIN, "hog_bias": True}),
    ],
)
def test_groups_are_the_authors(file, name, kwargs):
    """All names; widths do not matter, so narrow models are built."""
    table = json.loads((GOLDEN / f"localmim_wd_pretrain_{file}.json").read_text())
    model = localmim.create_model(name, **kwargs)
    scales = [d.scale for d in model.decoders]
    trainable = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
    groups = pretraining_groups(trainable, model.encoder.no_decay)
    ours = {torch_name(n, scales, "swin" in name): group.decays for n, group in groups.items()}
    theirs = dict.fromkeys(table["decay"], True) | dict.fromkeys(table["no_decay"], False)
    assert ours == theirs


TINY_VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
TINY_SWIN = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
CONV = {"image_size": 32, "embed_dims": [4, 4, 8], "depths": [1, 1, 1], "num_heads": 2, **DECODER}
TABLE = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"


@pytest.mark.parametrize(
    ("name", "sizes", "decays", "not_these"),
    [
        ("mae_vit", {**TINY_VIT, **DECODER}, ["encoder.cls_token", "decoders.0.mask_token"], []),
        (
            "lomar_vit",
            {**TINY_VIT, "window": 3, "views": 1},
            ["encoder.cls_token", "encoder.mask_token", "encoder.blocks.0.attn.relative.table"],
            [],
        ),
        ("maskfeat_vit", TINY_VIT, ["encoder.cls_token", "encoder.mask_token", "encoder.pos_embed"], []),
        (
            "beit_vit",
            TINY_VIT,
            ["encoder.mask_token", "encoder.relative.table"],
            ["encoder.cls_token", "encoder.blocks.0.gamma_1"],
        ),
        ("simmim_swin", {**TINY_SWIN, "mask_size": 16, "reference_quirks": True}, [TABLE], ["encoder.mask_token"]),
        ("simmim_swin", {**TINY_SWIN, "mask_size": 16}, [], [TABLE, "encoder.mask_token"]),
        ("greenmim_swin", {**TINY_SWIN, **DECODER}, [], [TABLE, "decoders.0.mask_token"]),
        ("convmae_convvit", CONV, ["decoders.0.mask_token", "encoder.blocks1.0.attn.weight"], []),
    ],
)
def test_groups_of_the_neighbours(name, sizes, decays, not_these):
    """By name what the specifications say: tokens and tables; matrices decay, biases and norms do not, in all."""
    suffix = {"vit": "tiny_patch16_224", "swin": "tiny_patch4_window7_224", "convvit": "base_patch16_224"}
    model = localmim.create_model(f"{name}_{suffix[name.split('_')[1]]}", **sizes)
    trained = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
    groups = pretraining_groups(trained, model.encoder.no_decay)
    assert {n: groups[n].decays for n in decays + not_these} == {n: n in decays for n in decays + not_these}
    for n, p in trained.items():
        if p.ndim == 1:
            assert not groups[n].decays, n
        elif n.endswith("weight"):
            assert groups[n].decays, n

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

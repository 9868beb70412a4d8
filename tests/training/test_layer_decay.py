"""Layer-wise rates: every parameter's share and decay as the authors' code has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import localmim
from localmim.convert.names import classifier_torch_name
from localmim.training.layer_decay import layer_decay_groups

GOLDEN = Path(__file__).parents[1] / "golden"
SWIN = "swin_base_patch4_window7_224"


@pytest.mark.parametrize(
    ("file", "name", "sizes", "decay"),
    [
        ("vit_base_ld0.65", "vit_base_patch16_224", {"embed_dim": 12, "num_heads": 3, "image_size": 32}, 0.65),
        ("swin_base_ld0.9", SWIN, {"embed_dim": 4, "num_heads": (1, 2, 2, 4)}, 0.9),
    ],
)
def test_groups_are_the_authors(file, name, sizes, decay):
    """The published tables of ViT-B and Swin-B, all names; widths do not matter, so narrow ones are built."""
    table = json.loads((GOLDEN / f"localmim_groups_finetune_{file}.json").read_text())
    model = localmim.create_model(name, num_classes=10, reference_quirks=True, **sizes)
    groups = layer_decay_groups(model, decay)
    ours = {classifier_torch_name(n, "mean", "swin" in name): group for n, group in groups.items()}
    assert ours.keys() == table.keys()
    for torch_name, row in table.items():
        assert ours[torch_name].lr_scale == pytest.approx(row["lr_scale"], rel=1e-12), torch_name
        assert ours[torch_name].decays == (row["weight_decay"] > 0), torch_name


def test_a_probe_has_one_group():
    """Nothing but the head is trained, at the full rate; a model may be asked twice."""
    model = localmim.create_model(
        "vit_tiny_patch16_224", num_classes=3, probe=True, embed_dim=12, depth=2, image_size=32
    )
    for _ in range(2):
        groups = layer_decay_groups(model, 0.5)
        assert {n: g.lr_scale for n, g in groups.items()} == {"head.weight": 1.0, "head.bias": 1.0}

"""Pre-training that goes on from other weights: what may differ between the two, and what may not."""

from __future__ import annotations

import numpy as np
import pytest

from localmim.config import config_from_dict
from localmim.convert.load import weights_of
from localmim.errors import UserError
from localmim.training.build import build_model
from localmim.training.checkpoint import weights_header, write_weights
from localmim.training.initial import go_on_pretraining

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
MAE = {"name": "mae_vit_tiny_patch16_224", **VIT, **DECODER}
BEIT = {"name": "beit_vit_tiny_patch16_224", **VIT}
LOMAR = {"name": "lomar_vit_tiny_patch16_224", **VIT}
CONV = {"embed_dims": [4, 4, 8], "depths": [1, 1, 1], "num_heads": 2, "image_size": 32, **DECODER}
CONVMAE = {"name": "convmae_convvit_base_patch16_224", **CONV}
SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
GREENMIM = {"name": "greenmim_swin_tiny_patch4_window7_224", **SWIN, **DECODER}
SIMMIM = {"name": "simmim_swin_tiny_patch4_window7_224", **SWIN}


def recipe(model: dict, **more):
    values = {"model": model, **more}
    if model["name"].startswith("beit"):
        values["target"] = {"codebook": ["unread.safetensors"], "vocab": 5}
    if model["name"].startswith("lomar"):
        values["mask"] = {"window": 2, "views": 2}
    return config_from_dict(values)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (recipe({**LOMAR, "image_size": 32}), recipe({**LOMAR, "image_size": [40, 48]}), None),
        (recipe({**MAE, "image_size": [32, 48]}), recipe({**MAE, "image_size": [48, 32]}), "was trained at 32x48 px"),
        (recipe({**BEIT, "image_size": [32, 48]}), recipe({**BEIT, "image_size": [48, 32]}), "was trained at 32x48 px"),
        (recipe(CONVMAE), recipe({**CONVMAE, "name": f"fast{CONVMAE['name']}"}), None),
        (recipe(SIMMIM, reference_quirks=True), recipe(SIMMIM), None),
        (recipe(GREENMIM, reference_quirks=True), recipe(GREENMIM), "was trained with reference_quirks true"),
        (recipe(GREENMIM), recipe({**MAE, "image_size": 64}), "do not fit the model"),
    ],
    ids=["lomar_larger", "mae_turned", "beit_turned", "convmae_to_fast", "simmim_quirks", "greenmim_quirks", "another"],
)
def test_what_goes_on(before, now, said, tmp_path):
    """All weights come along where they mean the same; else one line, and nothing is loaded."""
    path = tmp_path / "weights.safetensors"
    weights = weights_of(build_model(before))
    write_weights(path, weights, weights_header(0, before.as_dict()))
    now.init = str(path)
    model = build_model(now)
    if said:
        with pytest.raises(UserError, match=said):
            go_on_pretraining(model, now)
        return
    assert f"{len(weights)} weights loaded" in go_on_pretraining(model, now)[0]
    loaded = weights_of(model)
    assert all(np.array_equal(weights[n], loaded[n]) for n in weights)

"""From a config to a model."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from localmim.config import config_from_dict
from localmim.models.layers import Block
from localmim.models.swin import SwinBlock
from localmim.training.build import build_masking, build_model
from localmim.training.optimizer import AdamW
from localmim.training.step import TrainStep

VIT = {"name": "mae_vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
VIT |= {"num_heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
SWIN = {"name": "localmim_swin_tiny_patch4_window7_224", "image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1]}
SWIN |= {"num_heads": [1, 2, 4, 8], "window_size": 4, "taps": [3], "scales": [1], "decoder_dim": 16, "decoder_heads": 2}


@pytest.mark.parametrize("model", [VIT, SWIN], ids=["vit", "swin"])
def test_recompute_changes_nothing_but_memory(model):
    """All blocks of the encoder are marked, and on a ViT a step gives the same loss and the same weights."""
    results = []
    for recompute in (False, True):
        config = config_from_dict({"model": {**model, "recompute": recompute}})
        ms.set_seed(0)
        built = build_model(config)
        blocks = [c for _, c in built.encoder.cells_and_names() if isinstance(c, (Block, SwinBlock))]
        assert len(blocks) == (2 if model is VIT else 4)
        assert all(str(block.get_scope()).startswith("recompute") == recompute for block in blocks)
        if model is SWIN:  # compiling two more steps takes long, and marks are what can be forgotten
            continue
        trained = {n: p for n, p in built.parameters_and_names() if p.requires_grad}
        images = np.random.default_rng(0).standard_normal((2, 3, *built.encoder.image_size)).astype(np.float32)
        step = TrainStep(built, AdamW(trained))
        loss = step([(images, *build_masking(config, built)(0, np.arange(2)).arrays())], 1e-3, 1).loss
        results.append((loss, {n: p.asnumpy() for n, p in trained.items()}))
    if model is SWIN:
        return
    (loss, weights), (again, others) = results
    assert loss == pytest.approx(again, rel=1e-6)
    for name in weights:
        np.testing.assert_allclose(weights[name], others[name], atol=2e-6, err_msg=name)

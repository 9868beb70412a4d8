"""A tiny MAE in a weights file, for commands that take a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mindspore as ms

from localmim.config import load_config
from localmim.convert.load import weights_of
from localmim.training.build import build_model
from localmim.training.checkpoint import weights_header, write_weights

RECIPE = Path(__file__).parents[2] / "config/pretrain/mae_vit_base.yaml"
SIZES = {
    "image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2,
    "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip


def write_tiny(path: Path, seed: int = 0) -> Path:
    """Writes it, untrained, and returns its path."""
    ms.set_seed(seed)
    options = [word for key, value in SIZES.items() for word in (f"--model.{key}", str(value))]
    config = load_config(["--config", str(RECIPE), *options])
    header = weights_header(7, dataclasses.asdict(config))
    write_weights(path, weights_of(build_model(config)), header)
    return path

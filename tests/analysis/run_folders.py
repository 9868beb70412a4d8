"""Folders as runs leave them, written by hand: no model, no training."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import yaml

from localmim.config import Config, ModelConfig

SESSION = {
    "time": "2026-11-21T08:37:02+00:00", "step": 0, "localmim": "0.1.0", "mindspore": "2.10.0", "mindcv": "0.3.0",
    "numpy": "1.26.4", "python": "3.11.2", "system": "Linux-6.1", "processor": "A processor of a long name @ 2.70GHz",
    "cores": 2, "memory_gb": 8.2, "device": "CPU", "devices": 1, "precision": "fp32",
    "command": "train.py --config config/demo/localmim_vit.yaml --report-every 2",
}  # fmt: skip


def write_run(folder: Path, records: list[dict], recipe: dict | None = None, snapshots: tuple[int, ...] = ()) -> Path:
    """A run's folder.

    Args:
        folder: Is made.
        records: Lines of metrics.jsonl.
        recipe: config.yaml; None: `recipe_of()`; empty: none is written.
        snapshots: Steps after which one was taken.
    """
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if recipe != {}:
        (folder / "config.yaml").write_text(yaml.safe_dump(recipe_of() if recipe is None else recipe))
    for step in snapshots:
        write_snapshot(folder, step)
    return folder


def recipe_of(**changes) -> dict:
    """A resolved recipe: 4 epochs of a small model; `changes` are keys of the top level."""
    config = Config(epochs=4, batch_size=64, model=ModelConfig(name="mae_vit_tiny_patch16_224", image_size=64))
    return config.as_dict() | changes


def record(step: int, **values) -> dict:
    """A line of metrics.jsonl in a run of 10 steps an epoch and 2 seconds a step."""
    known = {"step": step, "epoch": step / 10, "loss": 1 + 1 / step, "loss_scales": [1.0, 1 / step], "lr": 1e-3 / step}
    pace = {"images_per_s": 32.0, "step_s": 2.0, "data_wait_s": 0.5, "time": 1.8e9 + 2 * step}
    return known | {"skipped": 0, "bad_images": 0} | pace | values


def write_snapshot(run: Path, step: int, name: str = "fish/0001.jpg") -> Path:
    """A snapshot with a reconstruction, an attention map and numbers of three layers; returns its folder."""
    folder = run / "report" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    noise = np.random.default_rng(step).integers(0, 255, (9, 24, 3), dtype=np.uint8)
    picture = noise.repeat(40, 0).repeat(40, 1)  # 960 pixels wide
    cv2.imwrite(str(folder / "reconstruction_0.png"), picture)
    cv2.imwrite(str(folder / "attention_0.png"), picture[:240])
    about = {
        "step": step,
        "epoch": step / 10,
        "loss_names": ["block 1, 8 px cells", "block 3, 16 px cells"],
        "reconstructions": [{"name": name, "picture": "reconstruction_0.png"}],
        "attention": [{"name": name, "picture": "attention_0.png", "caption": "blocks 1 and 3"}],
        "numbers": {
            "layers": ["block 1", "block 2", "block 3"],
            "nmi": [[0.1, 0.3], [0.2, 0.2], [0.0, step / 100]],
            "distance_px": [[8.0, 10.0], [12.0, 12.0], [20.0, 24.0]],
            "images": 32,
        },
    }
    (folder / "snapshot.json").write_text(json.dumps(about))
    return folder

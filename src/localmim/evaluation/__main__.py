"""`python -m localmim.evaluation knn --ckpt RUN --data-dir DIR`: weighted k-NN of frozen features, trained and untrained.

DIR holds class folders under train/ and val/. The network untrained is the same recipe with fresh weights, so the two
figures tell what pre-training added.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only. Before it is imported

import mindspore as ms
from jsonargparse import ArgumentParser

from localmim import cli
from localmim.config import config_from_dict
from localmim.convert.load import load_weights
from localmim.data.sources import open_source
from localmim.device import set_device
from localmim.errors import UserError
from localmim.evaluation.features import extract_features
from localmim.evaluation.knn import weighted_knn
from localmim.training.build import build_model
from localmim.training.checkpoint import read_checkpoint


def knn(ckpt: str, data_dir: str, k: int = 20, temperature: float = 0.07, device: str = "auto", out: str = "") -> dict:
    """Weighted k-NN of a checkpoint's encoder and of the same network untrained.

    Args:
        ckpt: A run's folder, one of its checkpoints, or a weights file.
        data_dir: A folder with class folders under train/ and val/.
        k: Neighbours that vote.
        temperature: Votes weigh exp(cosine similarity / temperature).
        device: auto, CPU, GPU or Ascend.
        out: JSON file for the result; empty: none.
    """
    checkpoint = read_checkpoint(ckpt)
    config = config_from_dict(checkpoint.config)
    set_device(device)
    ms.set_seed(config.seed)
    model = build_model(config)
    encoder = model.encoder
    sources = [open_source(str(Path(data_dir) / part), "folder", encoder.in_chans) for part in ("train", "val")]
    for source in sources:
        if not source.class_names:
            raise UserError(f"{data_dir}: expected class folders under train/ and val/")
    result = {"step": checkpoint.step}
    for state in ("untrained", "trained"):
        if state == "trained":
            load_weights(model, checkpoint.weights())
        (train, train_labels), (val, val_labels) = [
            extract_features(encoder, s, config.data, label=f"{state}, {part}")
            for s, part in zip(sources, ("train", "val"))
        ]
        result[state] = weighted_knn(train, train_labels, val, val_labels, k, temperature)
    print(
        f"weighted {k}-NN on {len(sources[1])} images, top-1: {result['trained']['top1']:.1f} % after {checkpoint.step} "
        f"steps of pre-training, {result['untrained']['top1']:.1f} % with the same network untrained"
    )
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def main(argv: list[str]) -> None:
    """The command line."""
    parser = ArgumentParser(prog="python -m localmim.evaluation", description=__doc__.splitlines()[0])
    commands = parser.add_subcommands(required=True)
    command = ArgumentParser(description="weighted k-NN of frozen features")
    command.add_function_arguments(knn)
    commands.add_subcommand("knn", command)
    arguments = parser.parse_args(argv)
    knn(**vars(arguments.knn))


if __name__ == "__main__":
    sys.exit(cli.run(main))

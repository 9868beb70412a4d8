"""`python -m localmim.evaluation knn --ckpt RUN --data-dir DIR`: weighted k-NN of features, trained and untrained.

DIR holds class folders under train/ and val/. The network untrained is the same recipe with fresh weights, so the two
figures tell what pre-training added. Features are the mean of the top tap's patch tokens, standardised with the mean
and deviation of train/, as a batch norm without affine part does before a linear probe.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from localmim import cli
from localmim.data.sources import open_source
from localmim.device import set_device
from localmim.errors import UserError
from localmim.evaluation.features import extract_features
from localmim.evaluation.knn import weighted_knn
from localmim.training.restore import restore, untrained_model


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
    set_device(device)
    config, trained, step = restore(ckpt)
    in_chans = trained.encoder.in_chans
    sources = [open_source(str(Path(data_dir) / part), "folder", in_chans) for part in ("train", "val")]
    if not all(source.class_names for source in sources):
        raise UserError(f"{data_dir}: expected class folders under train/ and val/")
    result = {"step": step}
    for state, model in (("untrained", untrained_model(config)), ("trained", trained)):
        (train, train_labels), (val, val_labels) = [
            extract_features(model.encoder, s, config.data, label=f"{state}, {part}")
            for s, part in zip(sources, ("train", "val"))
        ]
        mean, deviation = train.mean(axis=0), train.std(axis=0) + 1e-6
        train, val = (train - mean) / deviation, (val - mean) / deviation
        result[state] = weighted_knn(train, train_labels, val, val_labels, k, temperature)
    print(
        f"weighted {k}-NN on {len(sources[1])} images, top-1: {result['trained']['top1']:.1f} % after {step} "
        f"steps of pre-training, {result['untrained']['top1']:.1f} % with the same network untrained"
    )
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def main(argv: list[str]) -> None:
    """The command line."""
    parser, add = cli.commands("python -m localmim.evaluation", "Measures an encoder.")
    command = add("knn", "weighted k-NN of frozen features, trained and untrained")
    command.add_argument("--ckpt", metavar="RUN", type=str, required=True, help="a run, a checkpoint or a weights file")
    command.add_argument(
        "--data-dir", metavar="DIR", type=str, required=True, help="class folders under train/ and val/"
    )
    command.add_argument("--k", metavar="K", type=int, default=20, help="neighbours that vote")
    command.add_argument(
        "--temperature", metavar="T", type=float, default=0.07, help="a vote weighs exp(similarity / T)"
    )
    command.add_argument("--device", type=str, default="auto", help="auto, CPU, GPU or Ascend")
    command.add_argument("--out", metavar="FILE", type=str, default="", help="JSON file for the result")
    knn(**cli.parse(parser, argv).knn.as_dict())


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""`python -m localmim.evaluation knn|features`: what a frozen encoder's features are worth, and the features.

knn: weighted k-NN, of the trained encoder and of the same network with fresh weights, so that the two figures tell what
training added. DIR holds class folders under train/ and val/.
features: pooled features of the images in DIR as an .npz file with `features` [N, D], `labels` [N] (-1: none),
`names` [N], `classes`, and `pool`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from localmim import cli
from localmim.data.sources import open_source
from localmim.device import set_device
from localmim.errors import UserError
from localmim.evaluation.features import extract_features, pooled
from localmim.evaluation.neighbours import neighbours, open_pair
from localmim.files import save_arrays
from localmim.training.restore import restore, untrained_model


def knn(
    ckpt: str,
    data_dir: str,
    k: int = 20,
    temperature: float = 0.07,
    pool: str = "mean",
    device: str = "auto",
    out: str = "",
) -> dict:
    """Weighted k-NN of a checkpoint's encoder and of the same network untrained.

    Args:
        ckpt: A run's folder, one of its checkpoints, or a weights file.
        data_dir: A folder with class folders under train/ and val/.
        k: Neighbours that vote.
        temperature: Votes weigh exp(cosine similarity / temperature).
        pool: "mean" of the patch tokens or the class "token".
        device: auto, CPU, GPU or Ascend.
        out: JSON file for the result; empty: none.
    """
    set_device(device)
    folders = [str(Path(data_dir) / part) for part in ("train", "val")]
    config, trained, step = restore(ckpt)
    pair = open_pair(*folders, trained.encoder.in_chans, called=("--data-dir",) * 2)
    result = {"step": step}
    for name, model in (("untrained", untrained_model(config)), ("trained", trained)):
        network = pooled(model.encoder, pool)
        result[name] = neighbours(network, *pair, config.data, k=k, temperature=temperature, label=name)
    print(
        f"weighted {k}-NN on {result['trained']['n_test']} images, top-1: {result['trained']['top1']:.1f} % after "
        f"{result['step']} steps of training, {result['untrained']['top1']:.1f} % with the same network untrained"
    )
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def features(
    ckpt: str, data_dir: str, out: str, pool: str = "mean", device: str = "auto", batch_size: int = 64
) -> None:
    """Writes the features of all images of `data_dir` to the .npz file `out`; arguments as in `knn`.

    Raises:
        UserError: `out` is no .npz file or cannot be written.
    """
    path = Path(out)
    if path.suffix != ".npz" or not path.parent.is_dir():
        raise UserError(f"--out is {out}, expected a file that ends in .npz, in a folder that exists")
    set_device(device)
    config, model, _ = restore(ckpt)
    source = open_source(data_dir, "auto", model.encoder.in_chans, called="--data-dir")
    values, labels, samples = extract_features(pooled(model.encoder, pool), source, config.data, batch_size)
    names = np.asarray([source.name(int(i)) for i in samples])
    arrays = {"features": values, "labels": labels, "names": names, "classes": list(source.class_names), "pool": pool}
    save_arrays(path, arrays, compress=False)
    print(f"{len(values)} x {values.shape[1]} features: {path}")


def main(argv: list[str]) -> None:
    """The command line."""
    parser, add = cli.commands("python -m localmim.evaluation", "Measures an encoder.")
    commands = {
        "knn": (knn, add("knn", "weighted k-NN of frozen features, trained and untrained")),
        "features": (features, add("features", "pooled features of images, to an .npz file")),
    }
    for _, command in commands.values():
        command.add_argument(
            "--ckpt", metavar="RUN", type=str, required=True, help="a run, a checkpoint, a weights file"
        )
        command.add_argument("--data-dir", metavar="DIR", type=str, required=True, help="images; knn: train/ and val/")
        command.add_argument("--pool", type=str, default="mean", help="mean of the patch tokens, or the class token")
        command.add_argument("--device", type=str, default="auto", help="auto, CPU, GPU or Ascend")
    _, command = commands["knn"]
    command.add_argument("--k", metavar="K", type=int, default=20, help="neighbours that vote")
    command.add_argument("--temperature", metavar="T", type=float, default=0.07, help="a vote weighs exp(similarity/T)")
    command.add_argument("--out", metavar="FILE", type=str, default="", help="JSON file for the result")
    _, command = commands["features"]
    command.add_argument("--out", metavar="FILE", type=str, required=True, help=".npz file for the features")
    command.add_argument("--batch-size", metavar="N", type=int, default=64, help="images a forward pass")
    parsed = cli.parse(parser, argv)
    commands[parsed.command][0](**parsed[parsed.command].as_dict())


if __name__ == "__main__":
    sys.exit(cli.run(main))

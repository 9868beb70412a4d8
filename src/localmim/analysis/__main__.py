"""Pictures of a run: `python -m localmim.analysis curve --run DIR` and `… reconstruct --ckpt RUN --data_dir DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

from localmim import cli
from localmim.analysis.pictures import loss_curve
from localmim.analysis.reconstruct import reconstruct
from localmim.config import config_from_dict, read_recipe
from localmim.data.sources import open_source
from localmim.device import set_device
from localmim.errors import UserError
from localmim.training.build import build_model
from localmim.training.restore import restore
from localmim.training.runlog import METRICS


def draw_curve(run: str, out: str = "") -> Path:
    """Loss, its parts and the learning rate of a run, against its steps.

    Args:
        run: The run's folder.
        out: PNG file; empty: loss_curve.png in the run's folder.
    """
    metrics = Path(run) / METRICS
    if not metrics.is_file():
        raise UserError(f"{run} is no run: it holds no {METRICS}")
    model = build_model(config_from_dict(read_recipe(Path(run) / "config.yaml")))
    names = model.loss_names()
    path = loss_curve(metrics, Path(out) if out else Path(run) / "loss_curve.png", names)
    print(f"loss curve: {path}")
    return path


def draw_reconstructions(ckpt: str, data_dir: str, count: int = 6, device: str = "auto", out: str = "") -> Path:
    """Images, masks, targets and what the model makes of the hidden cells, at every scale.

    Args:
        ckpt: A run's folder, one of its checkpoints, or a weights file.
        data_dir: Images; `count` of them, evenly spread, are drawn.
        count: Rows of the picture.
        device: auto, CPU, GPU or Ascend.
        out: PNG file; empty: reconstructions.png in the folder of `ckpt`.
    """
    set_device(device)
    config, model, _ = restore(ckpt)
    source = open_source(data_dir, "auto", model.encoder.in_chans)
    folder = Path(ckpt) if Path(ckpt).is_dir() else Path(ckpt).parent
    path = reconstruct(config, model, source, count, Path(out) if out else folder / "reconstructions.png")
    print(f"reconstructions: {path}")
    return path


def main(argv: list[str]) -> None:
    """The command line."""
    parser, add = cli.commands("python -m localmim.analysis", "Pictures of a run.")
    command = add("curve", "loss, its parts and the learning rate against steps")
    command.add_argument("--run", metavar="DIR", type=str, required=True, help="a run's folder")
    command.add_argument("--out", metavar="FILE", type=str, default="", help="PNG file; else loss_curve.png in the run")
    command = add("reconstruct", "images, masks, targets and reconstructions at every scale")
    command.add_argument("--ckpt", metavar="RUN", type=str, required=True, help="a run, a checkpoint or a weights file")
    command.add_argument(
        "--data-dir", metavar="DIR", type=str, required=True, help="images, in any form that data.dir takes"
    )
    command.add_argument("--count", metavar="N", type=int, default=6, help="images to draw, spread evenly over the set")
    command.add_argument("--device", type=str, default="auto", help="auto, CPU, GPU or Ascend")
    command.add_argument(
        "--out", metavar="FILE", type=str, default="", help="PNG file; else reconstructions.png beside RUN"
    )
    arguments = cli.parse(parser, argv)
    call = {"curve": draw_curve, "reconstruct": draw_reconstructions}[arguments.command]
    call(**arguments[arguments.command].as_dict())


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""A look into a run: `python -m localmim.analysis curve|reconstruct|attention|nmi|report`.

Each command writes pictures, or a page, and its numbers beside them as .npz or JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from localmim import cli
from localmim.analysis.attention_pictures import attention
from localmim.analysis.canvas import picture_path
from localmim.analysis.curves import loss_curve
from localmim.analysis.history import read_run, read_runs
from localmim.analysis.information import nmi
from localmim.analysis.reconstruct import reconstruct
from localmim.analysis.report import page_path, write_report
from localmim.analysis.snapshot import add_missing
from localmim.device import set_device

RUN = "a run's folder, a checkpoint or a weights file"
IMAGES = "images, in any form that data.dir takes"


def curve(run: str, out: str = "") -> Path:
    """Loss, its parts and the learning rate of a run, against its steps.

    Args:
        run: The run's folder.
        out: PNG file; empty: loss_curve.png in the run's folder.

    Raises:
        UserError: There is no run, or it has made no step.
    """
    path = picture_path(out, run, "loss_curve.png")
    found = read_run(run, run)
    names = next((snapshot.loss_names for snapshot in found.snapshots if snapshot.loss_names), [])
    loss_curve(found.records, path, names)
    print("\n".join([f"loss curve: {path}", *found.notes]))
    return path


def report(run: Sequence[str], out: str = "", device: str = "auto") -> Path:
    """One page about a run, or about several side by side. A run without any snapshot gets one of its newest weights.

    Args:
        run: The runs' folders.
        out: HTML file, beside which its numbers are written as JSON; empty: report.html in the run's folder, or
            comparison.html in that of the first.
        device: For a snapshot: auto, CPU, GPU or Ascend.

    Raises:
        UserError: There is no run, it has made no step, or the disk does not take the files.
    """
    page_path(read_runs(run), out)
    set_device(device)
    for folder in run:
        if line := add_missing(Path(folder)):
            print(line)
    path = write_report(run, out)
    print(f"report: {path}, numbers: {path.with_suffix('.json')}")
    return path


def main(argv: list[str]) -> None:
    """The command line."""
    parser, add = cli.commands("python -m localmim.analysis", "A look into a run.")
    functions = {"curve": curve, "reconstruct": reconstruct, "attention": attention, "nmi": nmi, "report": report}

    command = add("curve", "loss, its parts and the learning rate against steps")
    command.add_argument("--run", metavar="DIR", type=str, required=True, help="a run's folder")
    command.add_argument("--out", metavar="FILE", type=str, default="", help="PNG file; else loss_curve.png in the run")

    command = add("reconstruct", "input, mask, prediction and pasted result at every scale")
    command.add_argument("images", metavar="IMAGE", type=str, nargs="+", help="image files, or folders of images")
    command.add_argument("--ckpt", metavar="RUN", type=str, required=True, help=RUN)
    command.add_argument("--count", metavar="N", type=int, default=6, help="images of a folder, evenly spread")
    command.add_argument("--device", type=str, default="auto", help="auto, CPU, GPU or Ascend")
    command.add_argument(
        "--out", metavar="FILE", type=str, default="", help="PNG file; else reconstructions.png beside RUN"
    )

    command = add("attention", "where chosen points of an image attend to, and the mean distance of attention")
    command.add_argument("image", metavar="IMAGE", type=str, help="an image file")
    command.add_argument("--ckpt", metavar="RUN", type=str, required=True, help=RUN)
    command.add_argument(
        "--query", metavar="X,Y", type=str, action="append", required=True, help="a point, pixels from the top left"
    )
    command.add_argument("--layers", metavar="N,N", type=str, default="", help="blocks from 1, or all; else three")
    command.add_argument("--device", type=str, default="auto", help="auto, CPU, GPU or Ascend")
    command.add_argument("--out", metavar="FILE", type=str, default="", help="PNG file; else attention.png beside RUN")

    command = add("nmi", "mutual information of query and key patches at each layer")
    command.add_argument(
        "--ckpt", metavar="RUN", type=str, nargs="+", required=True, help=RUN + "; several in one plot"
    )
    command.add_argument("--data-dir", metavar="DIR", type=str, required=True, help=IMAGES)
    command.add_argument("--count", metavar="N", type=int, default=64, help="images, evenly spread over the set")
    command.add_argument("--untrained", type=bool, default=False, help="true: the first with fresh weights as well")
    command.add_argument("--batch-size", metavar="N", type=int, default=8, help="images a forward pass")
    command.add_argument("--device", type=str, default="auto", help="auto, CPU, GPU or Ascend")
    command.add_argument("--out", metavar="FILE", type=str, default="", help="PNG file; else nmi.png beside the first")

    command = add("report", "one page about a run, or about several side by side")
    command.add_argument("--run", metavar="DIR", type=str, nargs="+", required=True, help="folders of runs")
    command.add_argument("--device", type=str, default="auto", help="auto, CPU, GPU or Ascend")
    command.add_argument("--out", metavar="FILE", type=str, default="", help="HTML file; else report.html in the run")

    arguments = cli.parse(parser, argv)
    functions[arguments.command](**arguments[arguments.command].as_dict())


if __name__ == "__main__":
    sys.exit(cli.run(main))

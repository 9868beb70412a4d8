"""Exports a checkpoint: `python export.py --ckpt FILE --file-format MINDIR|ONNX|AIR [--encoder-only] [--out FILE]`.

The file is loaded back in a fresh process and compared on real images. Exit codes: 0 done, 2 a wrong argument or file,
1 anything else, for example a file that computes something else than the checkpoint.
"""

import os
import sys

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only. Before it is imported

from jsonargparse import ArgumentParser

from localmim import cli
from localmim.export import export


def main(argv: list[str]) -> None:
    """Parse, then export."""
    parser = ArgumentParser(prog="python export.py", description="Exports a checkpoint.", exit_on_error=False)
    parser.add_argument("--ckpt", metavar="FILE", type=str, required=True, help="a run, a checkpoint or a weights file")
    parser.add_argument("--file-format", type=str, default="MINDIR", help="MINDIR, ONNX or AIR")
    parser.add_argument("--encoder-only", action="store_true", help="give pooled features")
    parser.add_argument(
        "--batch-size", metavar="N", type=str, default="1", help="images a call, or dynamic: any number"
    )
    parser.add_argument("--out", metavar="FILE", type=str, default="", help="else <model name>.mindir, .onnx or .air")
    parser.add_argument(
        "--data-dir", metavar="DIR", type=str, default="", help="images to compare on; else the recipe's"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, CPU, GPU or Ascend")
    parser.add_argument("--overwrite", type=bool, default=False, help="true: replace a file that is there")
    export(**cli.parse(parser, argv).as_dict())


if __name__ == "__main__":
    sys.exit(cli.run(main))

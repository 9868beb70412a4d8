"""`python -m localmim.data pack` and `python -m localmim.data verify`.

Exit codes: 0 done; 2 a wrong argument or folder, one line on stderr; 1 anything else, and unreadable images found by
`verify`.
"""

from __future__ import annotations

import sys
from typing import Optional

from jsonargparse import ArgumentParser

from localmim import cli
from localmim.data.pack import pack, verify
from localmim.errors import RunError

PACK = """Write the images of a data set as MindRecord shards.
JPEG and PNG files are stored byte for byte, other formats become PNG. Unreadable images are named and left out."""
VERIFY = """Read and decode every image of a data set and name those that fail; exit code 1 when there are any."""
DATA_SET = "a folder of images or of class folders, a list file, or CIFAR binaries"


def build_parser() -> ArgumentParser:
    """The command line: `pack` and `verify` with their arguments."""
    parser, add = cli.commands("python -m localmim.data", "Prepare image data sets.")
    command = add("pack", PACK)
    command.add_argument("--src", metavar="DIR", type=str, required=True, help=f"data set to pack: {DATA_SET}")
    command.add_argument(
        "--dst",
        metavar="DIR",
        type=str,
        required=True,
        help="MindRecord set to write, a new folder; use it as data.dir",
    )
    command.add_argument("--shards", metavar="N", type=int, default=4, help="number of shard files")
    command.add_argument(
        "--short-side",
        metavar="PX",
        type=Optional[int],
        help="shrink larger images to this many pixels on their short side, as JPEG",
    )
    command.add_argument("--quality", metavar="Q", type=int, default=95, help="JPEG quality of shrunk images, 1 to 100")
    command = add("verify", VERIFY)
    command.add_argument("--dir", metavar="DIR", type=str, required=True, help=f"{DATA_SET}, or a MindRecord set")
    command.add_argument("--in-chans", metavar="C", type=int, default=3, help="channels that the images must have")
    return parser


def main(argv: list[str]) -> None:
    """Runs one command."""
    arguments = cli.parse(build_parser(), argv)
    if arguments.command == "pack":
        left_out = pack(**arguments.pack.as_dict())
        print(f"written: {arguments.pack.dst}; {len(left_out)} unreadable images were left out")
        return
    unreadable = 0
    for line in verify(**arguments.verify.as_dict()):
        print(line)
        unreadable += 1
    print(f"{unreadable} unreadable images in {arguments.verify.dir}")
    if unreadable:
        raise RunError(f"{unreadable} unreadable images")


if __name__ == "__main__":
    sys.exit(cli.run(main))

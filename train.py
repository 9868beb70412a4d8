"""Trains what a recipe says: `python train.py --config config/demo/localmim_vit.yaml [--key value]`.

Keys are dotted, as in the YAML: `--optimizer.blr 1e-4 --model.scales [1]`. The same command continues a run that was
stopped. Exit codes: 0 done, 2 a wrong argument, config or folder, 1 anything else.
"""

import os
import sys

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only. Before it is imported

from localmim import cli
from localmim.config import load_config
from localmim.training.loop import train


def main(argv: list[str]) -> None:
    """Parse, then run the recipe."""
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    train(load_config(argv))


if __name__ == "__main__":
    sys.exit(cli.run(main))

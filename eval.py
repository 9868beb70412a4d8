"""Evaluates what a checkpoint is: `python eval.py --ckpt RUN [--data-dir DIR] [--config FILE]`.

A classifier: top-1 and top-5 accuracy on DIR, class folders or a list with labels (default: the recipe's
data.val_dir). A pre-training model or a lone encoder: weighted 20-NN of its frozen features, DIR holding class folders
under train/ and val/. The checkpoint knows its own model and recipe; keys of FILE replace its own, for example another
image size. The result is a JSON file beside the checkpoint, or --out. Exit codes: 0 done, 2 a wrong argument or file,
1 anything else.
"""

import os
import sys

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only. Before it is imported

from localmim import cli
from localmim.evaluation.evaluate import main

if __name__ == "__main__":
    sys.exit(cli.run(main))

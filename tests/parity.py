"""Compares this project with values computed by the authors' code: `python tests/parity.py FILE.npz …`

Each file is rebuilt as a case (golden_cases/): the model from its config, its weights through the name mapping that
users get, its mask replayed, in graph mode. One line a value, exit code 1 on a mismatch, 2 where nothing could be
compared. Only what the loss reads exists here, so predictions are compared at hidden cells. HOG cells that hold a pixel
within 1e-4 of a bin's edge, but not exactly on it, are left out: there rounding chooses the bin.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import mindspore as ms
import numpy as np

from golden_cases import convmae, greenmim, localmim, mae, mask_tokens, simmim
from golden_cases.common import Comparison

CASES = {**localmim.CASES, **mae.CASES, **simmim.CASES, **greenmim.CASES, **convmae.CASES, **mask_tokens.CASES}


def case_of(config: dict) -> str:
    """Which case a golden file holds: its own word, without a suffix such as `_epsprobe`."""
    case = str(config.get("case", config.get("method", "unknown")))
    return max((c for c in CASES if case == c or case.startswith(c + "_")), key=len, default=case)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE.npz", type=Path)
    files = parser.parse_args(argv).files
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    compare, skipped = Comparison(), 0
    for file in files:
        if not file.is_file():
            print(f"no such file: {file}", file=sys.stderr)
            return 2
        with np.load(file, allow_pickle=False) as z:
            config = json.loads(str(z["config"]))
            case = case_of(config)
            print(f"{file}: {case}")
            if case not in CASES:
                print(f"SKIP {case} is not in this version")
                skipped += 1
                continue
            CASES[case](z, config, compare)
        gc.collect()  # a finished model is freed now: at interpreter exit MindSpore's cells complain
    print(f"{compare.count - compare.failures} values equal, {compare.failures} not, {skipped} files skipped")
    return 2 if compare.count == 0 else int(compare.failures > 0)


if __name__ == "__main__":
    sys.exit(main())

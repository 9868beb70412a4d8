"""What mindspore_hub.load(PAGE, source="local") does, for want of the package; `python hub_sequence.py PAGE FOLDERS…`.

After release line 1.9: it reads the header, puts the folder that repo-link's last part names first on sys.path,
executes the conf file there by path, calls create_network with the lower-cased name, and loads the checkpoint beside
the page without a look at what did not fit. What it would throw away is returned here.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import mindspore as ms
import yaml
from mindspore import nn

SMALL_VIT = {
    "image_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 7, "num_heads": 2, "decoder_dim": 16,
    "decoder_heads": 2,
}  # fmt: skip


def read_header(page: Path) -> dict:
    """The lines between the two that begin with ---, as YAML."""
    inside, lines = False, []
    for line in page.read_text().splitlines(keepends=True):
        if line.startswith("---"):
            inside = not inside
        elif inside:
            lines.append(line)
    return yaml.load("".join(lines), Loader=yaml.FullLoader)


def execute_conf(folder: Path):
    """The conf file of a repository's folder, executed by path; the folder comes first on sys.path and stays there."""
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("mindspore_hub_conf.py", folder / "mindspore_hub_conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hub_load(page: Path, **kwargs) -> tuple[nn.Cell, list[str], list[str]]:
    """The network with its checkpoint, parameters that had no value, and values that had no parameter."""
    header = read_header(page)
    conf = execute_conf(page.parent / Path(header["repo-link"]).name)
    network = conf.create_network(header["model-name"].lower(), **kwargs)
    assert isinstance(network, nn.Cell)
    checkpoints = [asset for asset in header["asset"] if asset["file-format"] == "ckpt"]
    values = ms.load_checkpoint(str(page.parent / Path(checkpoints[-1]["asset-link"]).name))
    return network, *ms.load_param_into_net(network, values)


def main(page: Path, decoys: list[str]) -> None:
    """In a fresh process, after other packages: the small network comes from the folder beside the page, twice."""
    import gc
    import types

    import numpy as np

    sys.path[:0] = decoys
    import src  # what model-zoo repositories call their package

    sys.modules["localmim"] = types.ModuleType("localmim")  # what `import localmim` gives in the page's folder: no file
    before = list(sys.path)
    network, missing, unexpected = hub_load(page, **SMALL_VIT)
    again, *_ = hub_load(page, **SMALL_VIT)
    folder = page.parent / "localmim"
    assert sys.path == [str(folder), str(folder), *before]
    assert Path(sys.modules["localmim"].__file__) == folder / "src" / "localmim" / "__init__.py"
    assert sys.modules["src"] is src and src.NAME == "decoy"
    assert type(again) is type(network)
    assert (missing, unexpected) == ([], []), (missing, unexpected)
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    np.save(page.with_suffix(".npy"), network(ms.Tensor(images)).asnumpy())
    del network, again
    gc.collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""`python -m localmim.hub asset | check`: a run's weights as the checkpoint of a hub page; the rules of pages.

asset writes FOLDER/NAME.ckpt, NAME from the link, and only if the page's network computes the same features with it as
the run's own does; then it puts link and SHA-256 into the page.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn

from localmim import cli
from localmim.device import set_device
from localmim.errors import UserError
from localmim.files import file_sha256, replace_text
from localmim.hub import create_network, load_strictly
from localmim.hub.page import check_page, check_text, read_page, with_asset
from localmim.training.restore import restore


def asset(ckpt: str, page: str, link: str, out: str) -> Path:
    """Writes the checkpoint of a page and enters it there; returns its path.

    Args:
        ckpt: A pre-training run's folder, one of its checkpoints, or a weights file.
        page: The `.md` file; an asset that it has is replaced.
        link: Where the checkpoint will be found; ends in `.ckpt`.
        out: The folder to write to.

    Raises:
        UserError: The page breaks a rule or is of another model, its network computes something else with these
            weights, or the file is there already.
    """
    name = check_page(page)["model-name"].lower()
    text = read_page(Path(page))
    if not link.endswith(".ckpt"):
        raise UserError(f"--link is {link}, expected an address that ends in .ckpt")
    check_text(with_asset(text, link, "0" * 64), f"{page} with --link {link}")
    path = Path(out) / link.rsplit("/", 1)[1]
    if path.exists():
        raise UserError(f"{path} is there already: give another --out, or remove it")
    config, model, step = restore(ckpt)
    if config.model.name != name:
        raise UserError(f"{ckpt} is a {config.model.name}, and the page {page} is of {name}")
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ms.save_checkpoint([{"name": n, "data": p} for n, p in model.parameters_and_names()], str(aside))
        os.chmod(aside, 0o644)  # MindSpore leaves it readable by its owner alone
        _check_network(name, model, aside, ckpt)
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)
    sha256 = file_sha256(path)
    replace_text(Path(page), with_asset(text, link, sha256))
    print(f"{path}: step {step}, {path.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256}; entered in {page}")
    return path


def _check_network(name: str, model: nn.Cell, file: Path, ckpt: str) -> None:
    """The page's network takes all weights of the file and computes the features of `model`, bit for bit."""
    network = create_network(name)
    try:
        load_strictly(network, str(file))
    except UserError as error:
        raise UserError(f"{ckpt} is not the network of the page, create_network({name!r}): {error}") from error
    encoder = model.encoder
    images = ms.Tensor(np.random.default_rng(0).normal(size=(2, encoder.in_chans, *encoder.image_size)), ms.float32)
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)  # one pass each is not worth two compilations
    try:
        features = [cell.set_train(False)(images).asnumpy() for cell in (model, network)]
    finally:
        ms.set_context(mode=mode)
    difference = np.abs(features[0] - features[1]).max()
    if difference != 0:
        raise UserError(
            f"{ckpt} is not the network of the page: features differ by {difference:.3g}, so it was trained with other "
            f"arguments than create_network({name!r}) has, such as reference_quirks or num_heads"
        )


def check(pages: list[str]) -> None:
    """Says of each page that it obeys the rules; UserError names the first that is broken."""
    for page in pages:
        header = check_page(page)
        print(f"{page}: {header['model-name']}, {'with' if 'asset' in header else 'without'} an asset: in order")


def main(argv: list[str]) -> None:
    """The command line."""
    parser, add = cli.commands("python -m localmim.hub", "Pages of MindSpore Hub.")
    command = add("asset", "a run's weights as a page's checkpoint")
    command.add_argument("--ckpt", metavar="RUN", type=str, required=True, help="a run, a checkpoint or a weights file")
    command.add_argument("--page", metavar="FILE", type=str, required=True, help="the page, hub/NAME.md")
    command.add_argument("--link", metavar="URL", type=str, required=True, help="where the .ckpt file will be found")
    command.add_argument("--out", metavar="FOLDER", type=str, required=True, help="where it is written")
    command = add("check", "whether pages obey the rules of the hub")
    command.add_argument("pages", metavar="PAGE", type=str, nargs="+", help="pages, hub/NAME.md")
    parsed = cli.parse(parser, argv)
    options = parsed[parsed.command].as_dict()
    if parsed.command == "check":
        check(**options)
        return
    set_device("CPU")
    asset(**options)


if __name__ == "__main__":
    sys.exit(cli.run(main))

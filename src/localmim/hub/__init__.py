"""What MindSpore Hub gets from this project: a network for every registered name, and a loader that says what fits.

A page's checkpoint is loaded into what `create_network` gives for its name alone. So names with a published
recipe get its arguments here, which `create_model` leaves at the plain defaults (docs/quirks.md).
"""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
from mindspore import nn

from localmim.convert.load import LoadReport, load_weights
from localmim.errors import UserError
from localmim.files import file_sha256
from localmim.models.registry import create_model

PAPER = {  # as in config/pretrain/
    "localmim_vit_base_patch16_224": {"nbins": 9, "hog_bias": False, "reference_quirks": True},
    "localmim_vit_large_patch16_224": {"nbins": 18, "hog_bias": True, "reference_quirks": True},
    "localmim_swin_base_patch4_window7_224": {"nbins": 18, "hog_bias": True, "reference_quirks": True},
    "localmim_swin_large_patch4_window14_224": {"nbins": 18, "hog_bias": True, "reference_quirks": True},
    "mae_vit_base_patch16_224": {"reference_quirks": True},
    "simmim_vit_base_patch16_224": {"reference_quirks": True, "drop_path": 0.1},
    "simmim_swin_base_patch4_window6_192": {"reference_quirks": True},
    "greenmim_swin_base_patch4_window7_224": {"reference_quirks": True},
    "maskfeat_vit_base_patch16_224": {"reference_quirks": True},
    "beit_vit_base_patch16_224": {"vocab": 8192, "min_block": 16, "reference_quirks": True, "drop_path": 0.1},
    "lomar_vit_base_patch16_224": {"reference_quirks": True},
    "convmae_convvit_base_patch16_224": {"reference_quirks": True},
    "fastconvmae_convvit_base_patch16_224": {"reference_quirks": True},
}


def create_network(name: str, *args, **kwargs) -> nn.Cell:
    """The network of a hub page.

    Args:
        name: A registered model, in upper or lower case.
        kwargs: Arguments of `create_model`; they go before those of `PAPER`.

    Raises:
        UserError: Unknown name or argument, a positional argument, or sizes that do not fit together.
    """
    if args:
        raise UserError(f"create_network({name!r}) takes keyword arguments only, got {args[0]!r} without a name")
    name = name.lower()
    return create_model(name, **{**PAPER.get(name, {}), **kwargs})


def load_strictly(network: nn.Cell, ckpt_file: str, sha256: str = "") -> LoadReport:
    """Loads a MindSpore checkpoint, and refuses it whole unless every name and shape fits.

    mindspore_hub itself drops the report of `load_param_into_net`, so that wrong names leave a network untrained, and
    takes a file that is there already without checking it.

    Args:
        ckpt_file: A `.ckpt` file, for example that of a page's `asset`.
        sha256: What its page says; empty: not checked.

    Raises:
        UserError: The file is missing, damaged, another one, or does not fit; then nothing is loaded.
    """
    path = Path(ckpt_file)
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected a MindSpore checkpoint")
    if sha256 and file_sha256(path) != sha256.lower():
        raise UserError(f"{path} is not the file of the page: its SHA-256 is {file_sha256(path)}, expected {sha256}")
    try:
        parameters = ms.load_checkpoint(str(path))
    except ValueError as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    return load_weights(network, {name: p.asnumpy() for name, p in parameters.items()})

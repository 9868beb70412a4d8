"""From a pre-training model's weights to those of its encoder, for use downstream.

LocalMIM pre-trains a Swin with another order inside a patch merging than the official one, and loads the
weights downstream as they are (docs/quirks.md, Q3). `merging` chooses: "as_is" does the same, which is what the
published fine-tuning results were made with; "permute" puts the four blocks of the merging weights into the official
order, so that the downstream encoder computes exactly what was trained.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np

from localmim.errors import UserError

PRETRAINING_ONLY = ("tap_norms.", "mask_token")  # in the encoder, but no downstream model has it


def encoder_weights(
    arrays: dict[str, np.ndarray], merging: Literal["as_is", "permute"] = "as_is"
) -> dict[str, np.ndarray]:
    """The encoder's arrays out of a pre-training model's, without what belongs to pre-training.

    Args:
        arrays: Weights by our names, `encoder.` and others.
        merging: What becomes of a Swin's merging weights that were trained with `reference_quirks`.

    Returns:
        Names without `encoder.`, ready for a VisionTransformer or a SwinTransformer without taps.

    Raises:
        UserError: There is no encoder in `arrays`, or `merging` is neither.
    """
    if merging not in ("as_is", "permute"):
        raise UserError(f"merging is {merging!r}, expected 'as_is' or 'permute'")
    encoder = {n.removeprefix("encoder."): a for n, a in arrays.items() if n.startswith("encoder.")}
    if not encoder:
        raise UserError("these weights hold no encoder: no name begins with 'encoder.'")
    kept = {n: a for n, a in encoder.items() if not n.startswith(PRETRAINING_ONLY)}
    return {n: reorder_merging(n, a) for n, a in kept.items()} if merging == "permute" else kept


def reorder_merging(name: str, array: np.ndarray) -> np.ndarray:
    """Exchanges the second and third of the four blocks that a merging joins; other arrays stay. Its own inverse."""
    if not re.search(r"downsample\.(reduction\.weight|norm\.(gamma|beta))$", name):
        return array
    blocks = array.reshape(*array.shape[:-1], 4, array.shape[-1] // 4)
    return np.ascontiguousarray(blocks[..., [0, 2, 1, 3], :].reshape(array.shape))

"""SimMIM's golden files: pre-training with its permutations of squares, and fine-tuning of its Swin."""

from __future__ import annotations

import numpy as np

from golden_cases.greenmim import ACTIVATION, GRADIENT, check_buffers, swin_sizes
from golden_cases.replay import Replay, classifier_case
from localmim.convert.names import classifier_from_torch, classifier_to_torch
from localmim.convert.simmim import from_torch, to_torch
from localmim.mim.cells import rows_to_grid
from localmim.mim.replaced_masking import spread
from localmim.mim.simmim import simmim_swin
from localmim.models.classifier import swin_classifier


def swin_case(z, config, compare) -> None:
    """Masks, latents, predictions of hidden squares, loss and gradients on a Swin."""
    model = simmim_swin(**swin_sizes(z, config, "encoder."), mask_size=config["cfg"]["mps"])
    stages = model.encoder.stages
    replay = Replay(z, model, from_torch, lambda arrays: to_torch(arrays, stages))
    compare_pretraining(z, config, compare, replay)
    ours = to_torch({n: p.asnumpy() for n, p in model.parameters_and_names()}, stages)
    check_buffers(z, ours, compare)


def compare_pretraining(z, config, compare, replay: Replay) -> None:
    """What the files of both encoders hold."""
    model = replay.model
    masking = model.masking(config["cfg"]["ratio"], 0)
    mask = masking.of_order(z["rand/perm"])
    compare.check("mask", spread(mask.units, z["mask"].shape[1:]), z["mask"], 0, relative=False)
    latents, predictions, targets = replay.run(*mask.arrays())
    grid, classes = model.decoders[0].grid, model.encoder.class_tokens
    ours = latents[0].asnumpy()[:, classes:].transpose(0, 2, 1).reshape(z["latent"].shape)
    compare.check("latent", ours, z["latent"], ACTIVATION)
    cells = rows_to_grid(predictions[0].asnumpy(), 1.0, mask.ids_mask, grid)  # [B, h, w, C*s*s]
    hidden = spread(mask.units, z["input"].shape[2:])[:, None].repeat(z["input"].shape[1], axis=1)
    compare.check("pred", as_image(cells, z["pred"].shape)[hidden], z["pred"][hidden], ACTIVATION)
    compare.check("target", as_image(targets[0].asnumpy(), z["input"].shape), z["input"], 0, relative=False)
    replay.check(compare, GRADIENT)


def as_image(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What the authors' pixel shuffle makes of predictions: [B, h, w, C*s*s] -> [B, C, H, W]."""
    B, h, w, _ = cells.shape
    _, C, H, W = shape
    return cells.reshape(B, h, w, C, H // h, W // w).transpose(0, 3, 1, 4, 2, 5).reshape(shape)


def swin_ft_case(z, config, compare) -> None:
    """Fine-tuning of a Swin, the official one: norm, then mean."""
    sizes = swin_sizes(z, config, "")
    model = swin_classifier(**sizes, num_classes=config["cfg"]["ncls"], pool="normed_mean", norm_eps=1e-5)
    stages = model.encoder.stages

    def names_to_torch(arrays):
        return classifier_to_torch(arrays, model.pool, stages)

    def names_from_torch(state, ours):
        return classifier_from_torch(state, ours, model.pool)

    classifier_case(z, compare, model, names_from_torch, names_to_torch, GRADIENT)
    check_buffers(z, names_to_torch({n: p.asnumpy() for n, p in model.parameters_and_names()}), compare)


PRETRAINING, FINE_TUNING = {"swin": swin_case}, {"swin": swin_ft_case}
CASES = {
    "simmim_ft": lambda z, config, compare: FINE_TUNING[config["cfg"]["type"]](z, config, compare),
    "simmim": lambda z, config, compare: PRETRAINING[config["cfg"]["type"]](z, config, compare),
}

"""Golden files of ViTs that see mask tokens: MaskFeat (SlowFast's and mmpretrain's), BEiT, SimMIM; block-wise masks."""

from __future__ import annotations

import re

import numpy as np

from golden_cases.common import HOG, check_hog, unambiguous_cells
from golden_cases.mae import vit_sizes
from golden_cases.replay import Replay, classifier_case, thinned
from golden_cases.simmim import FINE_TUNING, PRETRAINING, compare_pretraining
from localmim.convert.load import weights_of
from localmim.convert.mask_token_names import (
    SPELLINGS,
    classifier_spelling,
    from_torch,
    parameters_to_torch,
    spelling_of,
    to_torch,
    torch_name,
)
from localmim.mim.beit import beit_vit
from localmim.mim.block_masking import draw_blocks
from localmim.mim.maskfeat import maskfeat_vit
from localmim.mim.replaced_masking import replaced_mask
from localmim.mim.simmim import simmim_vit
from localmim.models.classifier import vit_classifier

ACTIVATION = 1e-4


def rebuilt(z, config, compare, preset, **arguments) -> Replay:
    """The model of the file's sizes, whatever its spelling, with its weights; compares the stored constants."""
    state = [k.removeprefix("param/") for k in z.files if k.startswith("param/")]
    spelling = SPELLINGS[spelling_of(state)]
    patches, hidden = (
        z["param/" + torch_name(f"encoder.{name}", spelling)].shape
        for name in ("patch_embed.weight", "blocks.0.mlp.fc1.weight")
    )
    block = torch_name("encoder.blocks.0.norm1.gamma", spelling).replace("0", r"\d+", 1)
    model = preset(
        image_size=z["input"].shape[2:],
        patch_size=patches[2],
        in_chans=patches[1],
        embed_dim=patches[0],
        depth=sum(re.fullmatch(block, name) is not None for name in state),
        num_heads=config["cfg"]["h"],
        mlp_ratio=hidden[0] / patches[0],
        **arguments,
    )
    grid = model.encoder.grid
    replay = Replay(
        z,
        model,
        lambda arrays, names: from_torch(arrays, names, spelling, grid),
        lambda arrays: parameters_to_torch(arrays, spelling),
    )
    ours = to_torch(weights_of(model), spelling, grid)
    for key in sorted(k for k in z.files if k.startswith(("param/", "buffer/"))):
        compare.check(key, ours.get(key.partition("/")[2], np.nan), z[key], 1e-6 if key.startswith("buffer/") else 0)
    return replay


def replay_blocks(replay: Replay, compare, *targets: np.ndarray) -> tuple[np.ndarray, ...]:
    """Hidden patches [B, h, w], latent, predictions of hidden patches [hidden, D] row by row, target [B, h, w, D]."""
    z, grid = replay.z, replay.model.encoder.grid
    hidden = z["rand/mask_map"].reshape(-1, *grid) > 0
    mask = replaced_mask(hidden, grid, grid, int(hidden.sum((1, 2)).max()))
    compare.check("mask", mask.mask(), z["mask"].reshape(mask.mask().shape), 0, relative=False)
    latents, predictions, grids = replay.run(*mask.arrays(), *targets)
    replay.check(compare)
    return hidden, latents[0].asnumpy(), predictions[0].asnumpy()[mask.ids_mask >= 0], grids[0].asnumpy()


def maskfeat_case(z, config, compare) -> None:
    """MaskFeat of SlowFast or mmpretrain: HOG, predictions, loss and gradients."""
    hog = config["cfg"]["hog"]
    n, cell, C = hog["nbins"], hog["pool"], z["input"].shape[1]
    own = {"nbins": n, "hog_cell": cell, "hog_window": hog["gaussian_window"], "reference_quirks": True}
    replay = rebuilt(z, config, compare, maskfeat_vit, **own)
    hidden, latent, prediction, target = replay_blocks(replay, compare)

    (B, h, w), s = hidden.shape, z["input"].shape[2] // hidden.shape[1] // cell
    if "hog_raw" in z.files:
        raw = replay.model.target.histograms(target)
        check_hog(compare, "hog_raw", raw, z["hog_raw"].reshape(B, C * n, h * s, w * s), z["input"], cell, n)
    clear = unambiguous_cells(z["input"], cell, n).reshape(B, h, s, w, s, C).transpose(0, 1, 3, 5, 2, 4)
    clear = np.broadcast_to(clear[:, :, :, :, None], (B, h, w, C, n, s, s)).reshape(target.shape)
    theirs = np.full_like(target, np.nan)
    if "target_masked" in z.files:
        theirs[hidden] = z["target_masked"]
        clear = clear & hidden[..., None]
    else:
        flat = theirs.reshape(B, h * w, -1)
        flat[:, z["target_idx"] if "target_sub" in z.files else slice(None)] = z[
            "target_sub" if "target_sub" in z.files else "target"
        ]
        clear = clear & ~np.isnan(theirs)
    compare.check(f"target ({clear.mean():.1%} of values)", target[clear], theirs[clear], HOG, relative=False)
    if "latent" in z.files:
        compare.check("latent", latent, z["latent"], ACTIVATION)
    if "pred_masked" in z.files:
        compare.check("pred_masked", prediction, z["pred_masked"], ACTIVATION)
    flat = np.full((B, h * w, target.shape[-1]), np.nan, np.float32)
    flat[hidden.reshape(B, -1)] = prediction
    for name in ("pred_all", "pred"):
        if name in z.files or f"{name}_sub" in z.files:
            thinned(z, name, flat, compare, hidden=hidden.reshape(B, -1))


def beit_case(z, config, compare) -> None:
    """BEiT: latents, logits of hidden patches, loss and gradients."""
    replay = rebuilt(z, config, compare, beit_vit, vocab=config["cfg"]["vocab"], reference_quirks=True)
    hidden, latent, logits, ids = replay_blocks(replay, compare, z["rand/target_ids"].astype(np.int32))
    compare.check("target_masked", ids[hidden][:, 0], z["target_masked"], 0, relative=False)
    compare.check("latent", latent, z["latent"], ACTIVATION)
    compare.check("logits_masked", logits, z["logits_masked"], ACTIVATION)


def simmim_vit_case(z, config, compare) -> None:
    """Masks, latents, predictions of hidden squares, loss and gradients on a ViT."""
    compare_pretraining(z, config, compare, rebuilt(z, config, compare, simmim_vit, mask_size=config["cfg"]["mps"]))


def simmim_vit_ft_case(z, config, compare) -> None:
    """Fine-tuning of SimMIM's ViT, which is BEiT's: a bias table a block, mean of patches, then norm."""
    sizes, chosen = vit_sizes(z, config["cfg"]["h"]), {"position": "none", "relative": "block", "layer_scale": 0.1}
    model = vit_classifier(**sizes, **chosen, num_classes=config["cfg"]["ncls"])
    spelling, grid = classifier_spelling(model.pool), model.encoder.grid
    classifier_case(
        z,
        compare,
        model,
        lambda arrays, names: from_torch(arrays, names, spelling, grid),
        lambda arrays: parameters_to_torch(arrays, spelling),
    )


class Trace:
    """Random numbers that a reference drew, given out again; remembers what was asked for."""

    def __init__(self, draws: np.ndarray, inclusive: bool):
        self.draws, self.inclusive, self.asked = draws, inclusive, []

    def uniform(self, low: float, high: float) -> float:
        return self._next(0, low, high)

    def below(self, end: int) -> int:
        return int(self._next(1, 0, end - 1 if self.inclusive else end))

    def _next(self, kind: int, low: float, high: float) -> float:
        self.asked.append((kind, low, high))
        return self.draws[len(self.asked) - 1, 3]


def block_masks_case(z, config, compare) -> None:
    """Block-wise masks of both generators, from the random numbers that they drew."""
    for key in sorted(k for k in z.files if k.endswith("/draws")):
        name = key.removesuffix("/draws")
        rule, side, count, least = re.match(r"(\w+)/g(\d+)_n(\d+)_min(\d+)", name).groups()
        trace = Trace(z[key], inclusive=rule == "slowfast")
        mask = draw_blocks(trace, (int(side), int(side)), int(count), int(least), rule)
        compare.check(f"{name}/draws", trace.asked, z[key][:, :3], 1e-12)
        compare.check(f"{name}/mask", mask, z[f"{name}/mask"], 0, relative=False)


PRETRAINING["vit"], FINE_TUNING["vit"] = simmim_vit_case, simmim_vit_ft_case
CASES = {"maskfeat": maskfeat_case, "beit": beit_case, "block mask generators": block_masks_case}

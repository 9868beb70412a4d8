"""MAE's and LoMaR's golden files: pre-training with their random draws, and fine-tuning."""

from __future__ import annotations

import math

import numpy as np

from golden_cases.common import LOSS
from golden_cases.replay import Replay, classifier_case, thinned
from localmim.convert import mae as names
from localmim.convert.names import classifier_from_torch, classifier_to_torch
from localmim.mim.cells import rows_to_grid
from localmim.mim.lomar import lomar_vit
from localmim.mim.mae import mae_vit
from localmim.mim.masking import mask_from_noise, num_visible
from localmim.mim.window_masking import WindowMasking, authors_pairing
from localmim.models.classifier import vit_classifier
from localmim.models.relative import buckets


def vit_sizes(z, heads: int) -> dict:
    """Sizes of a plain ViT out of its images and weights, by the names that MAE's family shares."""
    dim, chans, patch, _ = z["param/patch_embed.proj.weight"].shape
    depth = len({k.split(".")[1] for k in z.files if k.startswith("param/blocks.")})
    return {
        "image_size": z["input"].shape[2:],
        "patch_size": patch,
        "in_chans": chans,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": z["param/blocks.0.mlp.fc1.weight"].shape[0] / dim,
    }


def mae_case(z, config, compare) -> None:
    """Masks, latents, predictions, targets, loss and gradients."""
    cfg = config["cfg"]
    model = mae_vit(
        **vit_sizes(z, cfg["h"]),
        decoder_dim=cfg["dE"],
        decoder_depth=cfg["dD"],
        decoder_heads=cfg["dh"],
        norm_pix=cfg["norm_pix"],
    )
    noise = z["rand/noise"]
    mask = mask_from_noise(noise, num_visible(noise.shape[1], cfg["ratio"]))
    for name in ("ids_keep", "ids_restore"):
        compare.check(name, getattr(mask, name), z[name], 0, relative=False)
    compare.check("mask", mask.mask(), z["mask"], 0, relative=False)
    replay = Replay(z, model, names.from_torch, names.to_torch)
    latents, predictions, targets = replay.run(*mask.arrays())
    compare.check("latent", latents[0].asnumpy(), z["latent"], 1e-4)
    B, L = noise.shape
    ours = rows_to_grid(predictions[0].asnumpy(), 1.0, mask.ids_mask, model.decoders[0].grid).reshape(B, L, -1)
    thinned(z, "pred", ours, compare, hidden=mask.mask())
    thinned(z, "target", targets[0].asnumpy().reshape(B, L, -1), compare)
    replay.check(compare)


def vit_ft_case(z, config, compare) -> None:
    """MAE's fine-tuning."""
    cfg = config["cfg"]
    heads = cfg.get("h", 12)
    model = vit_classifier(**vit_sizes(z, heads), num_classes=cfg["ncls"], pool="mean" if cfg["gp"] else "token")
    classifier_case(z, compare, model, *_classifier_names(model))


def lomar_case(z, config, compare) -> None:
    """Windows, masks, predictions, targets, loss and gradients in the authors' pairing, and the loss as intended."""
    cfg = config["cfg"]
    model = lomar_vit(**vit_sizes(z, cfg["h"]), window=cfg["window"], views=cfg["views"], norm_pix=cfg["norm_pix"])
    V, noise = cfg["views"], z["rand/noise"]
    N, _, cells = noise.shape
    grid = model.encoder.grid
    masking = WindowMasking(grid, cfg["window"], V, True, cfg["ratio"], 0)
    top, left = z["rand/perm_top"][:V], z["rand/perm_left"][:V]
    compare.check("top", top, z["top"], 0, relative=False)
    compare.check("left", left, z["left"], 0, relative=False)
    theirs = masking.of_draws(*authors_pairing(top, left, noise))
    order = (np.arange(N)[:, None] + np.arange(V) * N).ravel()  # their row of each of ours
    compare.check("row_image", np.repeat(np.arange(N), V), z["row_image"][order], 0, relative=False)
    compare.check("token_ids", theirs.ids.reshape(N * V, cells), z["token_ids"][order], 0, relative=False)
    compare.check("mask", theirs.hidden, z["mask"][order], 0, relative=False)
    K = cfg["window"]
    compare.check("bucket_ids", buckets((K, K)), z["bucket_ids"], 0, relative=False)
    replay = Replay(z, model, names.lomar_from_torch, lambda arrays: names.lomar_to_torch(arrays, grid))
    each = np.broadcast_to(np.arange(V), (N, V))  # as intended: each image sees each window
    mask = masking.of_draws(top[each], left[each], noise)
    replay.run(*mask.arrays())
    compare.check("loss_intended", replay.loss, z["loss_intended"], LOSS)
    _, predictions, targets = replay.run(*theirs.arrays())
    hidden = theirs.hidden.astype(bool)
    prediction = predictions[0].asnumpy()
    flat = np.full((N * V, cells, prediction.shape[-1]), np.nan, np.float32)
    flat[hidden] = prediction.reshape(-1, prediction.shape[-1])
    back = np.argsort(order)
    thinned(z, "pred", flat[back], compare, hidden=hidden[back])
    target = targets[0].asnumpy().reshape(N, grid[0] * grid[1], -1)
    rows = np.take_along_axis(target, theirs.ids[..., None], axis=1).reshape(N * V, cells, -1)
    thinned(z, "target", rows[back], compare)
    replay.check(compare)


def lomar_ft_case(z, config, compare) -> None:
    """LoMaR's fine-tuning: iRPE on whole images."""
    dim = z["param/patch_embed.proj.weight"].shape[0]
    heads = dim // z["param/blocks.0.attn.rpe_k.lookup_table_weight"].shape[1]
    sizes = vit_sizes(z, heads)
    model = vit_classifier(
        **sizes,
        num_classes=config["cfg"]["ncls"],
        pool="mean" if config["cfg"].get("gp", True) else "token",
        position="none",
        relative="contextual",
    )
    side = math.isqrt(z["bucket_ids"].shape[0] - 1)
    compare.check("bucket_ids", buckets((side, side)), z["bucket_ids"], 0, relative=False)
    classifier_case(z, compare, model, *_classifier_names(model))


def _classifier_names(model):
    return (
        lambda state, ours: classifier_from_torch(state, ours, model.pool),
        lambda arrays: classifier_to_torch(arrays, model.pool),
    )


CASES = {"mae_ft": vit_ft_case, "mae": mae_case, "lomar_ft": lomar_ft_case, "lomar": lomar_case}

"""ConvMAE's and FastConvMAE's golden files: pre-training, EasyCV's variant of it, fine-tuning, the detection backbone.

Hidden positions of stages 1 and 2 do not exist here, so these stages are compared at visible ones.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn

from golden_cases.replay import Replay, classifier_case, thinned
from localmim.convert import convmae as names
from localmim.convert.names import classifier_from_torch, classifier_to_torch
from localmim.mim.cells import rows_to_grid
from localmim.mim.complementary_masking import ComplementaryMasking, complementary_masks
from localmim.mim.convmae import convmae
from localmim.mim.masking import mask_from_noise, num_visible
from localmim.models.classifier import convvit_classifier
from localmim.models.convvit import SIDES, ConvViT
from localmim.models.windows import nested_offsets, whole_windows

TOLERANCE = 1e-4


def sizes(z, config) -> dict:
    """A ConvViT's sizes out of a file's config, images and weights."""
    cfg = config["cfg"]
    hidden, width = next(
        z[k].shape for k in z.files if k.endswith("blocks3.0.mlp.fc1.weight") and k.startswith("param/")
    )
    return {
        "image_size": z["input"].shape[2:],
        "in_chans": z["input"].shape[1],
        "embed_dims": cfg["E"],
        "depths": cfg["D"],
        "num_heads": cfg["h"],
        "mlp_ratio": hidden / width,
    }


class Stages(nn.Cell):
    """A pre-training model's loss, and beside it stages, latents, predictions, targets and errors of rows."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def construct(self, images, *mask):
        model = self.model
        loss, _ = model(images, *mask)
        stages = model.encoder.stages(model.encoder.block_outputs(images, *mask))
        predictions, targets = model.predict(images, *mask), model.targets(images, *mask)
        rows, _ = model.decoders[0].expected(targets[0], *mask)
        errors = model.error(predictions[0], rows)
        return loss, stages, model.encoder(images, *mask), predictions, targets, errors


def visible_places(ids: np.ndarray, grid: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column on a stage's grid of each position of visible patches ids [B, K]: two of [B, K*side*side]."""
    i, j = np.divmod(ids, grid[1])
    places = nested_offsets(side, rows_first=True)
    return tuple((a[..., None] * side + places[:, axis]).reshape(len(ids), -1) for axis, a in enumerate((i, j)))


def check_stage(z, compare, name: str, rows: np.ndarray, image: np.ndarray, places) -> None:
    """Rows [R, K*side*side, C] of images `image` [R] against a map, or every 7th row and column of it."""
    step = 7 if f"{name}_sub" in z.files else 1
    theirs = z[f"{name}_sub"] if step > 1 else z[name]
    row, column = places
    stored = (row % step == 0) & (column % step == 0)
    theirs = theirs[image[:, None], :, row // step % theirs.shape[2], column // step % theirs.shape[3]]
    compare.check(f"{name} ({stored.sum()} positions)", rows[stored], theirs[stored], TOLERANCE)


def pretraining_case(z, config, compare) -> None:
    """Masks, stages, latents, predictions, targets, errors, loss and gradients."""
    cfg, noise = config["cfg"], z["rand/noise"]
    fast = "fastconvmae" in config["method"]
    model = convmae(
        **sizes(z, config),
        decoder_dim=cfg["dE"],
        decoder_depth=cfg["dD"],
        decoder_heads=cfg["dh"],
        norm_pix=cfg["norm_pix"],
    )
    B, L = noise.shape
    views, order = 1, np.arange(B)
    if fast:
        views = ComplementaryMasking(L, cfg["ratio"], 0).views
        mask = complementary_masks(noise, views)
        order = np.arange(B * views).reshape(views, B).T.ravel()  # their row i*B + b of each of ours, b*V + i
    else:
        mask = mask_from_noise(noise, num_visible(L, cfg["ratio"]))
    hidden = mask.ids_restore >= mask.ids_keep.shape[1]  # [B*V, L]
    if "ids_keep" in z.files:
        compare.check("ids_keep", mask.ids_keep, z["ids_keep"].reshape(B * views, -1)[order], 0, relative=False)
    compare.check("ids_restore", mask.ids_restore[::views], z["ids_restore"], 0, relative=False)
    compare.check("mask", hidden, z["mask"][order], 0, relative=False)
    easycv = names.is_easycv(k.removeprefix("param/") for k in z.files)
    replay = Replay(z, model, names.from_torch, lambda arrays: names.to_torch(arrays, easycv), Stages(model))
    stages, latents, predictions, targets, errors = replay.run(*mask.arrays())
    image, encoder = np.repeat(np.arange(B), views), model.encoder
    for s, side in enumerate(SIDES):
        name = f"stage{s + 1}"
        if name in z.files or f"{name}_sub" in z.files:
            places = visible_places(mask.ids_keep, encoder.grid, side)
            check_stage(z, compare, name, stages[s].asnumpy(), image, places)
    back = np.argsort(order)
    if "stage3" in z.files or "stage3_sub" in z.files:
        thinned(z, "stage3", stages[2].asnumpy()[back], compare)
    thinned(z, "latent", latents[0].asnumpy()[back], compare)
    ours = rows_to_grid(predictions[0].asnumpy(), 1.0, mask.ids_mask, encoder.grid).reshape(B * views, L, -1)
    thinned(z, "pred", ours[back], compare, hidden=hidden[back])
    thinned(z, "target", targets[0].asnumpy().reshape(B, L, -1), compare)
    if "per_patch_err" in z.files:
        theirs = np.take_along_axis(z["per_patch_err"][order], mask.ids_mask.astype(np.int64), axis=1)
        compare.check("per_patch_err", errors.asnumpy(), theirs, TOLERANCE)
    replay.check(compare)


def ft_case(z, config, compare) -> None:
    """Fine-tuning: logits, cross-entropy, gradients."""
    model = convvit_classifier(**sizes(z, config), num_classes=config["cfg"]["ncls"])
    classifier_case(
        z,
        compare,
        model,
        lambda state, ours: classifier_from_torch(state, ours, model.pool),
        lambda arrays: classifier_to_torch(arrays, model.pool),
    )


class Maps(nn.Cell):
    """An encoder's four maps, and as the loss the mean of each times numbers from -1 to 1."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def construct(self, images):
        loss, maps = 0.0, self.model.feature_maps(images)
        for x in maps:
            count = x.size
            ramp = Tensor(np.linspace(-1, 1, count, dtype=np.float32).reshape(1, count))
            loss = loss + (x.reshape(count) * ramp.reshape(count)).mean()
        return loss, maps


def detection_case(z, config, compare) -> None:
    """Four maps of a whole image, windows and biases, gradients."""
    window = config["cfg"]["win"]
    model = ConvViT(**sizes(z, config), window_size=window)
    index = "buffer/windowed_rel_pos_bias.relative_position_index"
    if index in z.files:
        compare.check(index, whole_windows((window, window), window, 0).pairs[0], z[index], 0, relative=False)
    replay = Replay(z, model, names.encoder_from_torch, names.encoder_to_torch, Maps(model))
    (maps,) = replay.run()
    for k, x in enumerate(maps):
        compare.check(f"s{k}", x.asnumpy(), z[f"s{k}"], TOLERANCE)
    replay.check(compare)


CASES = {
    "convmae": pretraining_case,
    "fastconvmae": pretraining_case,
    "easycv_fastconvmae": pretraining_case,
    "convmae_ft": ft_case,
    "convvit_det": detection_case,
}

"""LocalMIM's golden files: HOG alone, pre-training and fine-tuning of ViT and Swin, windows, tables and schedules."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from golden_cases.common import ACTIVATION, GRADIENT, LOSS, check_hog
from localmim.convert.load import load_weights
from localmim.convert.names import classifier_from_torch, classifier_torch_name, from_torch, torch_name
from localmim.data.mix import Mix
from localmim.mim.cells import rows_to_grid
from localmim.mim.hog import Hog
from localmim.mim.localmim import localmim_swin, localmim_vit
from localmim.mim.masking import mask_from_noise, mask_from_shuffle
from localmim.mim.unit_masking import UnitMasking
from localmim.models.classifier import swin_classifier, vit_classifier
from localmim.models.layers import sincos_position_code
from localmim.models.resize import resize_position_code
from localmim.models.swin import SwinTransformer
from localmim.models.windows import pack
from localmim.training.classification import ClassificationLoss
from localmim.training.schedule import WarmupCosine
from plain import Gradients


def hog_case(z, config, compare) -> None:
    """The operator alone, all cells in one pass, with and without bias."""
    images, cells, nbins = z["input"], config["pools"], config["nbins"]
    for variant in ("nobias", "bias"):
        if f"{variant}/pool{cells[0]}/out" not in z.files:
            continue
        bias = np.stack([z[f"bias/pool{c}/conv_bias"] for c in cells]) if variant == "bias" else [None] * len(cells)
        outputs = Hog(cells, nbins, bias if variant == "bias" else None)(Tensor(images))
        for cell, out, b in zip(cells, outputs, bias):
            name = f"{variant}/pool{cell}/out"
            check_hog(compare, name, out.asnumpy(), z[name], images, cell, nbins, b)


class Probe(nn.Cell):
    """The model's loss, and as auxiliary outputs everything that a golden file can hold."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.pyramid = isinstance(model.encoder, SwinTransformer)

    def construct(self, images, *mask):
        model = self.model
        if self.pyramid:
            embedded, outputs = model.encoder.embed(images, *mask), model.encoder.stage_outputs(images, *mask)
        else:
            embedded, outputs = model.encoder.patch_embed(images), model.encoder.block_outputs(images, *mask)
        latents = model.encoder(images, *mask)
        targets = model.targets(images, *mask)
        rows, predictions, losses = [], [], []
        for k in range(len(latents)):
            ids_keep, ids_mask, ids_restore = model.encoder.tap_mask(mask, k)
            rows.append(model.decoders[k].rows(latents[k], ids_keep, ids_mask))
            predictions.append(model.decoders[k].head(rows[k], ids_restore))
            losses.append(model.loss(k, predictions[k], targets[k], *mask))
        loss, _ = model(images, *mask)
        return loss, embedded, outputs, latents, rows, predictions, targets, losses


class MimReplay:
    """A golden file's model with its weights, run once with its mask; compares what every LocalMIM file holds."""

    def __init__(self, z, config, compare, model):
        self.z, self.compare, self.model, self.images = z, compare, model, z["input"]
        self.scales = [d.scale for d in model.decoders]
        self.names = [n for n, _ in model.parameters_and_names()]
        self.state = {k[len("param/") :]: z[k] for k in z.files if k.startswith("param/")}
        load_weights(model, from_torch(self.state, self.names, self.scales))
        self.nbins = config["hog_nbins"]

    def run(self, mask) -> None:
        trainable = {n: p for n, p in self.model.parameters_and_names() if p.requires_grad}
        run = Gradients(Probe(self.model), None, ms.ParameterTuple(trainable.values()))
        (self.loss, *aux), gradients = run(Tensor(self.images), *(Tensor(a) for a in mask.arrays()))
        self.embedded, self.outputs, self.latents, self.rows, self.predictions, self.targets, self.losses = aux
        pyramid = isinstance(self.model.encoder, SwinTransformer)
        self.gradients = {torch_name(n, self.scales, pyramid): g.asnumpy() for n, g in zip(trainable, gradients)}

    def grid(self, k: int, mask) -> tuple[np.ndarray, np.ndarray]:
        """Predictions on the grid of cells, flat [B, cells, D], and which of them are there [B, cells]."""
        grid = rows_to_grid(
            self.predictions[k].asnumpy(), self.scales[k], mask.tap(k).ids_mask, self.model.decoders[k].grid
        )
        flat = grid.reshape(grid.shape[0], -1, grid.shape[-1])
        return flat, ~np.isnan(flat[..., 0])

    def check_hog_target(self, k: int) -> None:
        target = self.targets[k].asnumpy()
        B, h, w, D = target.shape
        theirs = self.z[f"target/{k}"].reshape(B, h, w, D).transpose(0, 3, 1, 2)
        ours, bias = target.reshape(B, h, w, self.images.shape[1], -1), self.state.get(f"hog_enc.{k}.conv.bias")
        cell = self.images.shape[2] // h
        check_hog(self.compare, f"target/{k}", ours, theirs, self.images, cell, self.nbins, bias)

    def check_losses_and_gradients(self) -> None:
        z, check = self.z, self.compare.check
        for k, loss in enumerate(self.losses):
            check(f"loss/{k}", loss.asnumpy(), z[f"loss/{k}"], LOSS)
        check("loss", self.loss.asnumpy(), z["loss"], LOSS)
        for key in sorted(k for k in z.files if k.startswith("grad/")):
            check(key, self.gradients[key[len("grad/") :]], z[key], GRADIENT)
        norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in self.gradients.values()))
        check("grad_global_norm", norm, z["grad_global_norm"], GRADIENT)


def vit_mim_case(z, config, compare) -> None:
    """LocalMIM on a ViT: latents, predictions, targets, losses and gradients."""
    images, scales = z["input"], [float(s) for s in config["scales"]]
    model = localmim_vit(
        image_size=images.shape[2:],
        patch_size=config["patch_size"],
        in_chans=images.shape[1],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        taps=config["taps"],
        scales=scales,
        decoder_dim=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_num_heads"],
        nbins=config["hog_nbins"],
        hog_bias=bool(config["hog_bias"]),
    )
    replay = MimReplay(z, config, compare, model)
    keep = z["ids_keep"].shape[1]
    mask = mask_from_noise(z["noise"], keep) if "noise" in z.files else mask_from_shuffle(z["ids_shuffle"], keep)
    compare.check("ids_keep", mask.ids_keep, z["ids_keep"], 0, relative=False)
    compare.check("mask", mask.mask(), z["mask"].reshape(mask.mask().shape), 0, relative=False)
    replay.run(mask)
    compare.check("patch_embed", replay.embedded.asnumpy(), z["patch_embed"], ACTIVATION)
    for i, x in enumerate(replay.outputs):
        compare.check(f"block/{i}", x.asnumpy(), z[f"block/{i}"], ACTIVATION)
    for k, scale in enumerate(scales):
        compare.check(f"latent/{k}", replay.latents[k].asnumpy(), z[f"latent/{k}"], ACTIVATION)
        ids = mask.ids_mask if scale >= 1 else np.concatenate([mask.ids_keep, mask.ids_mask], 1)
        theirs = np.take_along_axis(z[f"decoder_norm/{k}"], ids[..., None] + 1, axis=1)
        compare.check(f"decoder_norm/{k}", replay.rows[k].asnumpy(), theirs, ACTIVATION)
        ours, read = replay.grid(k, mask)
        if scale >= 1:
            compare.check(f"recal_mask/{k}", read, z[f"recal_mask/{k}"] > 0, 0, relative=False)
        compare.check(f"pred/{k}", ours[read], z[f"pred/{k}"][read], ACTIVATION)
        replay.check_hog_target(k)
    replay.check_losses_and_gradients()


def unit_major(grid: tuple[int, int], units: tuple[int, int]) -> np.ndarray:
    """Row-major token numbers in the authors' order: unit by unit, row by row inside a unit. [units, r*r]"""
    (h, w), (a, b) = grid, units
    return np.arange(h * w).reshape(a, h // a, b, w // b).transpose(0, 2, 1, 3).reshape(a * b, -1)


def their_order(ours: np.ndarray, grid, units, hidden: np.ndarray) -> np.ndarray:
    """Places, in our order of visible tokens (row-major numbers `ours`), of the authors' order."""
    place = np.full(grid[0] * grid[1], -1)
    place[ours] = np.arange(len(ours))
    return place[unit_major(grid, units)[~hidden].ravel()]


def pair_matrix(windows, window: int) -> np.ndarray:
    """[N, N]: the bias row of each pair of tokens, (2w - 1)^2 where they do not attend to one another."""
    never = (2 * window - 1) ** 2
    group, slot = np.divmod(windows.place, windows.pairs.shape[1])
    rows = np.full((len(slot), len(slot)), never)
    same = group[:, None] == group[None]
    rows[same] = windows.pairs[group[:, None], slot[:, None], slot[None]][same]
    return rows


def check_windows(z, compare, prefix: str, masking: UnitMasking, hidden: np.ndarray) -> list[np.ndarray]:
    """Coordinates, windows and who attends to whom at every stage; returns their order of tokens, one a stage."""
    mask = masking.mask_of(hidden, 1)
    windows, orders = iter(mask.windows), []

    def exact(name, ours, theirs):
        compare.check(prefix + name, ours, theirs, 0, relative=False)

    for s, (stage, coordinates) in enumerate(zip(masking.stages, masking.coordinates)):
        order = their_order(masking.tokens[s][~hidden].ravel(), stage.grid, masking.units, hidden)
        orders.append(order)
        exact(f"stage{s}/coords", coordinates[~hidden].reshape(-1, 2)[order], z[f"{prefix}stage{s}/coords"])
        exact(f"stage{s}/window", stage.window, z[f"{prefix}stage{s}/window"])
        for kind, shift in zip(("plain", "shift"), stage.shifts):
            name = f"stage{s}/{kind}"
            exact(f"{name}/shift", shift, z[f"{prefix}{name}/shift"])
            rows = pair_matrix(next(windows), stage.window)[order][:, order]
            attend, labels = rows < (2 * stage.window - 1) ** 2, z[f"{prefix}{name}/window_label"]
            exact(f"{name}/window_label", attend, labels[:, None] == labels[None])
            if f"{prefix}{name}/rel_pos_idx" in z.files:
                theirs, seen = their_pairs(z, prefix + name, len(labels))
                exact(f"{name}/rel_pos_idx", np.where(attend, rows, 0), np.where(seen, theirs, 0))
    for k, tap in enumerate(mask.taps):
        if f"{prefix}ids_restore/{k}" in z.files:
            visible = z[f"{prefix}ids_restore/{k}"] < tap.ids_keep.shape[1]
            numbers = unit_major(masking.tap_grids[k], masking.units).ravel()
            exact(f"ids_restore/{k} (visible)", tap.mask()[0][numbers] == 0, visible)
    return orders


def their_pairs(z, name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The authors' bias rows as [N, N] and where their mask lets tokens attend, out of groups or one dense mask."""
    index, open_ = z[f"{name}/rel_pos_idx"], z[f"{name}/attn_mask"] == 0
    rows, seen = np.zeros((count, count), np.int64), np.zeros((count, count), bool)
    if f"{name}/idx_shuffle" not in z.files:
        return index[0], open_[0]
    for tokens, real, i, o in zip(
        z[f"{name}/idx_shuffle"].reshape(index.shape[:2]), z[f"{name}/real_slot"], index, open_
    ):
        place = np.ix_(tokens[real], tokens[real])
        rows[place], seen[place] = i[np.ix_(real, real)], o[np.ix_(real, real)]
    return rows, seen


def swin_mim_case(z, config, compare) -> None:
    """LocalMIM on a Swin, quirks on: windows, stages, latents, predictions, targets, losses and gradients."""
    images, hog = z["input"], config["target"].lower() == "hog"
    B, C, H, W = images.shape
    model = localmim_swin(
        image_size=(H, W),
        patch_size=config["patch_size"],
        in_chans=C,
        embed_dim=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        window_size=config["window_size"],
        mlp_ratio=config["mlp_ratio"],
        decoder_dim=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_num_heads"],
        target="hog" if hog else "pixels",
        nbins=config["hog_nbins"],
        hog_bias=bool(config["hog_bias"]),
        norm_pix=bool(config["norm_pix_loss"]),
        reference_quirks=True,
    )
    replay = MimReplay(z, config, compare, model)
    encoder = model.encoder
    masking = UnitMasking(encoder, config["mask_ratio"], 0)
    hidden = z["mask"].astype(bool).ravel()
    compare.check("mask", z["perm"] >= len(hidden) - masking.keep, ~hidden, 0, relative=False)
    orders = check_windows(z, compare, "", masking, hidden)
    mask = masking.mask_of(hidden, B)
    replay.run(mask)
    if "x_vis_stage0" in z.files:
        compare.check("x_vis_stage0", replay.embedded.asnumpy()[:, orders[0]], z["x_vis_stage0"], ACTIVATION)
    last = len(orders) - 1
    for i, x in enumerate(replay.outputs):
        s, merged = divmod(i, 2)
        name = f"stage{s}/{'out' if merged else 'before_down'}"
        if name in z.files:
            compare.check(name, x.asnumpy()[:, orders[min(s + merged, last)]], z[name], ACTIVATION)
    for k in range(len(model.decoders)):
        order = orders[min(k + 1, last)]
        compare.check(f"latent/{k}", replay.latents[k].asnumpy()[:, order], z[f"latent/{k}"], ACTIVATION)
        ours, read = replay.grid(k, mask)
        compare.check(f"recal_mask/{k}", read[0], z[f"recal_mask/{k}"] > 0, 0, relative=False)
        target = replay.targets[k].asnumpy().reshape(B, -1, ours.shape[-1])
        error = ((ours - target) ** 2).mean(-1)
        compare.check(f"per_patch_mse/{k}", error[read], z[f"per_patch_mse/{k}"][read], ACTIVATION)
        if f"pred/{k}" in z.files:
            compare.check(f"pred/{k}", ours[read], z[f"pred/{k}"][read], ACTIVATION)
        if f"target/{k}" in z.files and hog:
            replay.check_hog_target(k)
        if f"rows/{k}" in z.files:
            rows = z[f"rows/{k}"]
            seen = read[0][rows]
            compare.check(f"pred_rows/{k}", ours[:, rows[seen]], z[f"pred_rows/{k}"][:, seen], ACTIVATION)
            compare.check(f"target_rows/{k}", target[:, rows], z[f"target_rows/{k}"], ACTIVATION)
    replay.check_losses_and_gradients()


def swin_grouping_case(z, config, compare) -> None:
    """Masks, coordinates and windows alone: several windows, ratios and seeds at 224 px, and their knapsack inputs."""
    for entry in config["entries"]:
        prefix, window = entry["prefix"], entry["window"]
        encoder = SwinTransformer(224, 4, 3, 4, (2, 2, 2, 2), (1, 1, 1, 1), window, taps=(0, 1, 2, 3), rows_first=True)
        masking = UnitMasking(encoder, entry["mask_ratio"], 0)
        hidden = z[f"{prefix}mask"].astype(bool).ravel()
        compare.check(f"{prefix}mask", z[f"{prefix}perm"] >= len(hidden) - masking.keep, ~hidden, 0, relative=False)
        check_windows(z, compare, prefix, masking, hidden)
    for i, example in enumerate(config.get("group_windows_examples", [])):
        group, begin = pack(example["counts"], example["capacity"])
        used = np.bincount(group, example["counts"])
        ends = [b + c for b, c in zip(begin, example["counts"])]
        compare.check(f"packing {i}: tokens", used.sum(), sum(example["group_totals"]), 0, relative=False)
        compare.check(f"packing {i}: capacity kept", max(ends) <= example["capacity"], True, 0, relative=False)


def misc_case(z, config, compare) -> None:
    """Sine-cosine codes, a resized position code, and learning-rate schedules."""
    for dim, grid in config["sincos"]:
        code = np.concatenate([np.zeros((1, dim), np.float32), sincos_position_code(dim, (grid, grid))])
        compare.check(f"sincos/d{dim}_g{grid}_cls", code, z[f"sincos/d{dim}_g{grid}_cls"], 1e-6)
    code, resized = z["interp/in"], z["interp/out"]
    grids = [(math.isqrt(a.shape[1] - 1),) * 2 for a in (code, resized)]
    compare.check("interp", resize_position_code(code, *grids), resized, 1e-5)
    for name, recipe in config["lr_recipes"].items():
        schedule = WarmupCosine(recipe["lr"], recipe["min_lr"], recipe["warmup_epochs"], recipe["epochs"], 10**6)
        ours = [schedule.at(e * 10**6) for e in z[f"lr/{name}/epoch"]]
        compare.check(f"lr/{name}", ours, z[f"lr/{name}/lr"], 1e-9)


class ClassifierProbe(nn.Cell):
    """The training loss of a classifier, and as auxiliary outputs its blocks or stages, features and logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.loss = ClassificationLoss(model)
        self.pyramid = isinstance(model.encoder, SwinTransformer)

    def construct(self, images, targets):
        model = self.model
        outputs = model.encoder.whole_stages(images) if self.pyramid else model.encoder.block_outputs(images)
        loss, _ = self.loss(images, targets)
        return loss, outputs, model.norm(model.features(images)), model(images)


class ClassifierReplay:
    """A golden classifier with its weights, run once on its soft targets."""

    def __init__(self, z, config, model):
        self.z, self.config, self.model, self.images = z, config, model, z["input"]
        names = [n for n, _ in model.parameters_and_names()]
        state = {k[len("param/") :]: z[k] for k in z.files if k.startswith("param/")}
        load_weights(model, classifier_from_torch(state, names, model.pool))
        trainable = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
        self.graph = Gradients(ClassifierProbe(model), None, ms.ParameterTuple(trainable.values()))
        (self.loss, self.outputs, self.features, self.logits), gradients = self.graph(
            Tensor(self.images), Tensor(z["soft_target"])
        )
        pyramid = isinstance(model.encoder, SwinTransformer)
        self.gradients = {
            classifier_torch_name(n, model.pool, pyramid): g.asnumpy() for n, g in zip(trainable, gradients)
        }

    def check(self, compare) -> None:
        """Everything behind the blocks: features, logits, both losses, gradients."""
        z = self.z
        compare.check("features", self.features.asnumpy(), z["features"], ACTIVATION)
        compare.check("logits", self.logits.asnumpy(), z["logits"], ACTIVATION)
        compare.check("loss_soft", self.loss.asnumpy(), z["loss_soft"], LOSS)
        _, targets = Mix(self.model.num_classes, label_smoothing=0.1)(self.images, z["hard_target"], 0, 0)
        (loss, *_), _ = self.graph(Tensor(self.images), Tensor(targets))
        compare.check("loss_hard_smooth0.1", loss.asnumpy(), z["loss_hard_smooth0.1"], LOSS)
        for key in sorted(k for k in z.files if k.startswith("grad/")):
            compare.check(key, self.gradients[key[len("grad/") :]], z[key], GRADIENT)
        if "grad_global_norm" in z.files:
            norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in self.gradients.values()))
            compare.check("grad_global_norm", norm, z["grad_global_norm"], GRADIENT)


def vit_cls_case(z, config, compare) -> None:
    """Fine-tuning of a ViT: blocks, features, logits, losses and gradients."""
    images = z["input"]
    model = vit_classifier(
        image_size=images.shape[2:],
        patch_size=config["patch_size"],
        in_chans=images.shape[1],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=config.get("mlp_ratio", 4.0),
        num_classes=config["num_classes"],
        pool="mean" if config.get("global_pool", True) else "token",
    )
    replay = ClassifierReplay(z, config, model)
    for i, x in enumerate(replay.outputs):
        compare.check(f"block/{i}", x.asnumpy(), z[f"block/{i}"], ACTIVATION)
    replay.check(compare)


def swin_cls_case(z, config, compare) -> None:
    """Fine-tuning of a Swin, eps quirk on: stages after their merging, features, logits, losses and gradients."""
    images = z["input"]
    model = swin_classifier(
        image_size=images.shape[2:],
        patch_size=config["patch_size"],
        in_chans=images.shape[1],
        embed_dim=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        window_size=config["window_size"],
        mlp_ratio=config.get("mlp_ratio", 4.0),
        num_classes=config["num_classes"],
        reference_quirks=True,
    )
    replay = ClassifierReplay(z, config, model)
    for s in range(len(config["depths"])):
        compare.check(f"stage/{s}", replay.outputs[2 * s + 1].asnumpy(), z[f"stage/{s}"], ACTIVATION)
    replay.check(compare)


CASES = {
    "hog": hog_case,
    "vit_mim": vit_mim_case,
    "swin_mim": swin_mim_case,
    "swin_grouping": swin_grouping_case,
    "vit_cls": vit_cls_case,
    "swin_cls": swin_cls_case,
    "misc": misc_case,
}

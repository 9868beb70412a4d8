"""Compares this project with values computed by the authors' code: `python tests/parity.py FILE.npz …`

Each file is rebuilt as a case: the model from its config, its weights through the name mapping that users get, its mask
replayed, in graph mode. One line a value, exit code 1 on a mismatch, 2 where nothing could be compared. Only what the
loss reads exists here, so predictions are compared at hidden cells. HOG cells that hold a pixel within 1e-4 of a bin's
edge, but not exactly on it, are left out: there rounding chooses the bin.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from localmim.convert.load import load_weights
from localmim.convert.names import from_torch, torch_name
from localmim.mim.cells import rows_to_grid
from localmim.mim.hog import Hog
from localmim.mim.localmim import localmim_vit
from localmim.mim.masking import mask_from_noise, mask_from_shuffle
from localmim.models.layers import sincos_position_code
from localmim.training.schedule import WarmupCosine
from plain import Gradients

HOG, ACTIVATION, LOSS, GRADIENT = 1e-5, 2e-5, 1e-5, 1e-4


class Comparison:
    """Prints one line a value and remembers whether all agreed."""

    def __init__(self):
        self.count = self.failures = 0

    def check(self, name: str, ours, theirs, tolerance: float, relative: bool = True) -> None:
        """Largest difference, by default relative to the largest magnitude; NaN in `ours` is a mismatch."""
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        self.count += 1
        if ours.shape != theirs.shape:
            difference, text = np.inf, f"shape {list(ours.shape)} for {list(theirs.shape)}"
        else:
            difference = float(np.abs(ours - theirs).max()) if ours.size else 0.0
            if relative:
                difference /= max(float(np.abs(theirs).max()) if theirs.size else 0.0, 1e-12)
            text = f"{difference:.2e} (at most {tolerance:.0e}), {ours.size} values"
        good = difference <= tolerance
        self.failures += not good
        print(f"{'ok  ' if good else 'FAIL'} {name:44s} {text}")


def unambiguous_cells(images: np.ndarray, cell: int, nbins: int, bias=None) -> np.ndarray:
    """[B, H/cell, W/cell, C] bool: cells without a pixel whose bin rounding could change (see the module docstring)."""
    x = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    rows = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    cols = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    gx, gy = rows[..., :-2] - rows[..., 2:], cols[:, :, :-2] - cols[:, :, 2:]
    if bias is not None:
        gx, gy = gx + bias[0], gy + bias[1]
    place = np.arctan2(gx, gy) / np.pi * nbins
    near = (np.abs(place - np.round(place)) < 1e-4) & (gx != 0) & (gy != 0)
    B, C, H, W = near.shape
    return ~near.reshape(B, C, H // cell, cell, W // cell, cell).any(axis=(3, 5)).transpose(0, 2, 3, 1)


def check_hog(compare, name, ours, theirs, images, cell, nbins, bias=None) -> None:
    """ours [B, h, w, C, nbins] against theirs [B, C*nbins, h, w]."""
    B, h, w, C, n = ours.shape
    theirs = theirs.reshape(B, C, n, h, w).transpose(0, 3, 4, 1, 2)
    clear = unambiguous_cells(images, cell, nbins, bias)
    compare.check(f"{name} ({clear.mean():.1%} of cells)", ours[clear], theirs[clear], HOG, relative=False)


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

    def construct(self, images, ids_keep, ids_mask, ids_restore):
        model = self.model
        patches = model.encoder.patch_embed(images)
        blocks = model.encoder.block_outputs(images, ids_keep)
        latents = model.encoder(images, ids_keep)
        targets = model.target(images)
        rows, predictions, losses = [], [], []
        for k in range(len(latents)):
            rows.append(model.decoders[k].rows(latents[k], ids_keep, ids_mask))
            predictions.append(model.decoders[k].head(rows[k], ids_restore))
            losses.append(model.loss(k, predictions[k], targets[k], ids_keep, ids_mask, ids_restore))
        loss, _ = model(images, ids_keep, ids_mask, ids_restore)
        return loss, patches, blocks, latents, rows, predictions, targets, losses


def vit_mim_case(z, config, compare) -> None:
    """LocalMIM on a ViT: latents, predictions, targets, losses and gradients."""
    images, scales = z["input"], [float(s) for s in config["scales"]]
    H, W = images.shape[2:]
    model = localmim_vit(
        image_size=(H, W),
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
    names = [n for n, _ in model.parameters_and_names()]
    state = {k[len("param/") :]: z[k] for k in z.files if k.startswith("param/")}
    load_weights(model, from_torch(state, names, scales))
    keep = z["ids_keep"].shape[1]
    mask = mask_from_noise(z["noise"], keep) if "noise" in z.files else mask_from_shuffle(z["ids_shuffle"], keep)
    compare.check("ids_keep", mask.ids_keep, z["ids_keep"], 0, relative=False)
    compare.check("mask", mask.mask(), z["mask"].reshape(mask.mask().shape), 0, relative=False)

    trainable = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
    run = Gradients(Probe(model), None, ms.ParameterTuple(trainable.values()))
    (loss, *aux), gradients = run(Tensor(images), *(Tensor(a) for a in mask.arrays()))
    patches, blocks, latents, rows, predictions, targets, losses = aux
    compare.check("patch_embed", patches.asnumpy(), z["patch_embed"], ACTIVATION)
    for i, x in enumerate(blocks):
        compare.check(f"block/{i}", x.asnumpy(), z[f"block/{i}"], ACTIVATION)
    for k, scale in enumerate(scales):
        compare.check(f"latent/{k}", latents[k].asnumpy(), z[f"latent/{k}"], ACTIVATION)
        ids = mask.ids_mask if scale >= 1 else np.concatenate([mask.ids_keep, mask.ids_mask], 1)
        theirs = np.take_along_axis(z[f"decoder_norm/{k}"], ids[..., None] + 1, axis=1)
        compare.check(f"decoder_norm/{k}", rows[k].asnumpy(), theirs, ACTIVATION)
        grid = rows_to_grid(predictions[k].asnumpy(), scale, mask.ids_mask, model.encoder.grid)
        ours = grid.reshape(grid.shape[0], -1, grid.shape[-1])
        read = ~np.isnan(ours[..., 0])
        if scale >= 1:
            compare.check(f"recal_mask/{k}", read, z[f"recal_mask/{k}"] > 0, 0, relative=False)
        compare.check(f"pred/{k}", ours[read], z[f"pred/{k}"][read], ACTIVATION)
        target = targets[k].asnumpy()
        B, h, w, D = target.shape
        bias = state.get(f"hog_enc.{k}.conv.bias")
        theirs = z[f"target/{k}"].reshape(B, h, w, D).transpose(0, 3, 1, 2)
        ours = target.reshape(B, h, w, images.shape[1], -1)
        check_hog(compare, f"target/{k}", ours, theirs, images, H // h, config["hog_nbins"], bias)
        compare.check(f"loss/{k}", losses[k].asnumpy(), z[f"loss/{k}"], LOSS)
    compare.check("loss", loss.asnumpy(), z["loss"], LOSS)
    ours = {torch_name(n, scales): g.asnumpy() for n, g in zip(trainable, gradients)}
    for key in sorted(k for k in z.files if k.startswith("grad/")):
        compare.check(key, ours[key[len("grad/") :]], z[key], GRADIENT)
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in ours.values()))
    compare.check("grad_global_norm", norm, z["grad_global_norm"], GRADIENT)


def misc_case(z, config, compare) -> None:
    """Sine-cosine codes and learning-rate schedules."""
    for dim, grid in config["sincos"]:
        code = np.concatenate([np.zeros((1, dim), np.float32), sincos_position_code(dim, (grid, grid))])
        compare.check(f"sincos/d{dim}_g{grid}_cls", code, z[f"sincos/d{dim}_g{grid}_cls"], 1e-6)
    for name, recipe in config["lr_recipes"].items():
        schedule = WarmupCosine(recipe["lr"], recipe["min_lr"], recipe["warmup_epochs"], recipe["epochs"], 10**6)
        ours = [schedule.at(e * 10**6) for e in z[f"lr/{name}/epoch"]]
        compare.check(f"lr/{name}", ours, z[f"lr/{name}/lr"], 1e-9)


CASES = {"hog": hog_case, "vit_mim": vit_mim_case, "misc": misc_case}


def case_of(config: dict) -> str:
    """Which case a golden file holds: its own word, without a suffix such as `_epsprobe`."""
    case = str(config.get("case", config.get("method", "unknown")))
    return next((c for c in CASES if case == c or case.startswith(c + "_")), case)


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

"""GreenMIM's golden files: masks, stages, decoder and gradients in both orders of the decoder's visible tokens."""

from __future__ import annotations

import numpy as np
from mindspore import nn

from golden_cases.common import LOSS
from golden_cases.replay import Replay, thinned
from localmim.convert.greenmim import from_torch, to_torch
from localmim.mim.cells import rows_to_grid
from localmim.mim.greenmim import ShuffledUnitMasking, greenmim_swin
from localmim.mim.unit_masking import UnitMasking

ACTIVATION, GRADIENT = 1e-4, 5e-4


class Parts(nn.Cell):
    """The loss, and beside it stages after their merging, latents, predictions and targets."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def construct(self, images, *arrays):
        model = self.model
        loss, _ = model(images, *arrays)
        outputs = model.encoder.stage_outputs(images, *arrays)
        return (
            loss,
            outputs[1::2],
            model.encoder(images, *arrays),
            model.predict(images, *arrays),
            model.targets(images),
        )


def swin_sizes(z, config, prefix: str) -> dict:
    """Sizes of a Swin out of its images, weights and config, by the names that the authors' configs share."""
    cfg = config["cfg"]
    dim, chans, patch, _ = z[f"param/{prefix}patch_embed.proj.weight"].shape
    return {
        "image_size": z["input"].shape[2:],
        "patch_size": patch,
        "in_chans": chans,
        "embed_dim": dim,
        "depths": cfg["D"],
        "num_heads": cfg["h"],
        "window_size": cfg["ws"],
        "mlp_ratio": z[f"param/{prefix}layers.0.blocks.0.mlp.fc1.weight"].shape[0] / dim,
    }


def check_buffers(z, ours: dict[str, np.ndarray], compare) -> None:
    """Every stored buffer against what the converter writes."""
    for key in sorted(k for k in z.files if k.startswith("buffer/")):
        compare.check(key, ours.get(key[len("buffer/") :], np.nan), z[key], 0, relative=False)


def greenmim_case(z, config, compare) -> None:
    """The authors' order is compared in every value, the right order in its loss: the graph is the same."""
    cfg = config["cfg"]
    model = greenmim_swin(
        **swin_sizes(z, config, "encoder."),
        decoder_dim=cfg["dE"],
        decoder_depth=cfg["dD"],
        decoder_heads=cfg["dh"],
        norm_pix=cfg["norm_pix"],
        reference_quirks=True,
    )
    B, order = len(z["input"]), np.argsort(z["rand/noise"][0], kind="stable")
    masking = ShuffledUnitMasking(model.encoder, cfg["ratio"], 0)
    theirs, right = masking.of_order(order, B), UnitMasking(model.encoder, cfg["ratio"], 0).of_order(order, B)
    compare.check("mask", theirs.mask(), z["mask"], 0, relative=False)
    compare.check("ids_restore", theirs.tap(0).ids_restore, z["ids_restore"], 0, relative=False)
    seen = ~theirs.hidden  # hidden patches may be in any order
    places = right.tap(0).ids_restore[:, seen]
    compare.check("ids_restore_rasterfix", places, z["ids_restore_rasterfix"][:, seen], 0, relative=False)

    replay = Replay(z, model, from_torch, to_torch, Parts(model))
    replay.run(*right.arrays())
    compare.check("loss_rasterfix", replay.loss, z["loss_rasterfix"], LOSS)
    stages, latents, predictions, targets = replay.run(*theirs.arrays())
    last = len(stages) - 1
    for s, x in enumerate(stages):
        after = min(s + 1, last)
        tokens = masking.tokens[after][seen].ravel()  # theirs are row by row
        coordinates = np.stack(np.divmod(np.sort(tokens), masking.stages[after].grid[1]), axis=1)
        compare.check(f"coords{s}", coordinates[None], z[f"coords{s}"], 0, relative=False)
        compare.check(f"stage{s}", x.asnumpy()[:, np.argsort(tokens)], z[f"stage{s}"], ACTIVATION)
    compare.check("latent", latents[0].asnumpy(), z["latent"], ACTIVATION)
    hidden = theirs.mask().astype(bool)
    ours = rows_to_grid(predictions[0].asnumpy(), 1.0, theirs.tap(0).ids_mask, model.decoders[0].grid)
    thinned(z, "pred", ours.reshape(*hidden.shape, -1), compare, hidden=hidden)
    thinned(z, "target", targets[0].asnumpy().reshape(*hidden.shape, -1), compare)
    replay.check(compare, GRADIENT)
    check_buffers(z, to_torch({n: p.asnumpy() for n, p in model.parameters_and_names()}), compare)


CASES = {"greenmim": greenmim_case}

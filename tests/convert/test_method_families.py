"""Base models of the methods, told from the authors' names and shapes; each recipe builds exactly these tensors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from mindspore.common.initializer import Zero

from localmim.config import config_from_dict
from localmim.convert.families import downstream_of, recipe, recognise, written_as
from localmim.convert.shapes import CODEBOOK, Given
from localmim.errors import UserError
from localmim.mim import init, simmim
from localmim.models import classifier, convvit, layers
from localmim.training.build import build_model

NAMES = json.loads((Path(__file__).parents[1] / "golden" / "methods_names.json").read_text())
NOTHING = Given()
VIT, SWIN = "vit_base_patch16_224", "swin_base_patch4_window"
CONVVIT = "convvit_base_patch16_224"
HOG = {"kind": "hog", "nbins": 9}
CODES = {"kind": "codebook", "codebook": [CODEBOOK], "vocab": 8192}
MODELS = {  # what is found: model.name and target of pre-training, or the name of a classifier
    "mae_pretrain_vit_base": (f"mae_{VIT}", {"kind": "pixels"}),
    "lomar_pretrain_vit_base": (f"lomar_{VIT}", {"kind": "pixels"}),
    "simmim_pretrain_vit_base": (f"simmim_{VIT}", {"kind": "pixels"}),
    "simmim_pretrain_swin_base_192_w6": (f"simmim_{SWIN}6_192", {"kind": "pixels"}),
    "greenmim_pretrain_swin_base_w7": (f"greenmim_{SWIN}7_224", {"kind": "pixels"}),
    "maskfeat_pretrain_vit_base_slowfast": (f"maskfeat_{VIT}", HOG),
    "maskfeat_pretrain_vit_base_mmpretrain": (f"maskfeat_{VIT}", HOG),
    "beit_pretrain_base_mmpretrain": (f"beit_{VIT}", CODES),
    "convmae_pretrain_base": (f"convmae_{CONVVIT}", {"kind": "pixels"}),
    "fastconvmae_pretrain_base_easycv": (f"fastconvmae_{CONVVIT}", {"kind": "pixels"}),
    "mae_finetune_vit_base": (VIT, None),
    "lomar_finetune_vit_base": ("vit_irpe_base_patch16_224", None),
    "convmae_finetune_base": (CONVVIT, None),
}
PRETRAINED = [name for name, (_, target) in MODELS.items() if target]
ENCODERS = {"lomar": "vit_irpe_base_patch16_224", "simmim_vit": "beit_base_patch16_224"}


class Unmade:
    """An initializer whose tensor has a shape and no values: full-size models in no time and no memory."""

    def __init__(self, init, shape=None, dtype=None):
        self.shape = tuple(shape)

    def init_data(self) -> Tensor:
        return Tensor(shape=self.shape, dtype=ms.float32, init=Zero())


@pytest.fixture(autouse=True)
def unmade(monkeypatch):
    """Weights are not made: only names and shapes matter here."""
    for module in (classifier, convvit, init, layers, simmim):
        monkeypatch.setattr(module, "initializer", Unmade)
    monkeypatch.setattr(init, "fill", lambda parameter, value: None)
    monkeypatch.setattr(init, "shrink_branches", lambda blocks: None)


def table(name: str) -> dict[str, np.ndarray]:
    """A model's state dict without values; {0..11} stands for numbers."""
    arrays = {}
    for names, shape in NAMES[name]["shapes"].items():
        numbers = re.search(r"\{(\d+)\.\.(\d+)\}", names)
        for i in range(int(numbers[1]), int(numbers[2]) + 1) if numbers else [0]:
            arrays[names.replace(numbers[0], str(i)) if numbers else names] = np.broadcast_to(np.float32(0), shape)
    return arrays


def shapes(arrays) -> dict[str, tuple[int, ...]]:
    """Their shapes alone."""
    return {n: tuple(a.shape) for n, a in arrays.items()}


def unmade_weights(model) -> dict[str, np.ndarray]:
    """A model's parameters without values."""
    return {n: np.broadcast_to(np.float32(0), p.shape) for n, p in model.parameters_and_names()}


def spelling(name: str) -> str:
    """The authors that the name of a table ends in, where there are several."""
    return next((s for s in ("slowfast", "mmpretrain", "easycv") if name.endswith(s)), "")


def test_no_model_is_left_out():
    """Of those in the file."""
    assert MODELS.keys() == NAMES.keys()


@pytest.mark.parametrize("name", MODELS)
def test_base_models(name):
    """Found by name with nothing to add; written back with every name and shape; as many weights as theirs trains."""
    theirs, (expected, target) = table(name), MODELS[name]
    family = recognise(theirs)
    values, _ = recipe(family, theirs, family.natural)
    kept = {"name": expected} if target else {"name": expected, "num_classes": 1000, "pool": "mean"}
    assert values["model"] == kept and values.get("target") == target
    assert (values["task"], values["reference_quirks"]) == (("pretrain", True) if target else ("finetune", False))
    config = config_from_dict(values)
    model = build_model(config)
    assert written_as(model, config, spelling(name)) == (family if target else downstream_of(model))
    back = family.to_torch(unmade_weights(model), model, config)
    assert shapes(back) == shapes(theirs)
    trained = sum(p.size for p in model.trainable_params())
    keys = sum(
        a.size for n, a in theirs.items() if n.endswith("q_bias")
    )  # our bias has a part for keys, theirs has none
    assert trained - keys == NAMES[name]["trainable"]


@pytest.mark.parametrize("name", PRETRAINED)
def test_encoders_of_base_models(name):
    """What is made of them with --as encoder has the names of the authors' fine-tuning, without norm and head."""
    family = recognise(table(name))
    config = config_from_dict(recipe(family, table(name), "pretrain")[0])
    model = build_model(config)
    theirs = family.to_torch(unmade_weights(model), model, config)  # with the constants, which are compared
    values, _ = recipe(family, theirs, "encoder")
    assert values["model"]["num_classes"] == 0 and not values["reference_quirks"]
    assert values["model"].get("norm_eps") == (1e-5 if name.startswith("simmim_pretrain_swin") else None)
    config = config_from_dict(values)
    model = build_model(config)
    ours = family.from_torch(theirs, list(unmade_weights(model)), model)
    wanted = unmade_weights(model)
    assert shapes({n: a for n, a in ours.items() if n in wanted}) == shapes(wanted)
    left = [re.compile(p.replace(".", r"\.").replace("*", ".*")) for p in family.left_behind("encoder")]
    assert all(any(p.fullmatch(n) for p in left) for n in ours.keys() - wanted.keys())
    finetuned = {
        "mae": "mae_finetune_vit_base",
        "maskfeat": "mae_finetune_vit_base",
        "lomar": "lomar_finetune_vit_base",
        "convmae": "convmae_finetune_base",
        "fastconvmae": "convmae_finetune_base",
    }.get(name.partition("_")[0])
    back = downstream_of(model).to_torch(wanted, model, config)
    if finetuned:
        expected = shapes(table(finetuned)).items()
        assert shapes(back) == {n: s for n, s in expected if not n.startswith(("norm.", "fc_norm.", "head."))}
    elif "swin" in name:
        kept = {n.removeprefix("encoder."): s for n, s in shapes(theirs).items() if n.startswith("encoder.layers")}
        assert kept.items() <= shapes(back).items()
    else:
        assert back["blocks.11.attn.relative_position_bias_table"].shape == (732, 12)
        assert "blocks.3.attn.v_bias" in back and not any("rel_pos_bias" in n for n in back)


def test_fastconvmae_must_be_said():
    """Its names and shapes are ConvMAE's; the masks differ."""
    theirs = table("convmae_pretrain_base")
    values, text = recipe(recognise(theirs), theirs, "pretrain", Given(method="fastconvmae"))
    assert values["model"] == {"name": f"fastconvmae_{CONVVIT}"} and "masks of fastconvmae" in text
    assert "other: --method" in recipe(recognise(theirs), theirs, "pretrain")[1]


def without(name: str, *prefixes: str, **added) -> dict[str, np.ndarray]:
    """A table without some names, and with others, of these shapes."""
    kept = {n: a for n, a in table(name).items() if not n.startswith(prefixes or ("-",))}
    return {**kept, **{n.replace("/", "."): np.broadcast_to(np.float32(0), s) for n, s in added.items()}}


def codes(count: int) -> tuple[int, ...]:
    """Shape of position codes."""
    return 1, count, 768


def test_sizes_that_are_not_the_registered_models():
    """Each is told by a tensor: image, patch, channels, heads of a table, depth and width of a decoder."""
    name = "lomar_pretrain_vit_base"
    changes = {"patch_embed/proj/weight": (768, 1, 8, 8), "pos_embed": codes(1 + 36**2)}
    small = without(name, **changes, **{"encoder_pred/weight": (64, 768), "encoder_pred/bias": (64,)})
    model = recipe(recognise(small), small, "pretrain")[0]["model"]
    assert model == {"name": f"lomar_{VIT}", "image_size": 288, "patch_size": 8, "in_chans": 1}
    name, index = "beit_pretrain_base_mmpretrain", "backbone/rel_pos_bias/relative_position_bias_table"
    wide = without(name, **{index: (47 * 47 + 3, 6)})
    model = recipe(recognise(wide), wide, "pretrain")[0]["model"]
    assert model == {"name": f"beit_{VIT}", "image_size": 384, "num_heads": 6}
    light = without("mae_pretrain_vit_base", *(f"decoder_blocks.{i}." for i in range(2, 8)))
    model = recipe(recognise(light), light, "pretrain", Given(decoder_heads=8))[0]["model"]
    assert model == {"name": f"mae_{VIT}", "decoder_depth": 2, "decoder_heads": 8}
    grids = without("greenmim_pretrain_swin_base_w7", decoder_pos_embed=(1, 144, 512))
    assert recipe(recognise(grids), grids, "pretrain")[0]["model"]["image_size"] == 384
    bins = without("maskfeat_pretrain_vit_base_slowfast", **{"pred_head/projections/0/weight": (216, 768)})
    assert recipe(recognise(bins), bins, "pretrain")[0]["target"] == {"kind": "hog", "nbins": 18}


@pytest.mark.parametrize(
    ("arrays", "wanted", "given", "said"),
    [
        (lambda: without("mae_pretrain_vit_base", decoder_pos_embed=(1, 2, 3), **{"decoder_pred/bias": (27,)}),
         "pretrain", NOTHING, "decoder_pred.bias is of 27 values a patch, and pixels would be 768.*--config"),
        (lambda: without("lomar_pretrain_vit_base", "encoder_pred.bias"),
         "pretrain", NOTHING, "encoder_pred.bias is missing from these weights; is it encoder_pred.weight"),
        (lambda: without("maskfeat_pretrain_vit_base_slowfast", **{"pred_head/projections/0/weight": (512, 768)}),
         "pretrain", NOTHING, "pred_head.projections.0.weight predicts 512 values a patch, which is no HOG.*--config"),
        (lambda: without("convmae_pretrain_base", pos_embed=codes(195)),
         "pretrain", NOTHING, "pos_embed holds 195 patches, which is no square.*--image-size"),
        (lambda: without("simmim_pretrain_vit_base", "encoder.blocks.4."),
         "pretrain", NOTHING, "of the names encoder.blocks.#.norm1.weight some numbers are missing"),
        (lambda: without("beit_pretrain_base_mmpretrain",
                         **{"backbone/rel_pos_bias/relative_position_bias_table": (18, 12)}),
         "pretrain", NOTHING, "relative_position_bias_table holds 15 offsets of patches, which is no square"),
        (lambda: without("lomar_finetune_vit_base", **{"patch_embed/proj/weight": (768, 3, 15, 15)}),
         "classifier", NOTHING, "no weight tells the image size, and 224 px are no patches of 15: --image-size"),
        (lambda: table("mae_pretrain_vit_base"), "classifier", NOTHING,
         r"classifier weights cannot be made of a ViT of MAE's pre-training: expected pretrain or encoder"),
        (lambda: table("beit_pretrain_base_mmpretrain"), "pretrain", Given(num_heads=12), "^--num-heads is for"),
        (lambda: table("simmim_pretrain_vit_base"), "pretrain", Given(decoder_heads=4), "^--decoder-heads is for"),
        (lambda: table("mae_pretrain_vit_base"), "pretrain", Given(method="fastconvmae"), "^--method is for"),
        (lambda: table("simmim_pretrain_swin_base_192_w6"), "encoder", Given(pool="mean"), "^--pool is for"),
    ],
)  # fmt: skip
def test_what_cannot_be_told(arrays, wanted, given, said):
    """One line that names the tensor, or the option that would be idle."""
    arrays = arrays()
    with pytest.raises(UserError, match=said) as raised:
        recipe(recognise(arrays), arrays, wanted, given)
    assert "\n" not in str(raised.value)

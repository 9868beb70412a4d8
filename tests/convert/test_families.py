"""Real models told from their names and shapes: the recipe found builds a model with exactly these tensors."""

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
from localmim.convert import names
from localmim.convert.families import recipe, recognise
from localmim.convert.shapes import Given
from localmim.errors import UserError
from localmim.models import classifier, layers
from localmim.training.build import build_model

GOLDEN = Path(__file__).parents[1] / "golden"


NOTHING, HEADS = Given(), Given(num_heads=4)


class Unmade:
    """An initializer whose tensor has a shape and no values: full-size models in no time and no memory."""

    def __init__(self, init, shape=None, dtype=None):
        self.shape = tuple(shape)

    def init_data(self) -> Tensor:
        return Tensor(shape=self.shape, dtype=ms.float32, init=Zero())


@pytest.fixture(autouse=True)
def unmade(monkeypatch):
    """Weights are not made: only names and shapes matter here."""
    monkeypatch.setattr(layers, "initializer", Unmade)
    monkeypatch.setattr(classifier, "initializer", Unmade)


def table(name: str) -> dict[str, list[int]]:
    """A real model's names and shapes."""
    rows = json.loads((GOLDEN / f"localmim_{name}.json").read_text())
    return {n: row["shape"] if isinstance(row, dict) else row for n, row in rows.items()}


def zeros(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Arrays of these shapes that take no memory."""
    return {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}


def shapes_of(model) -> dict[str, np.ndarray]:
    """A model's parameters, likewise."""
    return zeros({n: p.shape for n, p in model.parameters_and_names()})


def small(**changes) -> dict[str, np.ndarray]:
    """A ViT classifier: 32 wide, 2 blocks, patches of 8, 64 px, 10 classes; None takes a name out."""
    shapes = {"cls_token": [1, 1, 32], "pos_embed": [1, 65, 32], "patch_embed.proj.weight": [32, 3, 8, 8]}
    shapes["patch_embed.proj.bias"] = [32]
    for i in range(2):
        block = {"norm1": [32], "attn.qkv": [96, 32], "attn.proj": [32, 32], "norm2": [32]}
        for layer, shape in {**block, "mlp.fc1": [128, 32], "mlp.fc2": [32, 128]}.items():
            shapes[f"blocks.{i}.{layer}.weight"], shapes[f"blocks.{i}.{layer}.bias"] = shape, shape[:1]
    shapes.update({"fc_norm.weight": [32], "fc_norm.bias": [32], "head.weight": [10, 32], "head.bias": [10]})
    shapes.update(changes)
    return zeros({n: s for n, s in shapes.items() if s is not None})


def found(arrays: dict, wanted: str, given: Given = NOTHING) -> dict:
    """The recipe of these weights."""
    return recipe(recognise(arrays), arrays, wanted, given)[0]


PRETRAINED = {
    "vit_base_names": ("localmim_vit_base_patch16_224", {}, {"kind": "hog", "nbins": 9, "bias": False}),
    "names_pretrain_vit_large": ("localmim_vit_large_patch16_224", {}, {"kind": "hog", "nbins": 18, "bias": True}),
    "swin_base_names": ("localmim_swin_base_patch4_window7_224", {}, {"kind": "hog", "nbins": 18, "bias": True}),
    "names_pretrain_swin_base_pixel": ("localmim_swin_base_patch4_window7_224", {}, {"kind": "pixels"}),
    "names_pretrain_swin_large_hog": (
        "localmim_swin_large_patch4_window14_224", {}, {"kind": "hog", "nbins": 18, "bias": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRETRAINED)
def test_published_pre_training_models(name):
    """Found by name with nothing to add, and written back with every name and shape of theirs, buffers included."""
    theirs = table(name)
    values = found(zeros(theirs), "pretrain")
    model_name, sizes, target = PRETRAINED[name]
    assert values["model"] == {"name": model_name, **sizes} and values["target"] == target
    assert values["task"] == "pretrain" and values["reference_quirks"]
    model = build_model(config_from_dict(values))
    back = names.to_torch(shapes_of(model), [d.scale for d in model.decoders], target["kind"] == "hog")
    assert {n: list(a.shape) for n, a in back.items()} == theirs


@pytest.mark.parametrize(
    ("name", "registered"), [("vit_base", "vit_base_patch16_224"), ("swin_base", "swin_base_patch4_window7_224")]
)
def test_published_classifiers(name, registered):
    """The same for fine-tuned models; a Swin's has the authors' eps (Q7)."""
    theirs = table(f"names_finetune_{name}")
    values = found(zeros(theirs), "classifier")
    assert values["model"] == {"name": registered, "num_classes": 1000, "pool": "mean"}
    assert values["task"] == "finetune" and values["reference_quirks"] == (name == "swin_base")
    model = build_model(config_from_dict(values))
    back = names.classifier_to_torch(shapes_of(model), "mean", getattr(model.encoder, "stages", ()))
    assert {n: list(a.shape) for n, a in back.items()} == theirs


@pytest.mark.parametrize("name", [*PRETRAINED, "names_finetune_vit_base", "names_finetune_swin_base"])
def test_encoders_of_all(name):
    """The encoder has exactly the names that the authors' fine-tuning model has besides norm and head."""
    theirs = zeros(table(name))
    values = found(theirs, "encoder")
    assert values["model"]["num_classes"] == 0 and "pool" not in values["model"]
    model = build_model(config_from_dict(values))
    back = names.classifier_to_torch(shapes_of(model), "mean", getattr(model.encoder, "stages", ()))
    expected = {n.removeprefix("encoder."): a.shape for n, a in theirs.items()}
    left = re.compile(r"(norm|fc_norm|head|decoder|hog_enc)\.|.*attn_mask$")
    assert {n: a.shape for n, a in back.items() if not left.match(n)} == {
        n: s for n, s in expected.items() if not left.match(n)
    }
    assert not [n for n in back if n.startswith(("norm.", "head."))]


def renamed_to_timm(shapes: dict) -> dict:
    """The official Swin's names in timm's newer spelling, without buffers."""
    new = {}
    for n, shape in shapes.items():
        if not names.is_constant(n):
            n = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", n)
            new[re.sub(r"^head\.", "head.fc.", n)] = shape
    return new


def test_timm_swin():
    """Another spelling of mergings and head; norm before the mean, eps 1e-5."""
    theirs = table("names_finetune_swin_base")
    values = found(zeros(renamed_to_timm(theirs)), "classifier")
    assert values["model"] == {
        "name": "swin_base_patch4_window7_224", "num_classes": 1000, "pool": "normed_mean", "norm_eps": 1e-5
    }  # fmt: skip
    assert not values["reference_quirks"]
    model = build_model(config_from_dict(values))
    assert model.encoder.layers[0].blocks[0].norm1.eps == 1e-5
    ours = names.classifier_from_torch(zeros(renamed_to_timm(theirs)), list(shapes_of(model)), "normed_mean")
    assert {n: a.shape for n, a in ours.items()} == {n: a.shape for n, a in shapes_of(model).items()}


def test_official_swin_must_be_said():
    """It has the names of the authors' fine-tuning, which norms after the mean; what was found says so."""
    theirs = zeros(table("names_finetune_swin_base"))
    assert "--pool normed_mean" in recipe(recognise(theirs), theirs, "classifier")[1]
    values = found(theirs, "classifier", Given(pool="normed_mean"))
    assert values["model"]["norm_eps"] == 1e-5 and not values["reference_quirks"]


def test_small_vit():
    """Sizes that are not the registered model's are found one by one."""
    values = found(small(), "classifier", HEADS)
    sizes = {"image_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    assert values["model"] == {"name": "vit_base_patch16_224", **sizes, "num_classes": 10, "pool": "mean"}
    token = small(**{"fc_norm.weight": None, "fc_norm.bias": None, "norm.weight": [32], "norm.bias": [32]})
    assert found(token, "classifier", HEADS)["model"]["pool"] == "token"
    wide = small(**{"pos_embed": [1, 9, 32], "patch_embed.proj.weight": [32, 1, 8, 8]})
    values = found(wide, "encoder", Given(num_heads=4, image_size=[16, 32]))
    assert values["model"]["image_size"] == [16, 32] and values["model"]["in_chans"] == 1


def test_mae():
    """The published file holds the encoder alone; with the decoder it is pre-training, or an encoder when asked for."""
    bare = {n: s for n, s in small().items() if not n.startswith(("head.", "fc_norm."))}
    bare["norm.weight"] = bare["norm.bias"] = np.zeros(32, np.float32)
    assert recognise(bare).natural == "encoder"
    full = recognise({**bare, "decoder_embed.weight": np.zeros((16, 32), np.float32)})
    assert full.natural == "pretrain" and full.left_behind("encoder") == ("norm.*", "mask_token", "decoder_*")
    with pytest.raises(
        UserError, match=r"classifier weights cannot be made of a ViT of MAE's .*: expected pretrain or"
    ):
        full.check("classifier")


@pytest.mark.parametrize(
    ("changes", "given", "said"),
    [
        ({}, NOTHING, "width 32 may have any number of heads: say how many with --num-heads"),
        ({"pos_embed": None, "pos_embd": [1, 65, 32]}, HEADS, "pos_embed is missing.*is it pos_embd"),
        ({"pos_embed": [1, 9, 32]}, HEADS, "holds 8 patches, which is no square.*--image-size"),
        ({"pos_embed": [65, 32]}, HEADS, r"pos_embed is of shape \[65, 32\], expected 3 axes"),
        ({"blocks.3.norm1.weight": [32]}, HEADS, r"some numbers are missing: there are \[0, 1, 3\]"),
        ({"patch_embed.proj.weight": None}, HEADS, "of no model that is known here"),
    ],
)
def test_what_cannot_be_told(changes, given, said):
    """One line that says what is missing and how to give it."""
    with pytest.raises(UserError, match=said):
        found(small(**changes), "classifier", given)


@pytest.mark.parametrize(
    ("name", "wanted", "given"),
    [
        ("names_finetune_swin_base", "classifier", HEADS),
        ("names_finetune_vit_base", "encoder", Given(decoder_heads=4)),
        ("names_finetune_vit_base", "encoder", Given(pool="token")),
        ("names_pretrain_swin_base_pixel", "pretrain", Given(pool="mean")),
    ],
)
def test_what_would_change_nothing_is_refused(name, wanted, given):
    """An option that is read and ignored would mislead."""
    with pytest.raises(UserError, match=r"^--[a-z-]+ is for"):
        found(zeros(table(name)), wanted, given)


def test_other_targets_need_a_recipe():
    """Decoders that predict neither HOG nor pixels, for example of a codebook."""
    theirs = {n: a for n, a in zeros(table("names_pretrain_swin_base_pixel")).items() if ".pred." not in n}
    theirs.update({f"decoder.{k}.pred.weight": np.zeros((512, 64 if k == 0 else 128)) for k in range(4)})
    with pytest.raises(UserError, match="neither HOG nor pixels: give the recipe: --config"):
        found(theirs, "pretrain")

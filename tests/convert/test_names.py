"""Names and shapes: the authors' state dict and ours, both ways, and loading that refuses what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

import localmim
from localmim.convert.load import load_weights, weights_of
from localmim.convert.names import from_torch, to_torch, torch_name
from localmim.errors import UserError
from localmim.training.optimizer import decays

GOLDEN = Path(__file__).parents[1] / "golden"
SCALES = [4.0, 2.0, 1.0, 0.5]
NARROW = {"embed_dim": 48, "decoder_dim": 40}  # of ViT-B and its decoders, whose 768 and 256 are 90 million weights
WIDE = {48: 768, 144: 2304, 192: 3072, 40: 256, 20: 128, 10: 64, 120: 768, 160: 1024}  # their widths for ours


@pytest.fixture(scope="module")
def table():
    """The authors' ViT-B: name to shape and group (decay, no_decay, frozen)."""
    return json.loads((GOLDEN / "localmim_vit_base_names.json").read_text())


@pytest.fixture(scope="module")
def model():
    """Our ViT-B, narrower."""
    return localmim.create_model("localmim_vit_base_patch16_224", **NARROW)


def test_table_is_the_published_model(table):
    """The stored table itself: 248 tensors, 90,269,236 values."""
    assert len(table) == 248
    assert sum(int(np.prod(row["shape"])) for row in table.values()) == 90_269_236


def test_names_and_shapes_are_the_authors(table, model):
    """Every tensor of theirs but the fixed Sobel kernels has one of ours, and the other way round."""
    ours = {torch_name(n, SCALES): [WIDE.get(s, s) for s in p.shape] for n, p in model.parameters_and_names()}
    theirs = {n: row["shape"] for n, row in table.items() if not n.startswith("hog_enc.")}
    assert ours == theirs


def test_decay_groups_are_the_authors(table, model):
    """Class and mask tokens decay, biases and norms do not, position codes are frozen."""
    for name, p in model.parameters_and_names():
        group = ("decay" if decays(name, p) else "no_decay") if p.requires_grad else "frozen"
        assert group == table[torch_name(name, SCALES)]["group"], name


@pytest.mark.parametrize("file", ["localmim_vit_mim_epsprobe.npz", "with biases"])
def test_there_and_back_is_bit_for_bit(file):
    """The authors' state dict through our names and out again, Sobel kernels included."""
    with np.load(GOLDEN / "localmim_vit_mim_epsprobe.npz") as z:
        theirs = {k[len("param/") :]: z[k] for k in z.files if k.startswith("param/")}
    biased = file == "with biases"
    if biased:
        theirs.update({f"hog_enc.{k}.conv.bias": np.array([k / 7, -k / 3], np.float32) for k in range(4)})
    model = localmim.create_model(
        "localmim_vit_base_patch16_224",
        image_size=64,
        embed_dim=32,
        depth=7,
        num_heads=4,
        decoder_dim=32,
        decoder_heads=4,
        hog_bias=biased,
    )
    ours = from_torch(theirs, list(weights_of(model)), SCALES)
    report = load_weights(model, ours)
    assert len(report.matched) == len(ours) and "weights loaded" in str(report)
    back = to_torch(weights_of(model), SCALES)
    assert back.keys() == theirs.keys()
    for name, array in theirs.items():
        assert back[name].dtype == array.dtype, name
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_swin_there_and_back_is_bit_for_bit():
    """The authors' Swin keeps its prefix; index buffers, which ours has no parameter for, are written anew."""
    with np.load(GOLDEN / "localmim_swin_mim_epsprobe.npz") as z:
        theirs = {k[len("param/") :]: z[k] for k in z.files if k.startswith("param/")}
        config = json.loads(str(z["config"]))
    sizes = {n: config[n] for n in ("embed_dim", "depths", "num_heads")}
    model = localmim.create_model(
        "localmim_swin_base_patch4_window7_224",
        decoder_dim=config["decoder_embed_dim"],
        decoder_heads=config["decoder_num_heads"],
        nbins=config["hog_nbins"],
        **sizes,
    )
    scales = [1.0] * 4
    load_weights(model, from_torch(theirs, list(weights_of(model)), scales))
    back = to_torch(weights_of(model), scales)
    indices = {n for n in back if n.endswith("relative_position_index")}
    assert back.keys() - indices == theirs.keys() and len(indices) == sum(config["depths"])
    for name, array in theirs.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    i, j = np.divmod(np.arange(49), 7)
    expected = (i[:, None] - i + 6) * 13 + j[:, None] - j + 6
    for name in indices:
        np.testing.assert_array_equal(back[name], expected)
    again = from_torch(back, list(weights_of(model)), scales)
    assert not [n for n in again if n.endswith("relative_position_index")]


def test_pixel_models_have_no_sobel_kernels(model):
    """They are part of the HOG target only."""
    names = to_torch(weights_of(model), SCALES, hog=False)
    assert not [n for n in names if n.startswith("hog_enc.")]


def test_another_gradient_kernel_is_refused(model):
    """Its targets would be others than ours, in silence."""
    names = list(weights_of(model))
    kernel = np.zeros((2, 1, 3, 3), np.float32)
    for wrong in (kernel, kernel[:1]):
        with pytest.raises(UserError, match=r"hog_enc.2.conv.weight is not the Sobel kernel"):
            from_torch({"hog_enc.2.conv.weight": wrong}, names, SCALES)


def test_unknown_names_stay_for_the_strict_load(model):
    """What has no counterpart must be named to the user, not dropped."""
    assert from_torch({"fc_norm.weight": np.ones(3)}, list(weights_of(model)), SCALES).keys() == {"fc_norm.weight"}


class Two(nn.Cell):
    """Two weights."""

    def __init__(self):
        super().__init__()
        self.a = Parameter(Tensor(np.zeros((2, 3), np.float32)))
        self.b = Parameter(Tensor(np.zeros(2, np.float32)), requires_grad=False)


A, B = np.ones((2, 3), np.float32), np.ones(2, np.float32)


def test_load():
    """Frozen weights are loaded too; other precisions are converted."""
    model = Two()
    report = load_weights(model, {"a": A.astype(np.float16), "b": B.astype(np.float64)})
    assert report.matched == ["a", "b"] and str(report) == "2 weights loaded"
    for name, array in weights_of(model).items():
        assert array.dtype == np.float32 and (array == 1).all(), name


@pytest.mark.parametrize(
    ("arrays", "allow", "said"),
    [
        ({"a": A}, (), "1 missing: b"),
        ({"a": A, "b": B, "c": B}, (), "1 unexpected: c"),
        ({"a": A.T, "b": B}, (), r"1 misshaped: a \[3, 2\] for \[2, 3\]"),
        ({"a": A.reshape(-1), "b": B}, ("*",), r"1 misshaped: a \[6\] for \[2, 3\]"),
        ({"a": A, "head.c": B}, ("head.*",), "1 missing: b; 1 unexpected: head.c"),
    ],
)
def test_refuses_and_loads_nothing(arrays, allow, said):
    """Half-loaded weights train, evaluate and mislead."""
    model = Two()
    with pytest.raises(UserError, match=said) as caught:
        load_weights(model, arrays, allow)
    assert "\n" not in str(caught.value)
    assert not any(array.any() for array in weights_of(model).values())


def test_allowed_names():
    """A new head may be missing and an old one left over, by pattern, and both are reported."""
    model = Two()
    report = load_weights(model, {"a": A, "head.weight": B}, ("b", "head.*"))
    assert report.matched == ["a"] and report.missing == ["b"] and report.unexpected == ["head.weight"]
    assert model.a.asnumpy().all() and not model.b.asnumpy().any()

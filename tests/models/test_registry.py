"""Names to models: what is listed runs, what is wrong is one line."""

from __future__ import annotations

import mindcv
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import localmim
from localmim.errors import UserError
from localmim.mim.masking import RandomMasking
from localmim.models.sizes import VIT

NAMES = localmim.list_models()
VITS = localmim.list_models("localmim_vit_*")
TINY = {"image_size": (64, 32), "embed_dim": 48, "depth": 7, "decoder_dim": 16, "decoder_heads": 2}
BASE = "localmim_vit_base_patch16_224"


def test_names():
    """Every method under timm's kind of name, at every size of its encoders; the pattern is a shell pattern."""
    vits = [f"vit_{size}_patch16_224" for size in ("base", "large", "small", "tiny")]
    swins = [f"swin_{size}" for size in ("base_patch4_window14_224", "base_patch4_window6_192")]
    swins += [f"swin_{size}" for size in ("base_patch4_window7_224", "large_patch4_window12_192")]
    swins += [f"swin_{size}_224" for size in ("large_patch4_window14", "small_patch4_window7", "tiny_patch4_window7")]
    conv = localmim.list_models("convvit_*")
    assert "convvit_base_patch16_224" in conv
    encoders = {
        **dict.fromkeys(("localmim", "simmim"), vits + swins),
        **dict.fromkeys(("beit", "lomar", "mae", "maskfeat"), vits),
        "greenmim": swins,
        **dict.fromkeys(("convmae", "fastconvmae", "fastconvmae_mixture"), conv),
    }
    pretraining = [f"{method}_{name}" for method, names in encoders.items() for name in names]
    assert localmim.list_models(classifiers=False) == sorted(pretraining)
    downstream = vits + swins + conv + [f"{kind}_{v[4:]}" for kind in ("beit", "vit_irpe") for v in vits]
    assert localmim.list_models(classifiers=True) == sorted(downstream)
    assert localmim.list_models("localmim_*_base_patch16_*") == [BASE]
    assert localmim.list_models("resnet*") == []


def test_mindcv_lists_them():
    """Someone who works with mindcv finds the models there."""
    assert set(NAMES) <= set(mindcv.list_models())


def test_mindcv_makes_them():
    """mindcv passes arguments of its own with every model: pretrained, num_classes, in_channels."""
    model = mindcv.create_model(BASE, in_channels=1, **{**TINY, "num_heads": 4})
    assert model.encoder.in_chans == 1 and model.encoder.grid == (4, 2)
    classifier = mindcv.create_model("vit_tiny_patch16_224", num_classes=7, image_size=32, embed_dim=24, depth=1)
    assert classifier.num_classes == 7
    with pytest.raises(UserError, match="no published weights"):
        mindcv.create_model(BASE, pretrained=True)


@pytest.mark.parametrize("name", VITS)
def test_every_vit_runs(name):
    """Shrunk by keyword arguments alone, each registered ViT gives a finite loss and its four parts.

    Without compiling: what differs between them is sizes only, and graphs of this model are compiled elsewhere.
    """
    model = localmim.create_model(name, **TINY)
    images = np.random.default_rng(0).normal(size=(2, 3, 64, 32)).astype(np.float32)
    mask = RandomMasking(8, 0.75, 0)(0, np.arange(2))
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        loss, losses = model(Tensor(images), *map(Tensor, mask.arrays()))
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)
    assert losses.shape == (4,)
    assert 0 < float(loss.asnumpy()) < 100


@pytest.mark.parametrize(
    ("size", "width", "depth", "heads"),
    [("tiny", 192, 12, 3), ("small", 384, 12, 6), ("base", 768, 12, 12), ("large", 1024, 24, 16)],
)
def test_published_sizes(size, width, depth, heads):
    """The paper's table."""
    assert VIT[f"vit_{size}_patch16_224"] == {"embed_dim": width, "depth": depth, "num_heads": heads}


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"image_sise": 64}, "unexpected keyword argument 'image_sise'"),
        ({"depth": 6}, "at least 7 blocks, got depth 6"),
        ({"depth": 6, "taps": [0, 1, 2, 3]}, "at least 7 blocks, got depth 6"),
        ({"image_size": 225}, "image_size 225x225 is not a multiple of patch_size 16"),
        ({"image_size": [224, 230]}, "image_size 224x230"),
        ({"image_size": [224, 224, 3]}, "expected one number or"),
        ({"image_size": -64}, "image_size -64x-64"),
        ({"patch_size": 0, "target": "pixels"}, "patch_size 0"),
        ({"image_size": 16 * 7}, "even number of patches a side, and the grid is 7x7"),
        ({"patch_size": 14}, "scale 4 does not divide a patch of 14 px"),
        ({"scales": [3]}, "scale 3 is none of 4, 2, 1, 0.5"),
        ({"scales": []}, "scales is empty"),
        ({"scales": [1, 4]}, r"taps \[4, 1\] must ascend"),
        ({"scales": [1, 1]}, r"taps \[4, 4\] must ascend"),
        ({"taps": [1, 3]}, "must be of one length"),
        ({"taps": [1, 2, 3, 7]}, "block indices from 0 to 6"),
        ({"num_heads": 5}, "width 48 is not a multiple of 5 heads"),
        ({"num_heads": 0}, "multiple of 0 heads"),
        ({"decoder_heads": 3}, "width 16 is not a multiple of 3 heads"),
        ({"decoder_depth": 0}, "at least one block, got depth 0"),
        ({"decoder_dim": 18}, "multiple of 4, got 18"),
        ({"target": "hogg"}, "target 'hogg' is none of 'hog', 'pixels'"),
        ({"nbins": 0}, "nbins 0"),
    ],
)
def test_wrong_arguments_are_one_line(kwargs, said):
    """A recipe's mistake reaches the user as one line that starts with the model's name."""
    with pytest.raises(UserError, match=said) as caught:
        localmim.create_model(BASE, **{**TINY, "num_heads": 4, **kwargs})
    assert str(caught.value).startswith(f"model {BASE}: ") and "\n" not in str(caught.value)


def test_unknown_names():
    """A slip gets the near name, nonsense gets the list."""
    with pytest.raises(UserError, match=f"no model 'localmim_vit_bas_patch16_224': did you mean '{BASE}'"):
        localmim.create_model("localmim_vit_bas_patch16_224")
    with pytest.raises(UserError, match=f"no model 'x': known are {NAMES[0]}, {NAMES[1]}"):
        localmim.create_model("x")

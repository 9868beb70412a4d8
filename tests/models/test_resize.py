"""Position codes and bias tables at another size."""

from __future__ import annotations

import numpy as np
import pytest

import localmim
from localmim.convert.load import weights_of
from localmim.errors import UserError
from localmim.models.resize import fit_to_size, resize_bias_table, resize_position_code


def test_a_plane_stays_a_plane():
    """A ramp stays a ramp inside (to 0.05: a = -0.75 is not exact there), centres aligned; the class token stays."""
    rows, cols = np.meshgrid(np.arange(8), np.arange(6), indexing="ij")
    code = np.stack([rows, cols], -1).reshape(1, 48, 2).astype(np.float32)
    code = np.concatenate([np.full((1, 1, 2), 9, np.float32), code], 1)
    resized = resize_position_code(code, (8, 6), (16, 18))
    assert resized.shape == (1, 1 + 16 * 18, 2)
    assert (resized[0, 0] == 9).all()
    grid = resized[0, 1:].reshape(16, 18, 2)
    np.testing.assert_allclose(grid[4:12, 9, 0], (np.arange(4, 12) + 0.5) / 2 - 0.5, atol=0.05)
    np.testing.assert_allclose(grid[8, 6:12, 1], (np.arange(6, 12) + 0.5) / 3 - 0.5, atol=0.06)


def test_channels_are_independent():
    """More channels than OpenCV takes at once give what each gives alone."""
    code = np.random.default_rng(0).normal(size=(1, 1 + 9, 1030)).astype(np.float32)
    whole = resize_position_code(code, (3, 3), (5, 4))
    for i in (0, 511, 512, 1029):
        alone = resize_position_code(code[..., i : i + 1], (3, 3), (5, 4))
        np.testing.assert_allclose(whole[..., i : i + 1], alone, atol=1e-6)


def test_the_same_size_is_exact():
    """Nothing is lost where nothing changes."""
    table = np.random.default_rng(0).normal(size=(49, 3)).astype(np.float32)
    np.testing.assert_allclose(resize_bias_table(table, 4), table, atol=1e-6)


def test_bias_table_keeps_its_centre():
    """The bias of a token with itself stays the middle row, and mirror symmetry stays."""
    side = np.abs(np.arange(7) - 3)
    table = (10 - side[:, None] - side[None]).reshape(49, 1).astype(np.float32)
    resized = resize_bias_table(table, 7).reshape(13, 13)
    assert resized.argmax() == 6 * 13 + 6
    np.testing.assert_allclose(resized, resized[::-1, ::-1], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sizes", "before", "after", "done"),
    [
        (
            "vit_tiny_patch16_224",
            {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8},
            (32, 16),
            (48, 64),
            ["position codes 4x2 -> 6x8"],
        ),
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 8},
            32,
            128,
            ["2 bias tables"],
        ),
    ],
)
def test_an_encoder_at_another_size(name, sizes, before, after, done):
    """What depends on the size changes its shape, everything else stays as it is; a Swin's windows may be capped."""
    small = localmim.create_model(name, image_size=before, **sizes)
    large = localmim.create_model(name, image_size=after, **sizes)
    arrays = weights_of(small)
    size = before if isinstance(before, tuple) else (before, before)
    fitted, what = fit_to_size(arrays, large, size)
    assert what == done
    changed = {n for n, a in fitted.items() if a is not arrays[n]}
    assert changed == {n for n, p in large.parameters_and_names() if p.shape != arrays[n].shape}
    assert all(fitted[n].shape == p.shape for n, p in large.parameters_and_names())


def test_codes_of_no_such_grid():
    """Said by the number of patches, not by a reshape deep inside."""
    model = localmim.create_model("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=24, depth=1)
    arrays = {"encoder.pos_embed": np.zeros((1, 1 + 7, 24), np.float32)}
    with pytest.raises(UserError, match="holds 7 patches"):
        fit_to_size(arrays, model)


def test_a_shared_bias_table():
    """BEiT's encoder downstream: the table of pre-training in each block, at another size; class token's rows kept."""
    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    small = localmim.create_model("beit_vit_tiny_patch16_224", image_size=(24, 32), **sizes)
    large = localmim.create_model("beit_tiny_patch16_224", image_size=(48, 40), **sizes)
    arrays = weights_of(small)
    table = np.random.default_rng(0).normal(size=arrays["encoder.relative.table"].shape).astype(np.float32)
    fitted, what = fit_to_size({**arrays, "encoder.relative.table": table}, large, (24, 32))
    assert what == ["the shared bias table, now one in each of 2 blocks", "2 bias tables"]
    assert "encoder.relative.table" not in fitted
    for i in range(2):
        own = fitted[f"encoder.blocks.{i}.attn.relative.table"]
        assert own.shape == (11 * 9 + 3, 2) and np.array_equal(own[-3:], table[-3:])
    same = localmim.create_model("beit_tiny_patch16_224", image_size=(24, 32), **sizes)
    fitted, _ = fit_to_size({**arrays, "encoder.relative.table": table}, same, (24, 32))
    assert np.array_equal(fitted["encoder.blocks.1.attn.relative.table"], table)


def test_irpe_fits_every_size():
    """LoMaR's tables depend on no grid: nothing is resized."""
    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    arrays = weights_of(localmim.create_model("lomar_vit_tiny_patch16_224", image_size=32, window=3, views=2, **sizes))
    large = localmim.create_model("vit_irpe_tiny_patch16_224", image_size=48, **sizes)
    fitted, what = fit_to_size(arrays, large, 32)
    assert what == [] and fitted["encoder.blocks.0.attn.relative.table"].shape == (1, 12, 50)


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        ("mae_vit_tiny_patch16_224", "vit_tiny_patch16_224", "encoder.pos_embed"),
        ("beit_vit_tiny_patch16_224", "beit_tiny_patch16_224", "encoder.blocks.0.attn.relative.table"),
    ],
)
def test_a_turned_image(before, after, name):
    """24x32 px and 32x24 px have as many patches: shapes are equal, places are not."""
    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    arrays = weights_of(localmim.create_model(before, image_size=(24, 32), **sizes))
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(size=a.shape).astype(np.float32) for n, a in arrays.items()}
    same = localmim.create_model(after, image_size=(24, 32), num_classes=2, **sizes)
    turned = localmim.create_model(after, image_size=(32, 24), num_classes=2, **sizes)
    kept, changed = (fit_to_size(arrays, model, (24, 32)).arrays[name] for model in (same, turned))
    assert kept.shape == changed.shape and not np.allclose(kept, changed)

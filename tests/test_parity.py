"""The parity command on the stored golden files, and the proof that it can fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import parity

GOLDEN = Path(__file__).parent / "golden"


def changed(path: Path, target: Path, **arrays: np.ndarray) -> str:
    """A copy of a golden file with some arrays replaced."""
    with np.load(path) as z:
        everything = {name: z[name] for name in z.files}
    assert arrays.keys() <= everything.keys()
    np.savez(target, **{**everything, **arrays})
    return str(target)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("localmim_misc.npz", 9),
        ("localmim_hog_img64_nb9.npz", 8),
        ("localmim_hog_img64_nb18.npz", 8),
        ("localmim_vit_mim_epsprobe.npz", 55),
        ("localmim_swin_mim_epsprobe.npz", 92),
        ("localmim_swin_grouping.npz", 232),
        ("localmim_vit_cls_img64.npz", 14),
        ("localmim_swin_cls_epsprobe.npz", 13),
        ("mae_p8.npz", 27),
        ("lomar_n3.npz", 22),
        ("simmim_vit.npz", 58),
        ("greenmim_swin160_r50.npz", 58),
        ("maskfeat_slowfast.npz", 52),
        ("beit.npz", 58),
        ("beit_block_masks.npz", 36),
        ("convmae_64.npz", 58),
    ],
)
def test_equals_the_authors(capsys, file, values):
    """Latents, predictions, targets, losses, gradients, HOG, position codes and schedules of the authors' own code."""
    code = parity.main([str(GOLDEN / file)])
    out = capsys.readouterr().out
    assert code == 0, "\n".join(line for line in out.splitlines() if not line.startswith("ok"))
    assert out.count("\nok ") == values and "FAIL" not in out and "SKIP" not in out


def test_a_weight_that_is_off_is_seen(capsys, tmp_path):
    """One array of the decoder moved by about 1e-3: what comes after it must not pass, what comes before must."""
    file, name = GOLDEN / "mae_p8.npz", "param/decoder_embed.weight"
    with np.load(file) as z:
        noise = np.random.default_rng(0).normal(0, 1e-3, z[name].shape)  # a constant would vanish in the next norm
        copy = changed(file, tmp_path / "off.npz", **{name: (z[name] + noise).astype(np.float32)})
    assert parity.main([copy]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = {line.split()[1] for line in lines if line.startswith("FAIL")}
    assert {"pred", "loss"} <= failed
    assert not failed & {"ids_keep", "ids_restore", "mask", "latent", "target"}


def test_a_value_that_is_off_is_seen(capsys, tmp_path):
    """One bin of a histogram, one number of a position code: NaN, which compares as neither more nor less."""
    hog, misc = GOLDEN / "localmim_hog_img64_nb9.npz", GOLDEN / "localmim_misc.npz"
    with np.load(hog) as z:
        histogram = z["nobias/pool32/out"].copy()
    histogram[0, 0] += 1e-3
    with np.load(misc) as z:
        name = next(n for n in z.files if n.startswith("sincos/"))
        code = z[name].copy()
    code[1, 1] = np.nan
    files = [
        changed(hog, tmp_path / "hog.npz", **{"nobias/pool32/out": histogram}),
        changed(misc, tmp_path / "misc.npz", **{name: code}),
    ]
    for file, fails in zip(files, ("nobias/pool32/out", name)):
        assert parity.main([file]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[1] for line in lines if line.startswith("FAIL")] == [fails]


def test_nothing_to_compare_is_not_success(capsys, tmp_path):
    """A case that this version does not know, and a file that is not there: exit code 2, never 0."""
    path = tmp_path / "other.npz"
    np.savez(path, config=np.array(json.dumps({"case": "unheard_of"})))
    assert parity.main([str(path)]) == 2
    assert "SKIP unheard_of" in capsys.readouterr().out
    assert parity.main([str(tmp_path / "nowhere.npz")]) == 2
    assert "no such file" in capsys.readouterr().err

"""`python -m localmim.convert`: there and back bit for bit for every family, and refusals that leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from torch_files import tensors, write_zip

import localmim
from localmim import cli
from localmim.config import config_from_dict
from localmim.convert import names
from localmim.convert.__main__ import main
from localmim.convert.families import written_as
from localmim.convert.load import weights_of
from localmim.convert.shapes import CODEBOOK
from localmim.mim.model import MaskedImageModel
from localmim.models.classifier import Classifier
from localmim.training.build import build_model
from localmim.training.checkpoint import weights_header
from localmim.training.restore import restore

GOLDEN = Path(__file__).parents[1] / "golden"
VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"image_size": 64, "embed_dim": 8, "depths": [2, 2, 1], "num_heads": [1, 2, 2], "window_size": 4}


def golden(file: str) -> dict[str, np.ndarray]:
    """The authors' own weights of a tiny model."""
    with np.load(GOLDEN / file) as z:
        weights = {k.removeprefix("param/"): z[k] for k in z.files if k.startswith("param/")}
    return {n: a.astype(np.int64) if a.dtype == np.int32 else a for n, a in weights.items()}


def classifier(name: str, pool: str = "mean", **sizes) -> dict[str, np.ndarray]:
    """Random weights of a classifier, by the authors' names."""
    model = localmim.create_model(name, pool=pool, **sizes)
    rng = np.random.default_rng(0)
    ours = {n: rng.normal(size=a.shape).astype(np.float32) for n, a in weights_of(model).items()}
    return names.classifier_to_torch(ours, pool, getattr(model.encoder, "stages", ()))


def swin_pretraining() -> dict[str, np.ndarray]:
    """With the index buffers, which the golden file leaves out."""
    theirs = golden("localmim_swin_mim_epsprobe.npz")
    tables = {n: a for n, a in theirs.items() if n.endswith("bias_table")}
    index = names.to_torch(tables, [], hog=False)
    return {**theirs, **{n: a for n, a in index.items() if n not in tables}}


def method(name: str, spelling: str = "", **sizes) -> dict[str, np.ndarray]:
    """Random weights of a method's tiny pre-training or fine-tuning, by its authors' names."""
    classes = sizes.get("num_classes")
    target = {"kind": "codebook", "codebook": [CODEBOOK], "vocab": 48} if name.startswith("beit_vit") else {}
    values = {"task": "finetune" if classes else "pretrain", "model": {"name": name, **sizes}, "target": target}
    config = config_from_dict(values)
    model = build_model(config)
    rng = np.random.default_rng(0)
    ours = {n: rng.normal(size=a.shape).astype(np.float32) for n, a in weights_of(model).items()}
    return written_as(model, config, spelling).to_torch(ours, model, config)


MAE_DECODER = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 4}
TOKEN_SIZES = {**VIT, "image_size": 64, "patch_size": 16}  # of methods that replace hidden patches
CONV_SIZES = {"embed_dims": [8, 12, 16], "depths": [1, 2, 1], "num_heads": 2, "image_size": 32}
HEADS = ["--num-heads", "2"]
FAMILIES = {
    "vit": (lambda: golden("localmim_vit_mim_epsprobe.npz"), ["--num-heads", "4", "--decoder-heads", "4"]),
    "swin": (swin_pretraining, []),
    "vit_mean": (lambda: classifier("vit_base_patch16_224", num_classes=5, **VIT), ["--num-heads", "2"]),
    "vit_token": (lambda: classifier("vit_base_patch16_224", "token", num_classes=5, **VIT), ["--num-heads", "2"]),
    "vit_encoder": (lambda: classifier("vit_base_patch16_224", **VIT), ["--num-heads", "2"]),
    "swin_mean": (lambda: classifier("swin_base_patch4_window7_224", num_classes=5, **SWIN), []),
    "swin_official": (
        lambda: classifier("swin_base_patch4_window7_224", "normed_mean", num_classes=5, **SWIN),
        ["--pool", "normed_mean"],
    ),
    "swin_encoder": (lambda: classifier("swin_base_patch4_window7_224", **SWIN), []),
    "mae": (
        lambda: method("mae_vit_base_patch16_224", **VIT, **MAE_DECODER),
        [*HEADS, "--decoder-heads", "4"],
    ),
    "lomar": (lambda: method("lomar_vit_base_patch16_224", **{**VIT, "image_size": 64}), []),
    "lomar_finetuned": (
        lambda: method("vit_irpe_base_patch16_224", num_classes=5, **VIT),
        ["--image-size", "32"],
    ),
    "simmim_vit": (lambda: method("simmim_vit_base_patch16_224", **TOKEN_SIZES), []),
    "simmim_swin": (lambda: method("simmim_swin_base_patch4_window6_192", **SWIN), []),
    "greenmim": (
        lambda: method("greenmim_swin_base_patch4_window7_224", **SWIN, decoder_dim=16, decoder_heads=4),
        ["--decoder-heads", "4"],
    ),
    "maskfeat": (lambda: method("maskfeat_vit_base_patch16_224", **TOKEN_SIZES), HEADS),
    "maskfeat_mmpretrain": (lambda: method("maskfeat_vit_base_patch16_224", "mmpretrain", **TOKEN_SIZES), HEADS),
    "beit": (lambda: method("beit_vit_base_patch16_224", **TOKEN_SIZES), []),
    "beit_unilm": (lambda: method("beit_vit_base_patch16_224", "unilm", **TOKEN_SIZES), []),
    "beit_finetuned": (lambda: method("beit_base_patch16_224", num_classes=5, **VIT), []),
    "convmae": (
        lambda: method("convmae_convvit_base_patch16_224", **CONV_SIZES, **MAE_DECODER),
        [*HEADS, "--decoder-heads", "4"],
    ),
    "fastconvmae": (
        lambda: method("fastconvmae_convvit_base_patch16_224", **CONV_SIZES, **MAE_DECODER),
        [*HEADS, "--decoder-heads", "4", "--method", "fastconvmae"],
    ),
    "fastconvmae_easycv": (
        lambda: method("fastconvmae_convvit_base_patch16_224", "easycv", **CONV_SIZES, **MAE_DECODER),
        [*HEADS, "--decoder-heads", "4"],
    ),
    "convmae_finetuned": (lambda: method("convvit_base_patch16_224", num_classes=5, **CONV_SIZES), HEADS),
}
PRETRAINED = {n for n in FAMILIES if n.rpartition("_")[2] not in ("finetuned", "mean", "token", "encoder", "official")}


def run(*argv) -> int:
    """The command's exit code."""
    return cli.run(main, [str(a) for a in argv])


def same(found: dict, expected: dict) -> None:
    """Equal names, types and bits."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A family -> PyTorch's arrays, their file, and the weights file that from-torch made of it; each is made once."""
    folder, known = tmp_path_factory.mktemp("converted"), {}

    def convert(family: str) -> tuple[dict[str, np.ndarray], Path, Path]:
        if family not in known:
            make, options = FAMILIES[family]
            theirs, ours = make(), folder / f"{family}.safetensors"
            src = write_zip(folder / f"{family}.pth", {"model": tensors(theirs), "epoch": 3})
            assert run("from-torch", "--src", src, "--out", ours, *options) == 0
            known[family] = theirs, src, ours
        return known[family]

    return convert


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(tmp_path, converted, family):
    """PyTorch's file, ours, PyTorch's again: nothing is lost or rounded, constants included."""
    theirs, _, ours = converted(family)
    back = tmp_path / "back.safetensors"
    spelling = family.rpartition("_")[2]
    written = ["--spelling", spelling] if spelling in ("mmpretrain", "unilm", "easycv") else []
    assert run("to-torch", "--ckpt", ours, "--out", back, *written) == 0
    same(load_file(back), theirs)
    config, model, step = restore(str(ours))
    assert step == 0 and config.task == ("pretrain" if family in PRETRAINED else "finetune")
    assert isinstance(model, MaskedImageModel if family in PRETRAINED else Classifier)
    assert family not in ("maskfeat", "simmim_vit", "beit") or config.model.name.startswith(family)
    assert config.model.name.startswith("fast") == family.startswith("fast")
    assert getattr(model, "pool", "") in ("", "token" if "token" in family else "mean", "normed_mean")
    assert not list(tmp_path.glob(".*")) and not list(ours.parent.glob(".*"))


def test_reads_timm_swin(tmp_path):
    """Its spelling of mergings and head comes to the same weights as the official one."""
    theirs = classifier("swin_base_patch4_window7_224", "normed_mean", num_classes=5, **SWIN)
    timm = {}
    for name, array in theirs.items():
        for s in (1, 0):
            name = name.replace(f"layers.{s}.downsample", f"layers.{s + 1}.downsample")
        timm[name.replace("head.", "head.fc.")] = array
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file(theirs, tmp_path / "official.safetensors")
    src = write_zip(tmp_path / "timm.pth", tensors(timm))
    assert run("from-torch", "--src", tmp_path / "official.safetensors", "--out", one, "--pool", "normed_mean") == 0
    assert run("from-torch", "--src", src, "--out", two) == 0
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("family", ["vit", "swin", "vit_mean", "swin_mean"])
def test_encoder(tmp_path, converted, capsys, family):
    """The same encoder straight from PyTorch's file and by way of ours; what it leaves behind is counted."""
    options = FAMILIES[family][1]
    theirs, src, whole = converted(family)
    direct, one, two = (tmp_path / f"{n}.safetensors" for n in ("direct", "one", "two"))
    assert run("to-torch", "--ckpt", whole, "--out", one, "--encoder-only") == 0
    capsys.readouterr()
    assert run("from-torch", "--src", src, "--out", direct, "--as", "encoder", *options[:2]) == 0
    said = capsys.readouterr().out
    assert run("to-torch", "--ckpt", direct, "--out", two) == 0
    same(load_file(one), load_file(two))
    plain = {n.removeprefix("encoder."): a for n, a in theirs.items()}
    expected = {
        n: a for n, a in plain.items() if not n.startswith(("norm.", "fc_norm.", "head.", "decoder.", "hog_enc."))
    }
    same({n: a for n, a in load_file(one).items() if n in plain or "attn_mask" not in n}, expected)
    left = len(plain) - len(expected)
    counts = [int(line.split()[0]) for line in said.splitlines() if "left behind" in line]
    assert sum(counts) == left > 0
    assert restore(str(direct))[1].num_classes == 0


def test_permuted_merging(tmp_path):
    """The published order is kept unless it is asked for, both ways to an encoder alike (Q3)."""
    src = write_zip(tmp_path / "a.pth", tensors(swin_pretraining()))
    whole, direct, one, two, plain = (tmp_path / f"{n}.safetensors" for n in ("w", "d", "one", "two", "plain"))
    permute = ("--merging", "permute")
    assert run("from-torch", "--src", src, "--out", whole) == 0
    assert run("to-torch", "--ckpt", whole, "--out", plain, "--encoder-only") == 0
    assert run("to-torch", "--ckpt", whole, "--out", one, "--encoder-only", *permute) == 0
    assert run("from-torch", "--src", src, "--out", direct, "--as", "encoder", *permute) == 0
    assert run("to-torch", "--ckpt", direct, "--out", two) == 0
    same(load_file(one), load_file(two))
    before, after = load_file(plain), load_file(one)
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    assert changed and all("downsample" in n for n in changed)
    assert not restore(str(direct))[0].reference_quirks


ENCODERS = {  # family, --as encoder's options, names that are left behind, and what fine-tuning adds to the rest
    "mae": (HEADS, ("norm.", "mask_token", "decoder_")),
    "lomar": ([], ("norm.", "mask_token", "encoder_pred.", "pos_embed")),
    "simmim_swin": ([], ("norm.", "mask_token", "decoder.")),
    "greenmim": ([], ("norm.", "mask_token", "decoder_")),
    "maskfeat": (HEADS, ("mask_token", "pred_head.", "hogs.")),
    "beit_unilm": ([], ("norm.", "mask_token", "lm_head.", "rel_pos_bias.")),
    "simmim_vit": ([], ("norm.", "mask_token", "decoder.", "rel_pos_bias.")),
    "convmae": (HEADS, ("norm.", "mask_token", "decoder_", "stage1_", "stage2_")),
    "fastconvmae_easycv": (HEADS, ("norm.", "mask_token", "decoder", "stage1_", "stage2_")),
}


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_of_methods(tmp_path, converted, capsys, family):
    """As the authors' fine-tuning takes them, from either side: no prefix, nothing of pre-training, a table a block."""
    options, left = ENCODERS[family]
    theirs, src, whole = converted(family)
    direct, one, two = (tmp_path / f"{n}.safetensors" for n in ("direct", "one", "two"))
    assert run("to-torch", "--ckpt", whole, "--out", one, "--encoder-only") == 0
    capsys.readouterr()
    assert run("from-torch", "--src", src, "--out", direct, "--as", "encoder", *options) == 0
    counts = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines() if "left behind" in line]
    assert run("to-torch", "--ckpt", direct, "--out", two) == 0
    same(load_file(one), load_file(two))
    plain = {n.removeprefix("encoder."): a for n, a in theirs.items()}
    expected = {n: a for n, a in plain.items() if not n.startswith(left)}
    constants = ("pos_embed", "hogs.", "rel_pos_bias.")  # of those that are left
    assert sum(counts) == len([n for n in plain if n.startswith(tuple(n for n in left if n not in constants))])
    if family in ("beit_unilm", "simmim_vit"):
        for kind in ("bias_table", "index"):
            array = plain[f"rel_pos_bias.relative_position_{kind}"]
            expected.update({f"blocks.{i}.attn.relative_position_{kind}": array for i in range(2)})
    found = load_file(one)
    same({n: a for n, a in found.items() if n in expected or "attn_mask" not in n}, expected)


def test_a_tokenizer_beside_beit_is_left_behind(tmp_path, converted, capsys):
    """mmpretrain stores DALL-E's with the model; it is no part of it, and is counted."""
    theirs, _, ours = converted("beit")
    tokenizer = {f"target_generator.encoder.{n}.w": np.ones(3, np.float32) for n in ("input", "output")}
    src = write_zip(tmp_path / "a.pth", {"state_dict": tensors({**theirs, **tokenizer})})
    assert run("from-torch", "--src", src, "--out", tmp_path / "o.safetensors") == 0
    assert "2 left behind, target_generator.*" in capsys.readouterr().out
    same(load_file(tmp_path / "o.safetensors"), load_file(ours))


def test_spellings(tmp_path, converted, capsys):
    """Several names for one model: another is refused with those that there are, and an encoder has one."""
    ckpt, out = converted("maskfeat")[2], tmp_path / "c.safetensors"
    assert run("to-torch", "--ckpt", ckpt, "--out", out, "--spelling", "timm") == 2
    assert "is written as slowfast or mmpretrain" in capsys.readouterr().err
    assert run("to-torch", "--ckpt", ckpt, "--out", out, "--spelling", "mmpretrain", "--encoder-only") == 2
    assert "--spelling is for whole models" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"blocks.1.mlp.fc1.weight": "blocks.1.mlp.fc3.weight"},
            "is blocks.1.mlp.fc3.weight meant as encoder.blocks.1.mlp.fc1",
        ),
        ({"head.bias": None}, "1 missing: head.bias"),
        ({"gamma": np.ones(3)}, "1 unexpected: gamma"),
        ({"fc_norm.weight": np.ones(3)}, r"1 misshaped: norm.gamma [3] for [16]"),
        ({"encoder.cls_token": np.ones((1, 1, 16))}, "two tensors are encoder.cls_token"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, capsys, change, said):
    """A renamed, lost, added or mis-shaped tensor: one line with its name, exit code 2, and no file."""
    theirs = FAMILIES["vit_mean"][0]()
    for name, to in change.items():
        if isinstance(to, np.ndarray):
            theirs[name] = to.astype(np.float32)
        else:
            array = theirs.pop(name)
            theirs.update({to: array} if to else {})
    src = write_zip(tmp_path / "a.pth", tensors(theirs))
    assert run("from-torch", "--src", src, "--out", tmp_path / "o.safetensors", "--num-heads", 2) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["a.pth"]


def test_index_buffers_are_checked(tmp_path, capsys):
    """Another order of relative positions would give each row of the bias table another meaning."""
    theirs = FAMILIES["swin_mean"][0]()
    name = next(n for n in theirs if n.endswith("index"))
    theirs[name] = theirs[name].T
    src = write_zip(tmp_path / "a.pth", tensors({n: np.ascontiguousarray(a) for n, a in theirs.items()}))
    assert run("from-torch", "--src", src, "--out", tmp_path / "o.safetensors") == 2
    assert f"{name} is not the official order" in capsys.readouterr().err


def test_a_file_that_is_there_stays(tmp_path, capsys):
    """An --out is replaced only when told; a name without .safetensors would be no weights file."""
    src = write_zip(tmp_path / "a.pth", tensors(FAMILIES["vit_mean"][0]()))
    out = tmp_path / "o.safetensors"
    out.write_bytes(b"precious")
    command = ("from-torch", "--src", src, "--num-heads", 2, "--out", out)
    assert run(*command) == 2 and out.read_bytes() == b"precious"
    assert "is there already" in capsys.readouterr().err
    assert run(*command, "--overwrite", "true") == 0 and restore(str(out))
    assert run("to-torch", "--ckpt", out, "--out", out) == 2
    assert run("to-torch", "--ckpt", out, "--out", tmp_path / "o.pth") == 2
    assert "ends in .safetensors" in capsys.readouterr().err


def test_recipe(tmp_path, capsys):
    """A recipe takes the place of what would be found: its task and sizes must be those of the weights."""
    src = write_zip(tmp_path / "a.pth", tensors(FAMILIES["vit_mean"][0]()))
    recipe, out = tmp_path / "r.yaml", tmp_path / "o.safetensors"
    model = {"name": "vit_base_patch16_224", "num_classes": 5, "pool": "mean", **VIT, "num_heads": 4}
    command = ("from-torch", "--src", src, "--out", out, "--config", recipe)
    recipe.write_text(yaml.safe_dump({"task": "finetune", "seed": 7, "model": model}))
    assert run(*command) == 0
    config, restored, _ = restore(str(out))
    assert config.seed == 7 and restored.encoder.blocks[0].attn.num_heads == 4
    recipe.write_text(yaml.safe_dump({"task": "finetune", "model": {**model, "depth": 3}}))
    assert run(*command, "--overwrite", "true") == 2
    assert "12 missing: encoder.blocks.2" in capsys.readouterr().err
    recipe.write_text(yaml.safe_dump({"task": "pretrain"}))
    assert run(*command, "--overwrite", "true") == 2
    assert "recipe of task pretrain, expected finetune" in capsys.readouterr().err
    assert run(*command, "--num-heads", 2, "--overwrite", "true") == 2
    assert "--config says all sizes" in capsys.readouterr().err


def test_what_names_do_not_tell_comes_from_a_recipe(tmp_path, capsys):
    """Decoders at some stages only, and a codebook's targets: refused with a hint, read with the run's own recipe."""
    sizes = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 2], "decoder_dim": 16, "decoder_heads": 2}
    values = {
        "task": "pretrain",
        "model": {"name": "localmim_swin_base_patch4_window7_224", "taps": [1, 3], **sizes},
        "target": {"kind": "codebook", "codebook": ["words.safetensors"], "vocab": 32},
    }
    config = config_from_dict(values)
    weights = weights_of(build_model(config))
    ckpt, theirs, out, recipe = (tmp_path / n for n in ("a.safetensors", "b.safetensors", "c.safetensors", "r.yaml"))
    save_file(weights, ckpt, weights_header(5, config.as_dict()))
    assert run("to-torch", "--ckpt", ckpt, "--out", theirs) == 0
    assert "note: trained without reference_quirks" in capsys.readouterr().out
    assert run("from-torch", "--src", theirs, "--out", out) == 2
    assert "2 decoders for 4 stages: give the recipe" in capsys.readouterr().err
    recipe.write_text(yaml.safe_dump(values))
    assert run("from-torch", "--src", theirs, "--out", out, "--config", recipe) == 0
    same(load_file(out), weights)


def test_a_recipe_without_classes_takes_them_from_the_head(tmp_path):
    """As the recipes of config/finetune are, whose classes follow from images that are not needed here."""
    theirs, out, recipe = (tmp_path / n for n in ("b.safetensors", "c.safetensors", "r.yaml"))
    save_file(classifier("vit_base_patch16_224", num_classes=5, **VIT), theirs)
    recipe.write_text(yaml.safe_dump({"task": "finetune", "model": {"name": "vit_base_patch16_224", **VIT}}))
    assert run("from-torch", "--src", theirs, "--out", out, "--config", recipe) == 0
    assert load_file(out)["head.weight"].shape == (5, VIT["embed_dim"])


def test_merging_only_where_there_is_one(tmp_path, capsys):
    """Asked for where it means nothing it is an error, not ignored."""
    src = write_zip(tmp_path / "a.pth", tensors(FAMILIES["swin_mean"][0]()))
    out = tmp_path / "o.safetensors"
    assert run("from-torch", "--src", src, "--out", out, "--as", "encoder", "--merging", "permute") == 2
    assert run("from-torch", "--src", src, "--out", out) == 0
    permute = ("--merging", "permute", "--encoder-only")
    assert run("to-torch", "--ckpt", out, "--out", tmp_path / "p.safetensors", *permute) == 2
    assert capsys.readouterr().err.count("error: merging permute is for") == 2


def test_linear_probe(tmp_path, capsys):
    """It has no counterpart; its encoder has."""
    config = config_from_dict(
        {"task": "linear_probe", "model": {"name": "vit_base_patch16_224", "num_classes": 5, **VIT}}
    )
    model = build_model(config)
    ckpt, out = tmp_path / "probe.safetensors", tmp_path / "o.safetensors"
    save_file(weights_of(model), ckpt, weights_header(9, config.as_dict()))
    assert run("to-torch", "--ckpt", ckpt, "--out", out) == 2
    assert "is a linear probe" in capsys.readouterr().err
    assert run("to-torch", "--ckpt", ckpt, "--out", out, "--encoder-only") == 0
    encoder = {n: a for n, a in weights_of(model).items() if n.startswith("encoder.")}
    same(load_file(out), names.classifier_to_torch(encoder, "mean"))


def test_half_precision_becomes_float32(tmp_path):
    """Exactly: the values do not change."""
    theirs = {n: a.astype(np.float16) for n, a in FAMILIES["vit_mean"][0]().items()}
    src = write_zip(tmp_path / "a.pth", tensors(theirs))
    out, back = tmp_path / "o.safetensors", tmp_path / "b.safetensors"
    assert run("from-torch", "--src", src, "--out", out, "--num-heads", 2) == 0
    assert run("to-torch", "--ckpt", out, "--out", back) == 0
    same(load_file(back), {n: a.astype(np.float32) for n, a in theirs.items()})


def test_as_a_command(tmp_path):
    """In a process of its own: a malicious file is exit code 2 and one line; nothing else is on stderr."""
    mark = tmp_path / "was_run"
    raw = (
        b"\x80\x02cposix\nsystem\nX" + len(f"touch {mark}").to_bytes(4, "little") + f"touch {mark}".encode() + b"\x85R."
    )
    src = write_zip(tmp_path / "a.pth", raw=raw)
    command = [sys.executable, "-m", "localmim.convert", "from-torch", "--src", str(src), "--out", "o.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "posix.system" in done.stderr and done.stderr.count("\n") == 1
    assert not mark.exists() and os.listdir(tmp_path) == ["a.pth"]

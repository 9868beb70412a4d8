"""Recipes: bases, overrides, types, and mistakes that must be one clear line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from localmim.config import Config, config_from_dict, load_config, read_recipe
from localmim.errors import UserError

RECIPES = sorted((Path(__file__).parents[1] / "config").glob("*/*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and gives its path."""

    def write(text: str, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refused(argv: list[str]) -> str:
    """The one line that the user gets."""
    with pytest.raises(UserError) as caught:
        load_config(argv)
    message = str(caught.value)
    assert "\n" not in message and message
    return message


def test_defaults_and_values(recipe):
    """What a recipe leaves out is the default; YAML's `1e-3`, a string to the letter of YAML, is a number here."""
    config = load_config(["--config", recipe("epochs: 7\noptimizer: {blr: 1e-3}\ndata: {crop_scale: [0.5, 1]}\n")])
    expected = Config(epochs=7)
    expected.optimizer.blr = 1e-3
    expected.data.crop_scale = (0.5, 1.0)
    assert config == expected
    assert isinstance(config.data.crop_scale, tuple) and isinstance(config.data.crop_scale[1], float)


def test_base(recipe):
    """A recipe lists only what differs from its base, key by key, over two levels and beside the base's folder."""
    recipe("epochs: 5\nbatch_size: 8\nmodel: {depth: 8, scales: [4, 1]}\n", "bottom.yaml")
    recipe("base: ../bottom.yaml\nbatch_size: 16\nmodel: {embed_dim: 48}\n", "sub/middle.yaml")
    config = load_config(["--config", recipe("base: sub/middle.yaml\nmodel: {scales: [1]}\n", "top.yaml")])
    assert (config.epochs, config.batch_size) == (5, 16)
    assert (config.model.depth, config.model.embed_dim, config.model.scales) == (8, 48, [1.0])


def test_overrides(recipe):
    """The command line wins over the recipe and leaves its neighbours alone; both ways to write a value work."""
    path = recipe("epochs: 5\nmodel: {depth: 8, image_size: 64}\noptimizer: {blr: 1e-3, clip_grad: 1.0}\n")
    words = "--optimizer.blr 1e-4 --model.scales=[1,0.5] --model.image_size [64,32] --optimizer.clip_grad null"
    config = load_config([*words.split(), "--config", path, "--target.bias=true"])
    assert config.optimizer.blr == 1e-4 and config.optimizer.clip_grad is None
    assert config.model.scales == [1.0, 0.5] and config.model.image_size == [64, 32] and config.model.depth == 8
    assert config.epochs == 5 and config.target.bias is True


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads(path):
    """A recipe in the repository that does not parse is found by its first user otherwise."""
    assert isinstance(load_config(["--config", str(path)]), Config)


def test_round_trip(recipe):
    """A checkpoint's config goes through JSON, a run's through YAML: both give the same recipe again."""
    path = recipe("model: {image_size: [64, 32], scales: [1]}\ndata: {mean: [0.5], crop_ratio: [0.9, 1.1]}\n")
    config = load_config(["--config", path, "--optimizer.lr", "3e-5", "--max_steps", "9"])
    values = config.as_dict()
    assert values["data"]["crop_ratio"] == [0.9, 1.1]
    assert values.keys() == {f.name for f in dataclasses.fields(Config)}
    assert config_from_dict(json.loads(json.dumps(values))) == config
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(values))) == config


def test_config_from_dict_checks_too():
    """A config out of a damaged or newer checkpoint is no better than one from a file."""
    with pytest.raises(UserError, match=r"unknown key 'optimizer.brl': did you mean 'blr'"):
        config_from_dict({"optimizer": {"brl": 1}})
    with pytest.raises(UserError, match="epochs is 0"):
        config_from_dict({"epochs": 0})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer: {brl: 1}", "unknown key 'optimizer.brl': did you mean 'blr'?"),
        ("optimiser: {blr: 1}", "unknown key 'optimiser': did you mean 'optimizer'?"),
        ("model: {xyz: 1}", "unknown key 'model.xyz': known here: name, image_size"),
        ("optimizer: 5", "optimizer is 5, expected a mapping of keys to values"),
        ("model:", "model is None, expected a mapping"),
        ("[1, 2]", "is not a recipe: expected a mapping"),
        ("", "is not a recipe: expected a mapping"),
        ("a: [", "is not YAML"),
        ("base: recipe.yaml", "its `base` leads back to itself"),
        ("base: nowhere.yaml", "nowhere.yaml: No such file"),
    ],
)
def test_wrong_files(recipe, text, said):
    """The file and the key are named, with the near key where there is one."""
    message = refused(["--config", recipe(text)])
    assert said in message and ".yaml" in message


def test_an_unknown_key_in_a_base_names_the_base(recipe):
    """The mistake is in another file than the one on the command line."""
    recipe("epoch: 3\n", "bottom.yaml")
    message = refused(["--config", recipe("base: bottom.yaml\n")])
    assert "bottom.yaml: unknown key 'epoch': did you mean 'epochs'?" in message


def test_a_loop_of_bases(recipe):
    """Through two files it would recurse without an end."""
    recipe("base: recipe.yaml\n", "other.yaml")
    assert "leads back to itself" in refused(["--config", recipe("base: other.yaml\n")])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--optimizer.brl 1", "unknown key '--optimizer.brl': did you mean 'blr'?"),
        ("--optimiser.blr 1", "unknown key '--optimiser.blr': did you mean 'optimizer'?"),
        ("--seed.x 1", "unknown key '--seed.x': 'seed' has no keys below it"),
        ("--epochs", "--epochs has no value"),
        ("epochs 3", "unexpected argument 'epochs'"),
        ("--epochs many", "epochs"),
        ("--epochs 1.5", "epochs"),
        ("--optimizer.blr fast", "optimizer.blr"),
        ("--model.scales 1", "model.scales"),
        ("--data.crop_scale [0.1]", "data.crop_scale"),
        ("--target.bias maybe", "target.bias"),
        ("--precision fp8", "'fp32', 'fp16', 'bf16'"),
        ("--device cuda", "'auto', 'CPU', 'GPU', 'Ascend'"),
        ("--target.kind hogg", "'hog', 'pixels'"),
        ("--optimizer 5", "optimizer"),
        ("--mask.ratio 1", "mask.ratio is 1, expected a share between 0 and 1"),
        ("--mask.ratio 0", "mask.ratio is 0"),
        ("--mask.ratio nan", "mask.ratio"),
        ("--epochs 0", "epochs is 0, expected at least 1"),
        ("--batch_size 0", "batch_size is 0"),
        ("--accumulate 0", "accumulate is 0"),
        ("--max_bad_steps 0", "max_bad_steps is 0"),
        ("--log_every 0", "log_every is 0"),
        ("--max_steps 0", "max_steps is 0, expected at least 1, or null"),
        ("--seed -1", "seed is -1, expected 0 to 4294967295"),
        ("--seed 4294967296", "seed is 4294967296"),
        ("--checkpoint.keep 0", "checkpoint.keep is 0"),
        ("--checkpoint.every_steps -1", "checkpoint.every_steps"),
        ("--optimizer.betas [0.9,1]", "optimizer.betas is [0.9, 1.0]"),
        ("--optimizer.eps -1", "optimizer.eps is -1, expected at least 0"),
        ("--optimizer.weight_decay -0.1", "optimizer.weight_decay is -0.1"),
        ("--optimizer.clip_grad 0", "optimizer.clip_grad is 0, expected more than 0, or null"),
    ],
)
def test_wrong_words(recipe, words, said):
    """Names the key and what was expected, before anything is built or written."""
    assert said in refused(["--config", recipe("epochs: 5\n"), *words.split()])


def test_missing_recipe(tmp_path):
    """No file named, no such file, a folder, bytes that are no text."""
    assert "expected --config FILE.yaml" in refused([])
    assert "nowhere.yaml: No such file" in refused(["--config", str(tmp_path / "nowhere.yaml")])
    assert "cannot read the recipe" in refused(["--config", str(tmp_path)])
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "bytes.yaml is not YAML" in refused(["--config", str(tmp_path / "bytes.yaml")])


def test_reading_a_recipe_leaves_the_base_key_out(recipe):
    """The merged recipe is what gets stored with a run; a relative path in it would mean nothing there."""
    recipe("epochs: 5\n", "bottom.yaml")
    assert read_recipe(Path(recipe("base: bottom.yaml\nseed: 1\n"))) == {"epochs": 5, "seed": 1}

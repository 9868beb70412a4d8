"""Every method by its demo recipe: it trains, its loss falls, and its encoder goes on downstream."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from localmim.config import PUBLISHED, load_config
from localmim.data.builtin import write_builtin_images
from localmim.mim.codebook import build as build_codebook
from localmim.models.registry import arguments_of, list_models
from localmim.training.build import build_model
from localmim.training.initial import set_initial_weights
from localmim.training.loop import train

ROOT = Path(__file__).parents[2]
DOWNSTREAM = {  # the classifier of each
    "mae_vit": "vit_tiny_patch16_224",
    "simmim_vit": "beit_tiny_patch16_224",
    "simmim_swin": "swin_tiny_patch4_window7_224",
    "greenmim_swin": "swin_tiny_patch4_window7_224",
    "maskfeat_vit": "vit_tiny_patch16_224",
    "beit_vit": "beit_tiny_patch16_224",
    "lomar_vit": "vit_irpe_tiny_patch16_224",
    "convmae_convvit": "convvit_base_patch16_224",
    "fastconvmae_convvit": "convvit_base_patch16_224",
}
ENCODER = ("image_size", "patch_size", "embed_dim", "embed_dims", "depth", "depths", "num_heads", "window_size")
DROPPED = {"simmim_vit", "simmim_swin", "fastconvmae_convvit"}  # trained with stochastic depth here, one an encoder
SMALLER = {  # than the recipes
    "vit": {"depth": 2},
    "swin": {"embed_dim": 24, "depths": [1, 1, 2]},
    "convvit": {"depths": [1, 1, 1]},
}
STEPS = 24


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("methods") / "images"
    write_builtin_images(folder, size=64, train_per_class=10, val_per_class=1, progress=False)
    return folder / "train"


@pytest.mark.parametrize("name", DOWNSTREAM)
def test_its_loss_falls(name, images, tmp_path):
    """24 steps of the demo's recipe, smaller models and batches: the mean loss of the last six is below that of
    the first six."""
    more = ["--data.dir", str(images), "--batch_size", "16", "--max_steps", str(STEPS), "--log_every", "6"]
    more += ["--report_every", "null", "--compile_cache", "false"]
    more += ["--optimizer.warmup_epochs", "0", "--optimizer.lr", "1e-3", "--output_dir", str(tmp_path / "run")]
    smaller = dict(SMALLER[name.rpartition("_")[2]])
    if name.startswith(("mae", "convmae", "fastconvmae")):
        smaller["decoder_depth"] = 1
    more += [f"--model.{key}={value}" for key, value in smaller.items()]
    if name in DROPPED:
        more += ["--model.drop_path", "0.1"]
    if name == "beit_vit":
        codebook = str(tmp_path / "codebook.safetensors")
        build_codebook(str(images), codebook, vocab=16, cells=[8], image_size=[64], seed=0)
        more += ["--target.codebook", f"[{codebook}]", "--target.vocab", "16"]
    config = load_config(["--config", str(ROOT / "config" / "demo" / f"{name}.yaml"), *more])
    train(config)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS // 6 and np.isfinite(losses).all()
    assert losses[-1] < 0.98 * losses[0], losses

    sizes = [f"--model.{k}={json.dumps(v)}" for k in ENCODER if (v := getattr(config.model, k)) is not None]
    fine = ["--task", "finetune", "--model.name", DOWNSTREAM[name], "--model.num_classes", "10", *sizes]
    fine += ["--init", str(tmp_path / "run")]
    recipe = tmp_path / "finetune.yaml"
    recipe.write_text("{}")
    config = load_config(["--config", str(recipe), *fine])
    lines = set_initial_weights(build_model(config), config, [f"class {i}" for i in range(10)])
    assert "weights loaded" in lines[0]


@pytest.mark.parametrize("name", list_models("*_base_patch*_224", classifiers=False))
def test_defaults_of_recipes_are_those_of_python(name):
    """What a recipe may leave out is what create_model takes without it."""
    published, arguments = PUBLISHED[name.partition("_")[0]], arguments_of(name)
    assert (published.target, published.norm_pix) == tuple(arguments[k].default for k in ("target", "norm_pix"))


def test_every_method_is_here():
    """A method that is registered has a demo recipe, and says what it hides and predicts."""
    methods = {name.partition("_")[0] for name in list_models(classifiers=False)}
    assert methods == PUBLISHED.keys() == {"localmim", *(name.partition("_")[0] for name in DOWNSTREAM)}

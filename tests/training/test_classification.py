"""Fine-tuning and probing as runs: where weights come from, what is kept, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from localmim.config import config_from_dict, load_config
from localmim.convert.encoder import reorder_merging
from localmim.data.builtin import write_builtin_images
from localmim.errors import RunError, UserError
from localmim.training.checkpoint import read_checkpoint
from localmim.training.diagnose import first_nonfinite
from localmim.training.loop import Run, train
from localmim.training.restore import restore

VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 2}
RECIPE = {
    "task": "finetune",
    "epochs": 2,
    "batch_size": 8,
    "log_every": 1,
    "report_every": None,
    "compile_cache": False,
    "device": "CPU",
    "model": {"name": "vit_tiny_patch16_224", **VIT, "drop_path": 0.2},
    "classification": {"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "eval_every": 0.5},
    "optimizer": {"lr": 1e-3, "warmup_epochs": 1, "layer_decay": 0.75, "ema_decay": 0.5},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twenty images of ten classes to train on, ten to evaluate on."""
    folder = tmp_path_factory.mktemp("images")
    write_builtin_images(folder, size=40, train_per_class=2, val_per_class=1, progress=False)
    return folder


@pytest.fixture()
def make(images, tmp_path):
    """A config from RECIPE and changes to it, section by section."""

    def make(output: str = "run", **changes):
        values = {**RECIPE, "output_dir": str(tmp_path / output)}
        values["data"] = {"dir": str(images / "train"), "val_dir": str(images / "val"), "workers": 1}
        if changes.get("task") == "pretrain" and "optimizer" not in changes:
            values.pop("classification")
            changes["optimizer"] = {"layer_decay": 1, "ema_decay": None}
        for key, value in changes.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        return config_from_dict(values)

    return make


def pretrained(make, output: str, name: str, sizes: dict, **changes):
    """A pre-training run's first checkpoint: one step."""
    config = make(output, task="pretrain", max_steps=1, **changes)
    config.model = type(config.model)(name=name, decoder_dim=16, decoder_heads=2, **{k: v for k, v in sizes.items()})
    run = Run(config)
    run.save()
    return config.output_dir, run.model


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


def test_a_run_that_goes_on_is_bit_for_bit(make):
    """Stopped in the middle of an epoch: mixing, stochastic depth, augmentation, moments and averages all go on."""
    augmented = {"data": {"rand_augment": "m9-mstd0.5-inc1", "erase": 0.5, "val_dir": ""}}
    train(make("whole", **augmented))
    train(make("parts", max_steps=3, **augmented))
    train(make("parts", **augmented))
    whole, parts = (read_checkpoint(make(name).output_dir) for name in ("whole", "parts"))
    assert whole.step == parts.step == 4
    assert equal(whole.weights(), parts.weights())
    assert equal(whole.average(), parts.average())
    assert equal(whole.optimizer(), parts.optimizer())
    assert not np.array_equal(whole.average()["head.weight"], whole.weights()["head.weight"])
    assert whole.classes == sorted(whole.classes) and len(whole.classes) == 10
    assert whole.config["model"]["num_classes"] == 10


def test_what_mixing_and_depth_do_to_the_inputs(make):
    """Soft targets that sum to 1, factors by block and sample; all gone where the recipe has none."""
    run = Run(make())
    batch = next(run.pipeline.epoch(0))
    ((pixels, targets, drop),) = run.row(0, 0, batch)[1]
    assert pixels.shape == batch.images.shape and not np.array_equal(pixels, batch.images)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-5)
    assert targets.min() == pytest.approx(0.01)
    assert drop.shape == (2, 2, 8)
    run = Run(make("plain", model={"drop_path": 0}, classification={"mixup": 0, "cutmix": 0, "label_smoothing": 0}))
    ((pixels, targets),) = run.row(0, 0, batch)[1]
    np.testing.assert_array_equal(pixels, batch.images)
    np.testing.assert_array_equal(targets.argmax(1), batch.labels)
    assert set(np.unique(targets)) == {0.0, 1.0}


def test_encoder_of_a_vit(make):
    """Everything but norm and head comes from pre-training, at another image size with resized codes; head is tiny."""
    path, model = pretrained(make, "pre", "mae_vit_tiny_patch16_224", VIT)
    before = {n: p.asnumpy() for n, p in model.parameters_and_names()}
    run = Run(make(init=path, model={"image_size": 48}))
    after = {n: p.asnumpy() for n, p in run.model.parameters_and_names()}
    shared = [n for n in after if n.startswith("encoder.") and n != "encoder.pos_embed"]
    assert all(np.array_equal(before[n], after[n]) for n in shared) and len(shared) == 4 + 2 * 12 - 1
    assert after["encoder.pos_embed"].shape == (1, 37, 24)
    assert 0 < np.abs(after["head.weight"]).max() < 1e-4
    text = "\n".join(run.beginning)
    assert "28 weights loaded; 4 missing: head.bias, head.weight, norm.beta, norm.gamma" in text
    assert "position codes 4x4 -> 6x6" in text
    assert np.array_equal(run.average.state()["encoder.pos_embed"], after["encoder.pos_embed"])


@pytest.mark.parametrize(
    ("trained", "now", "permuted"), [(True, True, False), (True, False, True), (False, False, False)]
)
def test_merging_of_a_swin(make, trained, now, permuted):
    """Q3: an encoder pre-trained with quirks is taken as it is with quirks, else put into the official order."""
    path, model = pretrained(make, "pre", "localmim_swin_tiny_patch4_window7_224", SWIN, reference_quirks=trained)
    before = {n: p.asnumpy() for n, p in model.parameters_and_names()}
    swin = make(init=path, reference_quirks=now)
    swin.model = type(swin.model)(name="swin_tiny_patch4_window7_224", **SWIN)
    run = Run(swin)
    after = {n: p.asnumpy() for n, p in run.model.parameters_and_names()}
    name = "encoder.layers.0.downsample.reduction.weight"
    expected = reorder_merging(name, before[name]) if permuted else before[name]
    np.testing.assert_array_equal(after[name], expected)
    assert ("official order" in "\n".join(run.beginning)) == permuted


def test_a_classifier_of_the_same_classes_brings_its_head(make):
    """Going on from a fine-tuned model keeps its head; with other classes the head is fresh, and that is said."""
    first = make("first")
    head = Run(first).model.head.weight.asnumpy()
    Run(first).save()
    same = Run(make("same", init=first.output_dir))
    np.testing.assert_array_equal(same.model.head.weight.asnumpy(), head)
    other = Run(make("other", init=first.output_dir, model={"num_classes": 12}))
    assert other.model.head.weight.shape == (12, 24)
    assert "4 missing: head.bias" in "\n".join(other.beginning)


def test_linear_probe(make):
    """Only the head moves; the encoder stays bit for bit, and running statistics are in the checkpoint."""
    path, model = pretrained(make, "pre", "mae_vit_tiny_patch16_224", VIT)
    plain = {"mixup": 0, "cutmix": 0, "label_smoothing": 0}
    optimizer = {"kind": "lars", "lr": 1.0, "weight_decay": 0, "layer_decay": 1, "ema_decay": None}
    config = make(
        "probe", task="linear_probe", init=path, model={"drop_path": None}, classification=plain, optimizer=optimizer
    )
    train(config)
    weights = read_checkpoint(config.output_dir).weights()
    before = {n: p.asnumpy() for n, p in model.parameters_and_names()}
    encoder = [n for n in weights if n.startswith("encoder.")]
    assert encoder and all(np.array_equal(weights[n], before[n]) for n in encoder)
    assert np.abs(weights["norm.moving_mean"]).max() > 0
    _, restored, step = restore(config.output_dir)
    assert step == 4 and np.array_equal(restored.head.weight.asnumpy(), weights["head.weight"])
    assert {n.split(".")[0] for n in read_checkpoint(config.output_dir).optimizer()} == {"velocity"}


def test_nonfinite_steps_stop_with_the_layer(make):
    """The dump works for classifiers as for pre-training."""
    run = Run(make(max_bad_steps=1))
    run.output.mkdir()
    batch = next(run.pipeline.epoch(0))
    batch.images[0, 0, 0, 0] = np.nan
    with pytest.raises(RunError, match="nonfinite_step_1"):
        run.advance(run.row(run.step, 0, batch))
    part = run.row(0, 0, next(run.pipeline.epoch(0)))[1][0]
    assert first_nonfinite(run.task.network, run.optimizer, part) is None


def test_pretraining_goes_on_from_weights(make):
    """A new run from another's weights, all of them; a Swin only with the same quirks, and never from a classifier."""
    swin = "localmim_swin_tiny_patch4_window7_224"
    path, model = pretrained(make, "pre", swin, SWIN, reference_quirks=True)
    config = make("on", task="pretrain", init=path, seed=5, reference_quirks=True)
    config.model = type(config.model)(name=swin, decoder_dim=16, decoder_heads=2, **SWIN)
    run = Run(config)
    before = {n: p.asnumpy() for n, p in model.parameters_and_names()}
    assert equal(before, {n: p.asnumpy() for n, p in run.model.parameters_and_names()})
    assert f"{len(before)} weights loaded" in run.beginning[0]
    config.reference_quirks = False
    with pytest.raises(UserError, match="was trained with reference_quirks true"):
        Run(config)
    classifier = make("first")
    Run(classifier).save()
    config.init = classifier.output_dir
    with pytest.raises(UserError, match="is of task finetune"):
        Run(config)


def test_a_run_stopped_while_it_was_measured(make, monkeypatch):
    """The step is saved before it is measured; the same command measures it first and ends as if nothing had been."""
    plain = {"classification": {"eval_every": 1}, "checkpoint": {"every_epochs": 1, "every_steps": 0}}
    plain["model"] = {"depth": 1}
    train(make("whole", **plain))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", lambda run: (_ for _ in ()).throw(UserError("too many unreadable images")))
        with pytest.raises(UserError, match="too many"):
            train(make("parts", **plain))
    assert read_checkpoint(make("parts").output_dir).step == 2
    train(make("parts", **plain))
    times = {"time", "step_s", "images_per_s", "data_wait_s"}
    whole, parts = (
        [json.loads(line) for line in (Path(make(name).output_dir) / "metrics.jsonl").open()]
        for name in ("whole", "parts")
    )
    assert [r["step"] for r in whole if "val_top1" in r] == [2, 4]
    assert {"val_top5", "val_loss", "val_top1_average"} <= whole[-1].keys() and "loss_scales" not in whole[-1]
    assert [{k: v for k, v in r.items() if k not in times} for r in whole] == [
        {k: v for k, v in r.items() if k not in times} for r in parts
    ]
    whole, parts = (read_checkpoint(make(name).output_dir) for name in ("whole", "parts"))
    assert equal(whole.weights(), parts.weights()) and whole.state["recorded"] and parts.state["recorded"]


def test_what_shapes_do_not_tell(make):
    """Another number of heads is refused; untrained blocks, another pooling and an unread init are said."""
    path, _ = pretrained(make, "pre", "localmim_vit_tiny_patch16_224", {**VIT, "depth": 7, "scales": [2.0, 1.0]})
    with pytest.raises(UserError, match=r"blocks\.0\.attn was trained with 2 heads, this recipe has 4"):
        Run(make(init=path, model={"depth": 7, "num_heads": 4}))
    run = Run(make(init=path, model={"depth": 7, "pool": "token"}))
    assert "the top 2 of 7 blocks were not pre-trained" in "\n".join(run.beginning)
    run.save()
    again = Run(make("next", init=run.config.output_dir, model={"depth": 7, "pool": "mean"}))
    assert "pooling was token and is mean" in "\n".join(again.beginning)
    unread = Run(make(init="elsewhere", model={"depth": 7, "pool": "token"}))
    assert "init 'elsewhere' is not read" in "\n".join(unread.beginning)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"isolated_gradients": True}}, "model.isolated_gradients is for task pretrain"),
        ({"task": "linear_probe", "optimizer": {"layer_decay": 1}}, "model.drop_path is for task finetune"),
        ({"task": "pretrain", "optimizer": {"layer_decay": 1}}, "classification is for the tasks finetune"),
        ({"task": "linear_probe"}, "optimizer.layer_decay is for task finetune"),
        ({"model": {"name": "localmim_vit_tiny_patch16_224"}}, "model.num_classes is set"),
        ({"model": {"num_classes": 5}}, "model.num_classes is 5, but .* has 10 classes"),
        ({"model": {"pool": "token", "name": "swin_tiny_patch4_window7_224"}}, "is set, but swin_tiny"),
        ({"batch_size": 7}, "batch_size is 7: mixup and cutmix mix pairs"),
        ({"init": "nowhere"}, "nowhere does not exist"),
        (
            {"task": "linear_probe", "model": {"drop_path": None}, "optimizer": {"layer_decay": 1}},
            "init is empty",
        ),
        ({"optimizer": {"layer_decay": 0}}, "optimizer.layer_decay is 0"),
        ({"optimizer": {"ema_decay": 1}}, "optimizer.ema_decay is 1"),
    ],
)
def test_what_does_not_fit_is_one_line(make, changes, said):
    """Each names the key."""
    with pytest.raises(UserError, match=said):
        Run(make(**changes))


def test_images_without_classes(make, images, tmp_path):
    """A flat folder has no labels; classes to evaluate on must be known."""
    flat = images / "train" / "ball"
    with pytest.raises(UserError, match=r"data.dir: .* images without a class"):
        Run(make(data={"dir": str(flat)}))
    for name in ("ball", "zebra"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.jpg").write_bytes(next(flat.glob("*.jpg")).read_bytes())
    with pytest.raises(UserError, match="the class 'zebra', which the classifier was not trained on"):
        Run(make(data={"val_dir": str(tmp_path / "val")}))


def test_another_encoder_is_refused(make):
    """Sizes that differ are named, nothing is half loaded."""
    path, _ = pretrained(make, "pre", "mae_vit_tiny_patch16_224", VIT)
    with pytest.raises(UserError, match=r"do not fit the model.*misshaped: encoder\."):
        Run(make(init=path, model={"embed_dim": 32}))
    with pytest.raises(UserError, match=r"do not fit the model.*missing: .*encoder\.blocks\.2"):
        Run(make(init=path, model={"depth": 3}))


def test_every_recipe_can_be_read_and_built(make):
    """Keys, ranges and names of the published recipes are right; each says where its encoder comes from."""
    root = Path(__file__).parents[2]
    recipes = sorted((root / "config").glob("finetune/*.yaml")) + sorted((root / "config").glob("linear_probe/*.yaml"))
    assert len(recipes) >= 7
    for path in recipes:
        config = load_config(["--config", str(path)])
        assert yaml.safe_load(path.read_text())
        assert config.task == path.parent.name, path
        assert config.data.val_dir and config.init, path

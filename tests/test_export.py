"""Exports of tiny models: each file is loaded by a fresh process, as the command does it, and used by predict."""

from __future__ import annotations

import json
import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.train import serialization
from safetensors.numpy import save_file

from localmim import cli
from localmim import export as module
from localmim.config import Config, DataConfig, ModelConfig, config_from_dict
from localmim.data.builtin import write_builtin_images
from localmim.data.pipeline import eval_batches
from localmim.data.sources import open_source
from localmim.errors import RunError, UserError
from localmim.export import Output, export, largest_difference
from localmim.models.layers import Gelu
from localmim.predict import main as predict_main
from localmim.predict import open_network, predict, read_description, softmax, top_classes
from localmim.training.build import build_model
from localmim.training.checkpoint import weights_header
from localmim.training.restore import restore

CLASSES = ["gear", "mug", "snake"]
VIT = ModelConfig(
    "vit_tiny_patch16_224", [32, 24], patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=len(CLASSES)
)
SWIN = ModelConfig(  # windows of 3 do not divide a grid of 8, so tokens are filled up
    "swin_tiny_patch4_window7_224", 32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=3, num_classes=3
)
PRETRAINED = ModelConfig(
    "localmim_vit_tiny_patch16_224",
    16,
    patch_size=4,
    in_chans=1,
    embed_dim=16,
    depth=7,
    num_heads=2,
    taps=[0],
    scales=[1],
    decoder_dim=16,
    decoder_heads=2,
)


def weights_file(path, model: ModelConfig, task: str = "finetune") -> str:
    """A checkpoint of a model with fresh weights, biases and norms included."""
    config = Config(task=task, model=model, device="CPU")
    ms.set_seed(1)
    rng = np.random.default_rng(1)
    weights = {
        name: p.asnumpy() + rng.normal(0, 0.05, p.shape).astype(np.float32)
        for name, p in build_model(config).parameters_dict().items()
    }
    save_file(weights, path, weights_header(3, config.as_dict(), CLASSES if model.num_classes else None))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose name MindSpore's writers would refuse."""
    folder = tmp_path_factory.mktemp("exports") / "a folder, ünlike others"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two built-in images of each kind, as files."""
    return write_builtin_images(tmp_path_factory.mktemp("images") / "set", size=40, train_per_class=1, val_per_class=2)


@pytest.fixture(scope="module")
def vit(folder):
    return weights_file(folder / "vit.safetensors", VIT)


@pytest.fixture(scope="module")
def vit_mindir(folder, vit, images):
    """A ViT with a fixed batch size of 3, checked on files."""
    out = folder / "vit.mindir"
    return export(vit, "MINDIR", batch_size="3", out=str(out), data_dir=str(images / "val"), device="CPU")


@pytest.fixture(scope="module")
def vit_features(folder, vit):
    """A ViT's pooled features in ONNX, any batch size."""
    out = folder / "features.onnx"
    return export(vit, "ONNX", encoder_only=True, batch_size="dynamic", out=str(out), device="CPU")


def outputs_of(ckpt: str, batch: np.ndarray) -> np.ndarray:
    """Logits of the checkpoint's own cell."""
    return restore(ckpt)[1].set_train(False)(Tensor(batch)).asnumpy()


def test_mindir_equals_the_checkpoint(vit, vit_mindir, images):
    """What serving needs: the file alone gives the cell's logits, and its description says how to feed it."""
    about = read_description(vit_mindir)
    assert about["output"] == "logits" and about["classes"] == CLASSES and about["batch_size"] == 3
    assert about["image_size"] == [32, 24] and about["in_chans"] == 3 and about["step"] == 3
    assert about["largest_difference"]["images"] == str(images / "val")
    assert about["largest_difference"]["relative"] < 1e-6
    batch = np.random.default_rng(0).normal(size=(3, 3, 32, 24)).astype(np.float32)
    np.testing.assert_allclose(open_network(vit_mindir, "CPU")(batch)[0], outputs_of(vit, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("file_format", ["MINDIR", "ONNX"])
def test_dynamic_batch_of_a_swin(folder, file_format):
    """One file for any number of images, also where windows are filled up: checked at sizes export did not try."""
    ckpt = weights_file(folder / "swin.safetensors", SWIN)
    out = folder / f"swin{module.SUFFIXES[file_format]}"
    path = export(ckpt, file_format, batch_size="dynamic", out=str(out), device="CPU")
    network = open_network(path, "CPU")
    batch = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    logits = outputs_of(ckpt, batch)
    for n in (2, 5):
        np.testing.assert_allclose(network(batch[:n])[0], logits[:n], rtol=0, atol=2e-6)


def test_pretraining_checkpoint(folder):
    """Predictions from grey images and a mask's arrays; with encoder only its encoder's features."""
    ckpt = weights_file(folder / "mim.safetensors", PRETRAINED, "pretrain")
    about = read_description(export(ckpt, "ONNX", batch_size="2", out=str(folder / "mim.onnx"), device="CPU"))
    assert [(v["name"], v["shape"]) for v in about["inputs"]] == [
        ("images", [2, 1, 16, 16]), ("mask_0", [2, 4]), ("mask_1", [2, 12]), ("mask_2", [2, 16]),
    ]  # fmt: skip
    assert about["outputs"] == [{"name": "predictions", "dtype": "float32", "shape": [2, 12, 9]}]
    with pytest.raises(UserError, match="--encoder-only"):
        predict(str(folder / "mim.onnx"), ["x.jpg"])
    model = restore(ckpt)[1]
    network, output = module._network(model, encoder_only=True)
    assert network.model is model.encoder and output == "features"


METHODS = {  # model, what else the recipe needs, arrays of a mask and their rows an image
    "mae_vit_tiny_patch16_224": ({"patch_size": 16}, {}, 3, 1),
    "lomar_vit_tiny_patch16_224": ({"patch_size": 16}, {"mask": {"window": 3, "views": 2}}, 4, 1),
    "beit_vit_tiny_patch16_224": (
        {"patch_size": 16}, {"target": {"kind": "codebook", "codebook": ["a.npz"], "vocab": 9}}, 2, 1,
    ),
    "simmim_vit_tiny_patch16_224": ({"patch_size": 16}, {}, 2, 1),
    "convmae_convvit_base_patch16_224": ({"embed_dims": [4, 8, 8], "depths": [1, 1, 1]}, {}, 3, 1),
    "fastconvmae_convvit_base_patch16_224": ({"embed_dims": [4, 8, 8], "depths": [1, 1, 1]}, {}, 3, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_given_its_masks(name):
    """Predictions take images and the arrays of a mask alone, whatever these are; targets that are data stay out."""
    sizes, more, arrays, rows = METHODS[name]
    own = {} if "convvit" in name else {"embed_dim": 8, "depth": 1}
    values = {"model": {"name": name, "image_size": 64, "num_heads": 2, **own, **sizes}, **more}
    config = config_from_dict(values)
    model = build_model(config)
    given, _ = module._given(config, model, [2], "", "predictions")
    assert given[0][0].shape == (2, 3, 64, 64) and len(given[0]) == 1 + arrays
    assert max(len(a) for a in given[0][1:]) == 2 * rows * (2 if name.startswith("lomar") else 1)


def test_weights_beside_the_graph(folder, vit, vit_mindir, monkeypatch):
    """Above 1 GiB MindSpore writes a folder of weights: it moves along, and its loss is noticed."""
    monkeypatch.setattr(serialization, "TOTAL_SAVE", 1)  # KiB
    path = export(vit, "MINDIR", batch_size="3", out=str(folder / "large.mindir"), device="CPU")
    about = read_description(path)
    assert set(about["files"]) == {"large.mindir", "large_variables/data_0"}
    batch = np.random.default_rng(0).normal(size=(3, 3, 32, 24)).astype(np.float32)
    for got, expected in zip(open_network(path, "CPU")(batch), open_network(vit_mindir, "CPU")(batch)):
        np.testing.assert_array_equal(got, expected)
    (folder / "large_variables" / "data_0").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="large_variables/data_0 does not exist"):
        read_description(path)


def test_a_file_that_differs_is_not_kept(folder, vit, monkeypatch, capsys):
    """The check must be able to fail: a weight that changes between reference and writing is found; exit code 1."""
    write = module._write

    def write_another(network, *rest):
        head = network.model.head.weight
        head.set_data(head * 1.001)
        write(network, *rest)

    monkeypatch.setattr(module, "_write", write_another)
    out = folder / "differs.mindir"
    assert cli.run(lambda argv: export(vit, out=str(out), device="CPU"), []) == 1
    assert "computes something else than the checkpoint" in capsys.readouterr().err
    assert not [path for path in folder.iterdir() if path.name.startswith(("differs", ".exporting"))]


def test_a_file_that_cannot_be_run_is_not_kept(folder, vit, monkeypatch):
    """A damaged file ends in one line that says why."""

    def write_rubbish(network, arrays, file_format, size, folder, stem, about):
        (folder / f"{stem}.onnx").write_bytes(b"rubbish")

    monkeypatch.setattr(module, "_write", write_rubbish)
    with pytest.raises(RunError, match=r"rubbish.onnx cannot be run by a fresh process.*[Pp]rotobuf"):
        export(vit, "ONNX", out=str(folder / "rubbish.onnx"), device="CPU")
    assert not (folder / "rubbish.onnx").exists()


def test_largest_difference_cannot_be_fooled():
    """NaN and another shape are no match; the relative figure is of the output that it belongs to."""
    a, b = np.ones((2, 3), np.float32), np.full((2, 3), 100, np.float32)
    assert largest_difference([[a, b]], [[a, b]]) == (0, 0)
    assert largest_difference([[a, b]], [[a + 1, b]]) == (1, 1)
    for found in (np.full_like(a, np.nan), a[:1]):
        assert math.isnan(largest_difference([[a]], [[found]]).relative)
        with pytest.raises(RunError):
            module._check(largest_difference([[a]], [[found]]), module.Path("x.onnx"), "images")


class _Through(nn.Cell):
    """One step, as the output of a network."""

    def __init__(self, step):
        super().__init__()
        self.step, self.output = step, Output()

    def construct(self, x: Tensor) -> Tensor:
        return self.output(self.step(x))


class _First(nn.Cell):
    """A slice that loses an axis."""

    def construct(self, x: Tensor) -> Tensor:
        return x[:, 0]


def written_as_onnx(step: nn.Cell, x: np.ndarray, folder):
    """What onnxruntime makes of x after `step` was written."""
    about = {"inputs": [{"name": "x"}], "outputs": [{"name": "y"}]}
    module._write(_Through(step), [x], "ONNX", 1, folder, "network", about)
    return open_network(folder / "network.onnx")(x)[0]


def test_sliced_output_in_onnx(tmp_path):
    """A class token as the output: the writer loses the name of a slice that no operation follows."""
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(written_as_onnx(_First(), x, tmp_path), x[:, 0])


def test_gelu_is_exact_in_onnx(tmp_path):
    """Against erf: the tanh form is off by 5e-4, so 1e-6 tells them apart."""
    x = np.linspace(-12, 12, 100_001, dtype=np.float32)[None]
    erf = np.array([math.erf(v / math.sqrt(2)) for v in x[0].astype(np.float64)])
    error = np.abs(written_as_onnx(Gelu(), x, tmp_path)[0] - x[0] * (1 + erf) / 2)
    assert error.max() < 1e-6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"file_format": "AIR"}, "AIR needs an Ascend device"),
        ({"file_format": "PB"}, "expected MINDIR, ONNX or AIR"),
        ({"batch_size": "0"}, "--batch-size is 0"),
        ({"out": "x.onnx"}, "ends in .mindir"),
        ({"out": "{folder}/vit.mindir"}, "is there already"),
        ({"data_dir": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_wrong_arguments(folder, vit, vit_mindir, given, said):
    """Each is one line before anything is written."""
    given = {k: v.format(folder=folder) for k, v in given.items()}
    with pytest.raises(UserError, match=said):
        export(vit, **{"device": "CPU", "out": str(folder / "other.mindir"), **given})
    assert not (folder / "other.mindir").exists()


def test_predict_prints_what_evaluation_computes(vit, vit_mindir, images, tmp_path, capsys):
    """Probabilities equal those of evaluation's batches; 20 images through a batch of 3, the last one filled up."""
    out = tmp_path / "p.npz"
    predict_main(["--model", str(vit_mindir), str(images / "val"), "--top", "2", "--out", str(out), "--device", "CPU"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    source = open_source(str(images / "val"))
    batch = next(eval_batches(source, DataConfig(), (32, 24), 3, 20)).images
    expected = softmax(outputs_of(vit, batch))
    with np.load(out) as file:
        np.testing.assert_allclose(file["probabilities"], expected, rtol=0, atol=1e-6)
        assert file["names"].tolist() == [str(images / "val" / source.name(i)) for i in range(20)]
    best = np.argsort(-expected[0])
    assert lines[0].endswith(
        f"0000.jpg: {CLASSES[best[0]]} {100 * expected[0, best[0]]:.1f} %, "
        f"{CLASSES[best[1]]} {100 * expected[0, best[1]]:.1f} %"
    )


def test_predict_writes_features_and_names_the_unreadable(vit_features, images, tmp_path, capsys, caplog):
    """A bad file among good ones is named and left out; files keep the order in which they were given."""
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"not an image")
    good = [str(images / "val" / kind / "0001.jpg") for kind in ("mug", "ball")]
    out = tmp_path / "f.npz"
    names, features = predict(str(vit_features), [good[0], str(bad), good[1]], out=str(out), batch_size=4)
    assert names == good and features.shape == (2, 32) and features.dtype == np.float32
    assert "bad.jpg" in caplog.text
    with np.load(out) as file:
        np.testing.assert_array_equal(file["features"], features)
    other, _ = predict(str(vit_features), good[::-1], out=str(out))
    assert other == good[::-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.jpg", "--out", "f.npz"], "none of 1 images can be read"),
        (["missing.jpg"], "say where they go"),
        (["missing.jpg", "--out", "f.txt"], "ends in .npz"),
        (["missing.jpg", "--out", "f.npz", "--batch-size", "0"], "expected at least 1"),
    ],
)
def test_predict_with_wrong_arguments(vit_features, arguments, said, capsys):
    """Exit code 2 and one line."""
    assert cli.run(predict_main, ["--model", str(vit_features), *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and said in error[0]


def test_predict_refuses_a_file_that_is_not_the_one_described(vit_features, tmp_path):
    """A model of another export beside this description would give wrong classes without a word."""
    model = tmp_path / "features.onnx"
    model.write_bytes(vit_features.read_bytes() + b" ")
    with pytest.raises(UserError, match="does not exist"):
        read_description(model)
    description = json.loads((vit_features.parent / "features.onnx.json").read_text())
    (tmp_path / "features.onnx.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="SHA-256 differs"):
        read_description(model)


def test_a_class_without_a_name():
    """A classifier may have more outputs than the images had classes; without names there are numbers."""
    probabilities = np.asarray([0.1, 0.2, 0.7])
    assert top_classes(probabilities, ["ant", "bee"], 5) == "class 2 70.0 %, bee 20.0 %, ant 10.0 %"
    assert top_classes(probabilities, None, 1) == "class 2 70.0 %"

"""Exports a checkpoint to MINDIR, ONNX or AIR, and checks the file: a fresh process loads it and must compute the same.

What is compared are the outputs of the cell and of the file on real images; a file that differs is not kept. Images
enter normalised, float32 [N, C, H, W]; FILE.json beside the file says how. What goes in and comes out:

* classifier: images -> logits [N, classes];
* any checkpoint, encoder only: images -> pooled features [N, D];
* pre-training checkpoint: images and a mask's arrays -> predictions as rows, one a scale, for a fixed batch size.

`python -m localmim.export FILE INPUTS.npz OUTPUTS.npz DEVICE` is what the fresh process runs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

import localmim
from localmim import cli
from localmim.config import Config
from localmim.data.builtin import CLASSES, draw_image
from localmim.data.pipeline import eval_batches, resolve_mean_std
from localmim.data.sources import ArraySource, Source, open_source
from localmim.device import available_devices, set_device
from localmim.errors import RunError, UserError
from localmim.files import file_sha256
from localmim.mim.model import MaskedImageModel
from localmim.models.classifier import Classifier
from localmim.models.layers import Attention, parameter
from localmim.models.operators import Gelu, Operator
from localmim.predict import DESCRIPTION, description_path, open_network
from localmim.training.build import build_masking
from localmim.training.checkpoint import read_checkpoint
from localmim.training.restore import model_of

SUFFIXES = {"MINDIR": ".mindir", "ONNX": ".onnx", "AIR": ".air"}
TOLERANCE = 1e-4  # largest difference that passes, share of the largest value
OPEN_SIZES = (1, 4)  # batch sizes at which a file that leaves the size open is checked

Arrays = list[np.ndarray]


class Output(nn.Cell):
    """x -> x, as a product with a stored 1, which no compiler takes out.

    MindSpore's ONNX writer loses the name of an output that is a reshaped or sliced value; this one keeps it.
    """

    def __init__(self):
        super().__init__()
        self.one = parameter("ones", (1,))

    def construct(self, x: Tensor) -> Tensor:
        return x * self.one


class Logits(nn.Cell):
    """Images [N, C, H, W] -> logits [N, classes]."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model, self.output = model, Output()

    def construct(self, images: Tensor) -> Tensor:
        return self.output(self.model(images))


class Features(nn.Cell):
    """Images [N, C, H, W] -> pooled features [N, D], of a classifier or an encoder."""

    def __init__(self, model: nn.Cell):
        super().__init__()
        self.model, self.output = model, Output()

    def construct(self, images: Tensor) -> Tensor:
        return self.output(self.model.features(images))


class Predictions(nn.Cell):
    """Images [N, C, H, W] and a mask's arrays -> predictions of hidden cells as rows (mim/cells.py), one a scale."""

    def __init__(self, model: MaskedImageModel):
        super().__init__()
        self.model, self.output = model, Output()

    def construct(self, images: Tensor, *mask: Tensor) -> tuple[Tensor, ...]:
        outputs = ()
        for prediction in self.model.predict(images, *mask):
            outputs += (self.output(prediction),)
        return outputs


class Difference(NamedTuple):
    """Largest difference between two sets of outputs, and the largest one as a share of its output's largest value."""

    absolute: float
    relative: float


def export(
    ckpt: str,
    file_format: str = "MINDIR",
    encoder_only: bool = False,
    batch_size: str = "1",
    out: str = "",
    data_dir: str = "",
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint as a file for serving, with FILE.json beside it, and checks it on real images.

    Args:
        ckpt: A run's folder, one of its checkpoints, or a weights file.
        file_format: MINDIR, ONNX or AIR.
        encoder_only: Pooled features instead of logits or predictions.
        batch_size: Images a call, a number, or "dynamic": any number.
        out: The file; empty: <model name>.mindir (.onnx, .air) in the current folder.
        data_dir: Images to compare on; empty: those of the checkpoint's recipe if they are there, else the built-in.
        device: auto, CPU, GPU or Ascend.
        overwrite: Replace a file that is there.

    Returns:
        The file's path.

    Raises:
        UserError: Something given does not fit.
        RunError: The file could not be loaded, or computes something else; it is not kept.
    """
    file_format = file_format.upper()
    if file_format not in SUFFIXES:
        raise UserError(f"--file-format is {file_format}, expected MINDIR, ONNX or AIR")
    if file_format == "AIR" and "Ascend" not in available_devices():
        raise UserError(
            "--file-format AIR needs an Ascend device and a MindSpore that finds it; here it finds "
            f"{', '.join(available_devices())}: export there, or export MINDIR, which Ascend reads as well"
        )
    size = _batch_size(batch_size)
    device = set_device(device)
    checkpoint = read_checkpoint(ckpt)
    config, model = model_of(checkpoint)
    path = _out_path(out or config.model.name + SUFFIXES[file_format], SUFFIXES[file_format], overwrite)
    network, output = _network(model, encoder_only)
    if output == "predictions" and size is None:
        raise UserError("--batch-size dynamic: masks have a fixed batch size; give a number, or --encoder-only")
    if file_format == "AIR" and size is None:
        raise UserError("--batch-size dynamic: an AIR file has a fixed batch size; give a number")

    given, shown = _given(config, model, [size] if size else list(OPEN_SIZES), data_dir, output)
    expected = [_as_list(network(*map(Tensor, arrays))) for arrays in given]
    about = _describe(config, model, checkpoint, output, size, given[0], expected[0])
    about = {"format": DESCRIPTION, "file": path.name, "file_format": file_format, **about}
    with _aside(path.parent) as folder:
        _write(network, given[0], file_format, size, folder, path.stem, about)
        if file_format != "AIR":
            found = _run_afresh(folder / path.name, given, device)
            difference = largest_difference(expected, found)
            _check(difference, path, shown)
            about["largest_difference"] = {**difference._asdict(), "images": shown}
        about["files"] = {
            str(file.relative_to(folder)): file_sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()
        }
        _put_in_place(folder, path, about)
    _tell(path, about)
    return path


def _batch_size(text: str) -> int | None:
    """The number, or None for "dynamic"."""
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch-size is {text}, expected a number of at least 1, or dynamic")
    return int(text)


def _out_path(out: str, suffix: str, overwrite: bool) -> Path:
    path = Path(out)
    if path.suffix != suffix or not re.fullmatch(r"[0-9a-zA-Z@_.-]+", path.name):
        raise UserError(f"--out {out}: expected a name of letters, digits and @_.- that ends in {suffix}")
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already: give another --out, or --overwrite true")
    return path


def _network(model: nn.Cell, encoder_only: bool) -> tuple[nn.Cell, str]:
    """What is exported, and the name of what it gives: logits, features or predictions."""
    pretrained = isinstance(model, MaskedImageModel)
    if encoder_only or not (pretrained or model.num_classes):
        network, output = Features(model.encoder if pretrained else model), "features"
    else:
        network, output = (Predictions(model), "predictions") if pretrained else (Logits(model), "logits")
    return network.set_train(False), output


def _given(config: Config, model: nn.Cell, sizes: list[int], data_dir: str, output: str) -> tuple[list[Arrays], str]:
    """Inputs to compare on, one list of arrays a batch size, and where the images are from."""
    images, shown = _real_images(config, model.encoder, max(sizes), data_dir)
    given = [[images[:size]] for size in sizes]
    if output == "predictions":
        masking = build_masking(config, model)
        for arrays, size in zip(given, sizes):
            arrays += masking(0, np.arange(size)).arrays()
    return given, shown


def _real_images(config: Config, encoder: nn.Cell, count: int, data_dir: str) -> tuple[np.ndarray, str]:
    """Normalised images [count, C, H, W], spread over what there is, and where they are from, in words."""
    where, format = data_dir, "auto"
    if not data_dir:
        format = config.data.format
        there = [path for path in (config.data.val_dir, config.data.dir) if path and Path(path).exists()]
        where = there[0] if there else ""
    if where:
        source: Source = open_source(where, format, encoder.in_chans)
    else:
        source = ArraySource([_builtin_image(i, encoder) for i in range(count)])
    samples = np.unique(np.linspace(0, len(source) - 1, count).astype(int))
    batches = eval_batches(source, config.data, encoder.image_size, encoder.in_chans, len(samples), samples)
    found = [batch.images for batch in batches]
    if not found:
        raise UserError(f"{where}: none of {len(samples)} images can be read: nothing to compare on")
    images = np.concatenate(found)
    return np.take(images, np.arange(count) % len(images), axis=0), where or "the built-in images"


def _builtin_image(index: int, encoder: nn.Cell) -> np.ndarray:
    """A drawn image (H, W, C); colours are repeated where there are more channels."""
    image = draw_image(list(CLASSES)[index % len(CLASSES)], index, split="val", size=max(encoder.image_size))
    return np.take(image, np.arange(encoder.in_chans) % 3, axis=2)


def _describe(config, model, checkpoint, output, size, arrays: Arrays, outputs: Arrays) -> dict:
    """The contents of FILE.json, but for what is known only when the file is there."""
    encoder = model.encoder
    mean, std = resolve_mean_std(config.data, encoder.in_chans)
    return {
        "model": config.model.name,
        "task": config.task,
        "step": checkpoint.step,
        "output": output,
        "image_size": list(encoder.image_size),
        "in_chans": encoder.in_chans,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "batch_size": size,
        "classes": checkpoint.classes if output == "logits" else [],
        "inputs": _values(["images", *(f"mask_{i}" for i in range(len(arrays) - 1))], arrays, size),
        "outputs": _values(
            [output] if len(outputs) == 1 else [f"{output}_{i}" for i in range(len(outputs))], outputs, size
        ),
        "localmim": localmim.__version__,
        "mindspore": ms.__version__,
    }


def _values(names: list[str], arrays: Arrays, size: int | None) -> list[dict]:
    """Name, type and shape of each array, with null for a batch size that is left open."""
    return [
        {
            "name": name,
            "dtype": array.dtype.name,
            "shape": [size, *array.shape[1:]] if size is None else list(array.shape),
        }
        for name, array in zip(names, arrays)
    ]


def _as_list(outputs) -> Arrays:
    return [output.asnumpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


@contextlib.contextmanager
def _aside(parent: Path):
    """A hidden folder beside the file to write, gone at the end."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".exporting_", dir=parent) as folder:
            yield Path(folder).resolve()
    except OSError as error:
        raise UserError(f"cannot write to {parent}: {error.strerror or error}") from error


def _write(network: nn.Cell, arrays: Arrays, file_format: str, size: int | None, folder: Path, stem: str, about: dict):
    """Lets MindSpore write into an empty folder; it may add a folder of weights that do not fit into one file."""
    tensors = [Tensor(array) for array in arrays]
    if size is None:
        tensors = [Tensor(shape=[None, *array.shape[1:]], dtype=ms.float32) for array in arrays]
    for _, cell in network.cells_and_names():
        if isinstance(cell, Operator):  # the operators that any machine knows, but GELU without Erf, which ONNX lacks
            cell.fused = not isinstance(cell, Gelu)
    name = stem + SUFFIXES[file_format]
    with contextlib.chdir(folder):  # MindSpore refuses paths with spaces, and leaves a rank_0 folder when it fails
        if file_format == "ONNX":
            _write_onnx(network, tensors, name, size, about)
        else:
            ms.export(network, *tensors, file_name=name, file_format=file_format)
    with contextlib.suppress(FileNotFoundError):  # above 1 GiB
        os.rename(folder / f"{stem}_graph.mindir", folder / name)
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)  # MindSpore's are for their owner alone


def _write_onnx(network: nn.Cell, tensors: list[Tensor], name: str, size: int | None, about: dict) -> None:
    from mindspore import onnx

    for _, cell in network.cells_and_names():
        if isinstance(cell, Attention):
            cell.widen_bias = False  # ONNX broadcasts by itself, and the writer needs to know every shape
    names = [[value["name"] for value in about[key]] for key in ("inputs", "outputs")]
    axes = {names[0][0]: {0: "N"}} if size is None else None
    onnx.export(network, *tensors, file_name=name, input_names=names[0], output_names=names[1], dynamic_axes=axes)


def _run_afresh(file: Path, given: list[Arrays], device: str) -> list[Arrays]:
    """The outputs of an exported file for each list of inputs, computed in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = (os.path.join(folder, name) for name in ("inputs.npz", "outputs.npz"))
        _save_lists(inputs, given)
        command = [sys.executable, "-m", "localmim.export", str(file), inputs, outputs, device]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            errors = [line for line in lines if "rror" in line] or lines
            raise RunError(f"{file.name} cannot be run by a fresh process, so it is not kept: {errors[0].strip()}")
        return _load_lists(outputs)


def _save_lists(path: str, lists: list[Arrays]) -> None:
    np.savez(path, **{f"{i}_{k}": array for i, arrays in enumerate(lists) for k, array in enumerate(arrays)})


def _load_lists(path: str) -> list[Arrays]:
    lists: list[Arrays] = []
    with np.load(path) as file:
        for name in file.files:  # in the order in which they were saved
            if name.endswith("_0"):
                lists.append([])
            lists[-1].append(file[name])
    return lists


def largest_difference(expected: list[Arrays], found: list[Arrays]) -> Difference:
    """Over all outputs; NaN when a value is not finite, or a shape differs."""
    absolute, relative = [0.0], [0.0]
    pairs = zip(itertools.chain(*expected), itertools.chain(*found), strict=True)
    for wanted, got in pairs:
        if wanted.shape != got.shape or not np.isfinite(wanted).all():
            return Difference(float("nan"), float("nan"))
        difference = float(np.abs(got.astype(np.float64) - wanted).max())
        absolute.append(difference)
        relative.append(difference / max(float(np.abs(wanted).max()), np.finfo(np.float32).tiny))
    return Difference(float(np.max(absolute)), float(np.max(relative)))


def _check(difference: Difference, path: Path, shown: str) -> None:
    if not difference.relative <= TOLERANCE:  # NaN is no match
        raise RunError(
            f"{path.name} computes something else than the checkpoint, so it is not kept: on {shown} the largest "
            f"difference is {difference.absolute:.3g}, {difference.relative:.3g} of the largest value "
            f"(at most {TOLERANCE:g} passes)"
        )


def _put_in_place(folder: Path, path: Path, about: dict) -> None:
    """Moves what was written to where it belongs: parts first, then the file, then its description."""
    description = folder / description_path(path).name
    description.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    last = [path.name, description.name]
    for name in [*(part.name for part in folder.iterdir() if part.name not in last), *last]:
        if (path.parent / name).is_dir():
            shutil.rmtree(path.parent / name)
        os.replace(folder / name, path.parent / name)


def _tell(path: Path, about: dict) -> None:
    size = sum((path.parent / name).stat().st_size for name in about["files"])
    inputs, outputs = (", ".join(map(_shown, about[key])) for key in ("inputs", "outputs"))
    print(f"exported: {path} ({size / 1e6:.1f} MB): {inputs} -> {outputs}")
    if "largest_difference" not in about:
        print("not compared: MindSpore cannot load AIR back")
        return
    found = about["largest_difference"]
    print(
        f"loaded back in a fresh process: the largest difference is {found['absolute']:.3g}, "
        f"{found['relative']:.3g} of the largest value, on {found['images']}"
    )


def _shown(value: dict) -> str:
    """An input or output for people: "images [N, 3, 224, 224]"."""
    return f"{value['name']} [{', '.join('N' if n is None else str(n) for n in value['shape'])}]"


def _replay(argv: list[str]) -> None:
    """FILE INPUTS.npz OUTPUTS.npz DEVICE: what a file makes of arrays."""
    file, inputs, outputs, device = argv
    network = open_network(Path(file), device)
    _save_lists(outputs, [network(*arrays) for arrays in _load_lists(inputs)])


if __name__ == "__main__":
    sys.exit(cli.run(_replay))

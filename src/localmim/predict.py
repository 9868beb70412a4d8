"""Uses an exported model: `python -m localmim.predict --model FILE.mindir|FILE.onnx IMAGE… [--top 5] [--out FILE.npz]`.

Beside every exported file lies FILE.json, which says how its images are made and what comes out. Images are decoded and
prepared by the code that evaluates, so a prediction here is the one that evaluation counts. A classifier's top classes
are printed, one line an image; features are written to `--out`. Folders stand for the images in them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
from jsonargparse import ArgumentParser
from mindspore import Tensor, nn

from localmim import cli
from localmim.config import DataConfig
from localmim.data.pipeline import eval_batches
from localmim.data.sources import IMAGE_SUFFIXES, FileSource, open_source
from localmim.device import set_device
from localmim.errors import UserError
from localmim.files import file_sha256

DESCRIPTION = "localmim-export-1"  # `format` of FILE.json
Network = Callable[..., list[np.ndarray]]  # arrays, one an input -> arrays, one an output


def description_path(model: Path) -> Path:
    """FILE.json of FILE.mindir is FILE.mindir.json."""
    return model.with_name(model.name + ".json")


def read_description(model: Path) -> dict:
    """What FILE.json says about an exported file, which must be there and be the one that it describes.

    Raises:
        UserError: One of the two is missing, or they do not belong together.
    """
    path = description_path(model)
    for file, made in ((model, "a file that export.py made"), (path, "what export.py writes beside it")):
        if not file.is_file():
            raise UserError(f"{file} does not exist: expected {made}")
    try:
        about = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if about.get("format") != DESCRIPTION:
        raise UserError(f"{path}: format {about.get('format')!r}, expected {DESCRIPTION!r}")
    for name, digest in about["files"].items():
        part = model if name == about["file"] else model.parent / name  # model and description may have been renamed
        if not part.is_file():
            raise UserError(f"{part} does not exist: it is a part of {model}")
        if file_sha256(part) != digest:
            raise UserError(f"{part} is not the file that {path} describes: its SHA-256 differs")
    return about


def open_network(model: Path, device: str = "auto") -> Network:
    """An exported file as a function of arrays. ONNX runs in onnxruntime on the CPU, whatever the device.

    Raises:
        UserError: Neither a .mindir nor an .onnx file.
    """
    if model.suffix == ".onnx":
        return _open_onnx(model)
    if model.suffix == ".mindir":
        return _open_mindir(model, device)
    raise UserError(f"{model}: expected a .mindir or an .onnx file")


def _open_onnx(model: Path) -> Network:
    import onnxruntime  # here: MINDIR does without it

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        return session.run(None, dict(zip(names, arrays, strict=True)))

    return run


def _open_mindir(model: Path, device: str) -> Network:
    set_device(device)
    network = nn.GraphCell(ms.load(str(model)))

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        outputs = network(*[Tensor(array) for array in arrays])
        return [output.asnumpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return run


def image_source(images: list[str], in_chans: int) -> FileSource:
    """The files named, and those in the folders named, in order.

    Raises:
        UserError: A folder without images.
    """
    names = []
    for image in images:
        if Path(image).is_dir():
            names += [str(Path(image) / name) for name in open_source(image, "folder", in_chans).names]
        else:
            names.append(image)
    return FileSource(Path(), names, None, [], in_chans)


def softmax(logits: np.ndarray) -> np.ndarray:
    """[N, classes] -> probabilities, float64."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def top_classes(probabilities: np.ndarray, classes: list[str] | None, top: int) -> str:
    """The `top` most probable of [classes], for people: "gear 71.2 %, mug 20.0 %"."""
    order = np.argsort(-probabilities, kind="stable")[:top]
    names = [classes[k] if k < len(classes or ()) else f"class {k}" for k in order]
    return ", ".join(f"{name} {100 * probabilities[k]:.1f} %" for name, k in zip(names, order))


def predict(
    model: str, images: list[str], top: int = 5, out: str = "", batch_size: int = 16, device: str = "auto"
) -> tuple[list[str], np.ndarray]:
    """Prints the top classes of each image, or writes features.

    Args:
        model: FILE.mindir or FILE.onnx; FILE.json lies beside it.
        images: Image files, and folders of them.
        top: Classes that are printed.
        out: An .npz file for `names` [N] and `probabilities` [N, classes] or `features` [N, D]; empty: none.
        batch_size: Images at a time, for a file that leaves it open.
        device: For MINDIR: auto, CPU, GPU or Ascend.

    Returns:
        Names of the images that could be read, and their probabilities float64 [N, classes] or features float32 [N, D].

    Raises:
        UserError: No image can be read, or the file is of another kind. An unreadable image among others is only named.
    """
    path = Path(model)
    about = read_description(path)
    output = about["output"]
    if output not in ("logits", "features"):
        raise UserError(f"{model} gives {output}: export the checkpoint with --encoder-only for features")
    if output == "features" and not out:
        raise UserError(f"{model} gives features: say where they go, for example --out features.npz")
    if out and Path(out).suffix != ".npz":
        raise UserError(f"--out {out}: expected a name that ends in .npz")
    if min(top, batch_size) < 1:
        raise UserError(f"--top is {top} and --batch-size is {batch_size}, expected at least 1")
    height, width = about["image_size"]
    source = image_source(images, about["in_chans"])
    prepared = DataConfig(mean=about["mean"], std=about["std"], max_bad_share=1.0)
    size = about["batch_size"] or batch_size
    network = open_network(path, device)

    names, rows = [], []
    for batch in eval_batches(source, prepared, (height, width), about["in_chans"], size):
        n = len(batch.ids)
        filled = np.zeros((size, *batch.images.shape[1:]), np.float32)  # a last, shorter batch is filled up
        filled[:n] = batch.images
        values = network(filled)[0][:n]
        if output == "logits":
            values = softmax(values)
            for sample, row in zip(batch.ids, values):
                print(f"{source.name(sample)}: {top_classes(row, about['classes'], top)}")
        names += [source.name(sample) for sample in batch.ids]
        rows.append(values)
    if not rows:
        raise UserError(f"none of {len(source)} images can be read; known are {', '.join(IMAGE_SUFFIXES)}")
    values = np.concatenate(rows)
    if out:
        key = "probabilities" if output == "logits" else "features"
        try:
            np.savez(out, names=np.asarray(names), **{key: values})
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}") from error
        print(f"{key} of {len(names)} images {list(values.shape)}: {out}")
    return names, values


def main(argv: list[str]) -> None:
    """The command line."""
    parser = ArgumentParser(
        prog="python -m localmim.predict", description="Predicts by an exported model.", exit_on_error=False
    )
    parser.add_argument("--model", metavar="FILE", type=str, required=True, help="a .mindir or .onnx file of export.py")
    parser.add_argument("images", metavar="IMAGE", type=str, nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", metavar="N", type=int, default=5, help="classes that are printed")
    parser.add_argument("--out", metavar="FILE.npz", type=str, default="", help="features or probabilities go here")
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=16, help="images at a time, where the file leaves it open"
    )
    parser.add_argument("--device", type=str, default="auto", help="for MINDIR: auto, CPU, GPU or Ascend")
    predict(**cli.parse(parser, argv).as_dict())


if __name__ == "__main__":
    sys.exit(cli.run(main))

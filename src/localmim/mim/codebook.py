"""Makes codebooks: `python -m localmim.mim.codebook build` clusters patches, `… ids` stores the ids of every image.

Clustering is OpenCV's k-means over patches of random crops, as training sees them; mim/tokenizers.py says what a patch
is and how ids are used.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from mindspore import Tensor
from safetensors.numpy import save
from tqdm import tqdm

from localmim import cli
from localmim.config import DataConfig
from localmim.data.pipeline import Rows, TrainPipeline
from localmim.data.sources import Source, open_source
from localmim.device import set_device
from localmim.errors import UserError
from localmim.mim.tokenizers import FORMAT, Patches, check_cells, open_tokenizer, read_centroids

ITERATIONS, SHIFT = 20, 1e-3  # k-means ends after so many rounds, or when no centroid moves further than this
IDS_SEED = 0  # of the pipeline that stores ids; its crops are fixed


def cluster(patches: np.ndarray, vocab: int, seed: int) -> tuple[np.ndarray, float]:
    """k-means.

    Args:
        patches: float32 [n, d].
        vocab: Number of centroids.
        seed: Of the first centroids (k-means++).

    Returns:
        Centroids float32 [vocab, d], and the mean squared distance of a patch to its own.

    Raises:
        UserError: Fewer different patches than centroids.
    """
    distinct = len(np.unique(np.round(patches, 2), axis=0))  # rounding noise of flat patches is no difference
    if distinct < vocab:
        raise UserError(
            f"{distinct} different patches do not make {vocab} centroids: "
            "lower --vocab, or give more images or --patches"
        )
    cv2.setRNGSeed(seed)
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, ITERATIONS, SHIFT)
    total, _, centroids = cv2.kmeans(patches, vocab, None, criteria, 1, cv2.KMEANS_PP_CENTERS)
    return centroids, total / len(patches)


def sample_patches(pipeline: TrainPipeline, cells: Sequence[int], count: int, seed: int) -> list[np.ndarray]:
    """`count` patches of each cell side out of random crops, float32 [count, d], as the codebook sees them.

    Every patch of the largest cells is taken, and as many of the smaller ones, spread at random over the same crops.
    """
    height, width = pipeline.image_size
    batch_patches = min(pipeline.batch_size * (height // c) * (width // c) for c in cells)
    patches, generator = Patches(cells, pipeline.in_chans), np.random.default_rng(seed)
    taken: list[list[np.ndarray]] = [[] for _ in cells]
    missing, epoch = count, 0
    with tqdm(total=count, desc="patches", unit="patch", mininterval=1) as bar:
        while missing:
            for batch in pipeline.epoch(epoch):
                n = min(missing, batch_patches)
                for rows, grid in zip(taken, patches(Tensor(batch.images))):
                    x = grid.asnumpy().reshape(-1, grid.shape[-1])
                    rows.append(x[generator.choice(len(x), n, replace=False)])
                missing -= n
                bar.update(n)
                if not missing:
                    break
            epoch += 1
    return [np.concatenate(rows) for rows in taken]


def build(
    data_dir: str,
    out: str,
    cells: Sequence[int] = (4, 8, 16, 32),
    vocab: int = 512,
    image_size: Sequence[int] = (224,),
    in_chans: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_bad_share: float = 0.01,
    patches: int = 100_000,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Clusters patches of random crops, as training sees them, and writes the centroids.

    Args:
        data_dir: Anything that `open_source` opens.
        out: .safetensors file to write, not there yet.
        cells: Cell sides in pixels.
        vocab: Centroids of each cell side.
        image_size: Of the crops: one side, or height and width, pixels.
        in_chans: Image channels.
        mean, std, max_bad_share: As in `data` of the recipe.
        patches: Patches of each cell side that are clustered.
        batch_size: Crops that are read at a time, fewer in a smaller data set.
        seed: Of the crops, the choice of patches and the first centroids.
        device: auto, CPU, GPU or Ascend.

    Raises:
        UserError: A wrong argument, `out` exists, or fewer different patches than centroids.
    """
    size, cells = _pair(image_size), sorted(set(cells))
    if vocab < 2:
        raise UserError(f"--vocab is {vocab}, expected 2 or more")
    if patches < vocab:
        raise UserError(f"--patches is {patches}, expected at least --vocab, {vocab}")
    check_cells(cells, size)
    with _new_file(out, ".safetensors") as aside:
        config = _data_config(data_dir, mean, std, max_bad_share)
        source = open_source(data_dir, in_chans=in_chans)
        pipeline = TrainPipeline(source, config, size, in_chans, _batch(batch_size, source), seed)
        set_device(device)
        tables = {}
        for cell, rows in zip(cells, sample_patches(pipeline, cells, patches, seed)):
            print(f"cells of {cell} px: {len(rows)} patches of {rows.shape[1]} values ...", flush=True)
            start = time.perf_counter()
            tables[f"cell_{cell}"], error = cluster(rows, vocab, seed)
            explained = 1 - error / rows.var(axis=0).sum()
            seconds = time.perf_counter() - start
            print(f"  {vocab} centroids explain {explained:.0%} of the variance; {seconds:.1f} s", flush=True)
        metadata = {
            "format": FORMAT,
            "in_chans": str(in_chans),
            "mean": str(pipeline.mean.tolist()),
            "std": str(pipeline.std.tolist()),
            "fingerprint": pipeline.fingerprint,
        }
        aside.write_bytes(save(tables, metadata))
    print(f"written: {out}")


class _InOrder(TrainPipeline):
    """Every readable image once, in the order of the sample numbers, through the transforms of training."""

    def batches(self) -> Iterator[Rows]:
        unreadable: list[tuple[int, str]] = []
        for rows in self._rows(np.arange(len(self.source), dtype=np.int32), IDS_SEED, unreadable):
            yield rows
            while unreadable:
                self.bad.add(*unreadable.pop(0), "it is left out")
        for sample, reason in unreadable:
            self.bad.add(sample, reason, "it is left out")


def store_ids(
    codebook: Sequence[str],
    data_dir: str,
    out: str,
    cells: Sequence[int] | None = None,
    vocab: int | None = None,
    image_size: Sequence[int] = (224,),
    in_chans: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_bad_share: float = 0.01,
    batch_size: int = 32,
    device: str = "auto",
) -> None:
    """Writes the ids of every image, cropped as `require_fixed_crops` wants it, for `StoredIds`.

    Images that cannot be read get an id outside the vocabulary: training never asks for them.

    Args:
        codebook: Files as `open_tokenizer` takes them.
        data_dir: Anything that `open_source` opens.
        out: .npz file to write, not there yet.
        cells, vocab: As in `open_tokenizer`; None: those of the k-means codebook.
        image_size, in_chans, mean, std, max_bad_share, device: As in `build`.
        batch_size: Images that the tokenizer gets at a time, in every batch.

    Raises:
        UserError: A wrong argument, `out` exists, a tokenizer that does not do for the images.
    """
    size = _pair(image_size)
    if any(Path(file).suffix == ".npz" for file in codebook):
        raise UserError("--codebook is a file of stored ids already, expected .safetensors or .mindir")
    if cells is None or vocab is None:
        if [Path(file).suffix for file in codebook] != [".safetensors"]:
            raise UserError("--cells and --vocab are needed with .mindir files")
        tables, _ = read_centroids(codebook[0])
        cells = sorted(tables) if cells is None else cells
        vocab = len(next(iter(tables.values()))) if vocab is None else vocab
    with _new_file(out, ".npz") as aside, tempfile.TemporaryDirectory(dir=aside.parent, prefix=".ids-") as folder:
        config = _data_config(data_dir, mean, std, max_bad_share)
        config.crop_scale, config.crop_ratio, config.hflip = (1.0, 1.0), (size[1] / size[0],) * 2, 0.0
        source = open_source(data_dir, in_chans=in_chans)
        pipeline = _InOrder(source, config, size, in_chans, _batch(batch_size, source), IDS_SEED)
        set_device(device)
        tokenizer = open_tokenizer(codebook, cells, vocab, in_chans, size)
        dtype = np.uint16 if vocab < 2**16 else np.int32
        arrays = {}
        for cell in dict.fromkeys(cells):  # on disk, as the ids of a large data set need more than the memory
            shape = (len(source), size[0] // cell, size[1] // cell)
            path = Path(folder, f"cell_{cell}.npy")
            arrays[cell] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            arrays[cell][:] = np.iinfo(dtype).max
        np.save(Path(folder, "fingerprint.npy"), pipeline.fingerprint)
        with tqdm(total=len(source), desc="ids", unit="img", mininterval=1) as bar:
            for images, samples in pipeline.batches():
                n = len(samples)
                filled = np.concatenate([images, np.zeros((batch_size - n, *images.shape[1:]), np.float32)])
                for cell, ids in zip(cells, tokenizer(filled, samples)):
                    arrays[cell][samples] = ids[:n]
                bar.update(n)
        for array in arrays.values():
            array.flush()
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(Path(folder).iterdir()):
                archive.write(path, path.name)
    print(f"written: {out}, ids of {len(source)} images, cells of {', '.join(map(str, arrays))} px")


@contextlib.contextmanager
def _new_file(out: str, ending: str) -> Iterator[Path]:
    """A name beside `out`, which becomes `out` when all went well. UserError when `out` cannot be written."""
    target = Path(out).expanduser().absolute()
    if target.suffix != ending:
        raise UserError(f"--out: {out} does not end in {ending}")
    if target.exists():
        raise UserError(f"--out: {out} exists; give a new name, nothing is overwritten")
    if not target.parent.is_dir():
        raise UserError(f"--out: the folder {target.parent} does not exist")
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield aside
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)  # gone already when all went well


def _pair(image_size: Sequence[int]) -> tuple[int, int]:
    if len(image_size) > 2 or not all(side >= 1 for side in image_size):
        raise UserError(f"--image-size is {list(image_size)}, expected one side, or height and width")
    return image_size[0], image_size[-1]


def _batch(batch_size: int, source: Source) -> int:
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}, expected 1 or more")
    return min(batch_size, len(source))


def _data_config(data_dir: str, mean: Sequence[float] | None, std: Sequence[float] | None, share: float) -> DataConfig:
    return DataConfig(dir=data_dir, mean=mean and list(mean), std=std and list(std), max_bad_share=share)


def main(argv: list[str]) -> None:
    """The command line."""
    parser, add = cli.commands("python -m localmim.mim.codebook", "Codebook ids as a target of pre-training.")
    command = add("build", "cluster patches of random crops into a codebook")
    ids = add("ids", "store the ids of every image, for training with fixed crops")
    ids.add_argument(
        "--codebook",
        metavar="FILE",
        type=str,
        nargs="+",
        required=True,
        help=".safetensors that `build` wrote, or .mindir files",
    )
    for each, ending in ((command, ".safetensors"), (ids, ".npz")):
        each.add_argument(
            "--data-dir", metavar="DIR", type=str, required=True, help="the images, as data.dir of a recipe"
        )
        each.add_argument("--out", metavar="FILE", type=str, required=True, help=f"{ending} file to write, a new name")
        each.add_argument(
            "--image-size", metavar="PX", type=int, nargs="+", default=[224], help="side, or height and width, of crops"
        )
        each.add_argument("--in-chans", metavar="C", type=int, default=3, help="image channels")
        each.add_argument("--mean", metavar="X", type=float, nargs="+", help="as data.mean of the recipe")
        each.add_argument("--std", metavar="X", type=float, nargs="+", help="as data.std of the recipe")
        each.add_argument("--max-bad-share", metavar="X", type=float, default=0.01, help="as data.max_bad_share")
        each.add_argument("--batch-size", metavar="N", type=int, default=32, help="images at a time")
        each.add_argument("--device", type=str, default="auto", help="auto, CPU, GPU or Ascend")
    command.add_argument(
        "--cells", metavar="PX", type=int, nargs="+", default=[4, 8, 16, 32], help="cell sides in pixels"
    )
    command.add_argument("--vocab", metavar="V", type=int, default=512, help="centroids of each cell side")
    command.add_argument(
        "--patches", metavar="N", type=int, default=100_000, help="patches of each cell side to cluster"
    )
    command.add_argument("--seed", metavar="S", type=int, default=0, help="of crops, patches and first centroids")
    ids.add_argument("--cells", metavar="PX", type=int, nargs="+", help="cell sides; default: all of the codebook")
    ids.add_argument("--vocab", metavar="V", type=int, help="number of ids; default: the codebook's")
    arguments = cli.parse(parser, argv)
    if arguments.command == "build":
        build(**arguments.build.as_dict())
    else:
        store_ids(**arguments.ids.as_dict())


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""Tokenizers: codebook ids are data, as masks are: a frozen tokenizer turns a batch into ids before the training step.

The ids enter the step's graph as index arrays of fixed shape, [B, hs, ws] int32 a scale, hs = H // cell. Three sources
share one interface, `Tokenizer`, and `open_tokenizer` tells them apart by the ending of the file:

    .safetensors  a k-means codebook over patches, made by `python -m localmim.mim.codebook build`
    .mindir       any network from images to ids or to logits over the vocabulary
    .npz          ids stored beside the images, made by `python -m localmim.mim.codebook ids`

The k-means codebook sees a patch as `PixelTarget` does, at most 8 x 8 pixels of it: averaged down, then normalised by
its own mean and deviation. So an id tells the pattern of a patch, its colours included; adding to all values of the
normalised image, or scaling them, does not change it.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from safetensors import SafetensorError, safe_open

from localmim.config import DataConfig
from localmim.data.sources import Source
from localmim.errors import UserError, first_line
from localmim.mim.targets import PixelTarget

FORMAT = "localmim-codebook-1"
MAX_SIDE = 8  # pixels: larger patches are averaged down to this or less before they are clustered


class Tokenizer(ABC):
    """Base of all tokenizers.

    Attributes:
        vocab: Number of ids; they are 0..vocab-1.
    """

    vocab: int

    @abstractmethod
    def __call__(self, images: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, ...]:
        """Ids of a batch.

        Args:
            images: float32 [B, C, H, W], normalised as the encoder gets them.
            samples: int [B], positions of the images in the data set.

        Returns:
            int32 [B, hs, ws], one a scale.

        Raises:
            UserError: The tokenizer's file does not do for these images.
        """


def open_tokenizer(
    files: Sequence[str], cells: Sequence[int], vocab: int, in_chans: int, image_size: tuple[int, int]
) -> Tokenizer:
    """Opens what `target.codebook` names.

    Args:
        files: One .safetensors or .npz file, or .mindir files: one a scale, or one that returns all scales.
        cells: Cell sides in pixels, one a scale; a side may come twice.
        vocab: Number of ids.
        in_chans: Image channels.
        image_size: (height, width) in pixels.

    Raises:
        UserError: A file is missing, damaged, or made for something else.
    """
    if not files:
        raise UserError("target.codebook is not set: expected a .safetensors, .npz or .mindir file")
    if vocab < 2:
        raise UserError(f"target.vocab is {vocab}, expected 2 or more")
    check_cells(cells, image_size)
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"target.codebook: {file} does not exist")
    endings = {Path(file).suffix for file in files}
    if endings == {".mindir"}:
        return MindIRTokenizer(files, cells, vocab, image_size)
    if len(files) > 1:
        raise UserError(f"target.codebook lists {len(files)} files: expected one, or only .mindir files, one a scale")
    if endings == {".safetensors"}:
        return KMeansCodebook(files[0], cells, vocab, in_chans)
    if endings == {".npz"}:
        return StoredIds(files[0], cells, vocab, image_size)
    raise UserError(f"target.codebook: {files[0]} is no .safetensors, .npz or .mindir file")


def fingerprint(files: Sequence[str]) -> str:
    """A digest of the files' contents: of the size, the first and the last MiB of each."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stored:
            size = stored.seek(0, os.SEEK_END)
            stored.seek(0)
            digest.update(str(size).encode() + stored.read(1 << 20))
            stored.seek(max(size - (1 << 20), 0))
            digest.update(stored.read())
    return digest.hexdigest()


def check_cells(cells: Sequence[int], image_size: tuple[int, int]) -> None:
    for cell in cells:
        if cell < 1 or image_size[0] % cell or image_size[1] % cell:
            raise UserError(f"cells of {cell} px do not divide an image of {image_size[0]}x{image_size[1]} px")


def _check_range(ids: Sequence[np.ndarray], vocab: int, file: str) -> None:
    low, high = min(x.min() for x in ids), max(x.max() for x in ids)
    if low < 0 or high >= vocab:
        raise UserError(f"target.codebook: {file} gives ids from {low} to {high}, but target.vocab is {vocab}")


def pooled_side(cell: int) -> int:
    """Side in pixels that a patch is averaged down to: the largest divisor of `cell` up to 8."""
    return max(side for side in range(1, MAX_SIDE + 1) if cell % side == 0)


class Patches(nn.Cell):
    """Images to the patches that are clustered: [B, C, H, W] -> [B, hs, ws, d] a scale, d = in_chans * pooled_side^2.

    Values are ordered (row, column, channel) and normalised as in `PixelTarget`; a flat patch is nearly zero.
    """

    def __init__(self, cells: Sequence[int], in_chans: int):
        super().__init__()
        sides = [pooled_side(cell) for cell in cells]
        self.factors = tuple(cell // side for cell, side in zip(cells, sides))
        self.pixels = nn.CellList([PixelTarget((side,), in_chans) for side in sides])

    def construct(self, images: Tensor) -> tuple[Tensor, ...]:
        grids = []
        for k in range(len(self.factors)):
            factor = self.factors[k]
            x = images if factor == 1 else ops.avg_pool2d(images, factor, factor)  # [B, C, hs*side, ws*side]
            grids.append(self.pixels[k](x)[0])
        return tuple(grids)


class Nearest(nn.Cell):
    """The nearest centroid: patches [B, hs, ws, d] -> int32 [B, hs, ws].

    |x - c|^2 is smallest where x.c - |c|^2 / 2 is largest: a product of (x, 1) with (c, -|c|^2 / 2).
    """

    def __init__(self, centroids: np.ndarray):
        super().__init__()
        halves = -0.5 * (centroids.astype(np.float64) ** 2).sum(axis=1)  # [V]
        table = np.concatenate([centroids.T, halves[None]]).astype(np.float32)  # [d+1, V]
        self.table = Parameter(Tensor(table), name="table", requires_grad=False)
        self.argmax = ops.Argmax(axis=-1, output_type=ms.int32)

    def construct(self, patches: Tensor) -> Tensor:
        B, hs, ws, d = patches.shape
        rows = patches.reshape(B * hs * ws, d)
        rows = ops.concat((rows, ops.ones((B * hs * ws, 1), ms.float32)), axis=1)  # [B*hs*ws, d+1]
        return self.argmax(ops.matmul(rows, self.table)).reshape(B, hs, ws)


class _Assign(nn.Cell):
    """Images -> ids, one grid a scale."""

    def __init__(self, tables: list[np.ndarray], cells: Sequence[int], in_chans: int):
        super().__init__()
        self.patches = Patches(cells, in_chans)
        self.nearest = nn.CellList([Nearest(table) for table in tables])

    def construct(self, images: Tensor) -> tuple[Tensor, ...]:
        patches = self.patches(images)
        ids = []
        for k in range(len(patches)):
            ids.append(self.nearest[k](patches[k]))
        return tuple(ids)


class KMeansCodebook(Tokenizer):
    """Ids are the nearest of `vocab` centroids; it runs on the device.

    Args:
        file: .safetensors, made by `build`.
        cells, vocab, in_chans: As in `open_tokenizer`; the file may hold other cells besides.

    Raises:
        UserError: The file is damaged, or made for other cells, another vocabulary or other channels.
    """

    def __init__(self, file: str, cells: Sequence[int], vocab: int, in_chans: int):
        tables, stored_chans = read_centroids(file)
        if stored_chans != in_chans:
            raise UserError(f"target.codebook: {file} is for images of {stored_chans} channels, not {in_chans}")
        for cell in cells:
            if cell not in tables:
                raise UserError(f"target.codebook: {file} has cells of {sorted(tables)} px, but none of {cell} px")
            if len(tables[cell]) != vocab:
                raise UserError(f"target.codebook: {file} has {len(tables[cell])} ids, but target.vocab is {vocab}")
        self.vocab = vocab
        unique = sorted(set(cells))  # a cell side that comes twice is worked out once
        self.order = [unique.index(cell) for cell in cells]
        self.assign = _Assign([tables[cell] for cell in unique], unique, in_chans)
        self.assign.set_train(False)

    def __call__(self, images: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, ...]:
        ids = [x.asnumpy() for x in self.assign(Tensor(images))]
        return tuple(ids[k] for k in self.order)


def read_centroids(file: str) -> tuple[dict[int, np.ndarray], int]:
    """Cell side to centroids float32 [vocab, d], and the number of channels, of a k-means codebook.

    Raises:
        UserError: The file is missing, damaged or something else.
    """
    try:
        with safe_open(file, framework="np") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{file} is no codebook of this project: expected format {FORMAT!r} in its header")
            in_chans = int(metadata["in_chans"])
            tables = {int(name.removeprefix("cell_")): stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"codebook {file} does not exist") from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{file} is no codebook, or a damaged one: {first_line(error)}") from error
    for cell, table in tables.items():
        d = in_chans * pooled_side(cell) ** 2
        if table.ndim != 2 or table.shape[1] != d or table.dtype != np.float32:
            raise UserError(
                f"{file} is damaged: cell_{cell} is {table.dtype} {table.shape}, expected float32 (vocab, {d})"
            )
    return tables, in_chans


class FrozenNetwork:
    """An exported network on the host: images float32 [B, C, H, W] -> its outputs.

    Args:
        file: A .mindir file.
        key: The recipe's key that names it, for messages.

    Raises:
        UserError: The file is not there, MindSpore cannot load it; when called, the network refuses the images.
    """

    def __init__(self, file: str, key: str):
        self.file, self.key = file, key
        if not Path(file).is_file():
            raise UserError(f"{key}: {file} does not exist, expected a .mindir file")
        try:
            self.network = nn.GraphCell(ms.load(str(file)))
        except Exception as error:  # MindSpore has no class of its own for this
            raise UserError(f"{key}: {file} is no MINDIR file: {first_line(error)}") from error

    def __call__(self, images: np.ndarray) -> tuple[Tensor, ...]:
        try:
            found = self.network(Tensor(images))
        except Exception as error:  # as above: whatever the network makes of a wrong shape
            raise UserError(f"{self.key}: {self.file} refuses images {images.shape}: {first_line(error)}") from error
        return tuple(found) if isinstance(found, (tuple, list)) else (found,)


class MindIRTokenizer(Tokenizer):
    """Ids out of exported networks: images [B, C, H, W] -> ids or logits.

    An output is int [B, hs, ws] or [B, hs*ws], the ids, or float [B, vocab, hs, ws], whose largest entry is the id.

    Args:
        files: .mindir files, one a scale, or one that returns all scales.
        cells, vocab, image_size: As in `open_tokenizer`.

    Raises:
        UserError: Another number of files, or a file that MindSpore cannot load.
    """

    def __init__(self, files: Sequence[str], cells: Sequence[int], vocab: int, image_size: tuple[int, int]):
        if len(files) not in (1, len(cells)):
            raise UserError(
                f"target.codebook lists {len(files)} .mindir files, expected 1, or {len(cells)}: one a scale"
            )
        self.vocab, self.files = vocab, list(files)
        self.grids = [(image_size[0] // cell, image_size[1] // cell) for cell in cells]
        self.networks = {}
        for file in dict.fromkeys(files):
            self.networks[file] = FrozenNetwork(file, "target.codebook")

    def __call__(self, images: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, ...]:
        outputs = {file: network(images) for file, network in self.networks.items()}
        wanted = len(self.grids) if len(self.files) == 1 else 1
        for file, found in outputs.items():
            if len(found) != wanted:
                raise UserError(f"target.codebook: {file} returns {len(found)} outputs, expected {wanted}: one a scale")
        if len(self.files) == 1:
            named = [(self.files[0], x) for x in outputs[self.files[0]]]
        else:
            named = [(file, outputs[file][0]) for file in self.files]
        ids = tuple(self._ids(file, x, len(images), grid) for (file, x), grid in zip(named, self.grids))
        _check_range(ids, self.vocab, " and ".join(self.networks))
        return ids

    def _ids(self, file: str, output: Tensor, batch: int, grid: tuple[int, int]) -> np.ndarray:
        """One output as ids int32 [B, hs, ws]."""
        if output.is_floating_point() and output.shape == (batch, self.vocab, *grid):
            return output.argmax(axis=1).asnumpy().astype(np.int32)
        if not output.is_floating_point() and output.shape in ((batch, *grid), (batch, grid[0] * grid[1])):
            return output.asnumpy().astype(np.int32).reshape(batch, *grid)
        raise UserError(
            f"target.codebook: {file} returns {output.dtype} {output.shape}, expected ids {(batch, *grid)} "
            f"or logits {(batch, self.vocab, *grid)}"
        )


class StoredIds(Tokenizer):
    """Ids out of a file, by sample number. They fit images whose geometry is not augmented: see `require_fixed_crops`.

    The file holds arrays `cell_{c}` [N, hs, ws] of integers, and `fingerprint`, the data set's. It is mapped, not read,
    unless it is compressed; so processes share it, and it may be larger than the memory.

    Args:
        file: .npz, made by `store_ids`.
        cells, vocab, image_size: As in `open_tokenizer`; the file may hold other cells besides.

    Raises:
        UserError: The file is damaged, or made for other cells or another image size.
    """

    def __init__(self, file: str, cells: Sequence[int], vocab: int, image_size: tuple[int, int]):
        self.file, self.vocab = file, vocab
        try:
            arrays = _mapped(file)
            self.fingerprint = str(arrays["fingerprint"])
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"target.codebook: {file} is no file of stored ids, or damaged: {first_line(error)}"
            ) from error
        for cell in cells:
            if f"cell_{cell}" not in arrays:
                raise UserError(f"target.codebook: {file} has {', '.join(sorted(arrays))}, but no cell_{cell}")
            found, grid = arrays[f"cell_{cell}"], (image_size[0] // cell, image_size[1] // cell)
            if found.dtype.kind not in "iu" or found.ndim != 3 or found.shape[1:] != grid:
                raise UserError(
                    f"target.codebook: {file} has cell_{cell} of {found.dtype} {found.shape}, "
                    f"expected integers (images, {grid[0]}, {grid[1]})"
                )
        self.grids = [arrays[f"cell_{cell}"] for cell in cells]
        if len({len(grid) for grid in self.grids}) > 1:
            raise UserError(f"target.codebook: {file} is damaged: its cells have different numbers of images")

    def __len__(self) -> int:
        return len(self.grids[0])

    def check(self, source: Source) -> None:
        """UserError unless the ids were made from this data set."""
        if len(self) != len(source):
            raise UserError(
                f"target.codebook: {self.file} has ids of {len(self)} images, but data.dir holds {len(source)}"
            )
        if self.fingerprint != source.fingerprint():
            raise UserError(
                f"target.codebook: {self.file} has ids of another data set than data.dir "
                "(names, labels or sizes differ)"
            )

    def __call__(self, images: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, ...]:
        ids = tuple(grid[samples].astype(np.int32) for grid in self.grids)
        _check_range(ids, self.vocab, self.file)
        return ids


def _mapped(file: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, mapped where they are stored without compression."""
    arrays = {}
    with zipfile.ZipFile(file) as archive, np.load(file, allow_pickle=False) as loaded, open(file, "rb") as raw:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if member.compress_type != zipfile.ZIP_STORED or not name.startswith("cell_"):
                arrays[name] = loaded[name]
                continue
            raw.seek(member.header_offset + 26)  # of the local header, where its lengths of name and extra field are
            raw.seek(sum(struct.unpack("<HH", raw.read(4))), os.SEEK_CUR)
            version = np.lib.format.read_magic(raw)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read_header(raw)
            order = "F" if fortran else "C"
            arrays[name] = np.memmap(file, dtype, "r", offset=raw.tell(), shape=shape, order=order)
    return arrays


def require_fixed_crops(config: DataConfig, image_size: tuple[int, int]) -> None:
    """Stored ids fit only if an image comes with the same geometry every time: the largest crop of the model's shape.

    `RandomCrop` then takes the centre crop. (An image whose sides are within a pixel of the crop's shape is
    the exception: its crop may be placed one pixel of the original off.)

    Args:
        config: `data` of the recipe.
        image_size: (height, width) of the crops, pixels.

    Raises:
        UserError: One line that names the keys of `data` that let the geometry change.
    """
    ratio = image_size[1] / image_size[0]
    wrong = []
    if tuple(config.crop_scale) != (1, 1):
        wrong.append("data.crop_scale: [1, 1]")
    if not all(math.isclose(value, ratio, rel_tol=1e-3) for value in config.crop_ratio):
        wrong.append(f"data.crop_ratio: [{ratio:.6g}, {ratio:.6g}]")
    if config.hflip != 0:
        wrong.append("data.hflip: 0")
    if config.rand_augment:
        wrong.append("data.rand_augment: ''")
    if config.erase:
        wrong.append("data.erase: 0")
    if config.interpolation != "bicubic":
        wrong.append("data.interpolation: bicubic")
    if wrong:
        raise UserError(f"stored ids fit only images that are always cropped alike: set {', '.join(wrong)}")

"""A source is random access to the images of a data set, whatever they are stored in.

`len(s)` images; `s[i]` is image i, either encoded (1-D uint8, the bytes of a file, for `decode`) or a decoded
array (H, W, C), uint8 0..255 or float32 0..1; `s.name(i)` is what a person would look for; `s.labels[i]` is its class,
-1 when there is none. The order is fixed by names alone, so sample numbers mean the same in every run.

Which files make a class-folder tree: when every image lies inside some first-level folder, those folders, sorted, are
the classes; as soon as one image lies directly in the root, the whole folder is unlabelled. Links are followed, names
that begin with a dot are not looked at.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sqlite3
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import mindspore.dataset as ds
import numpy as np

from localmim.errors import UserError

log = logging.getLogger("localmim.data")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".npy")
UNSUPPORTED_SUFFIXES = (".gif", ".heic", ".jp2", ".avif", ".svg")  # images that cannot be decoded: said, not hidden
MOST_HEADER = 1 << 24  # bytes of the header of a MindRecord shard
CIFAR_TRAIN = {"cifar10": [f"data_batch_{i}.bin" for i in range(1, 6)], "cifar100": ["train.bin"]}
CIFAR_CLASSES = {"cifar10": (10, "batches.meta.txt"), "cifar100": (100, "fine_label_names.txt")}


class UnreadableImage(Exception):
    """One image cannot be read or decoded; the message is the reason, without the name."""


def decode(raw: np.ndarray, in_chans: int) -> np.ndarray:
    """Decodes the bytes of one image file.

    Args:
        raw: 1-D uint8, the file.
        in_chans: 3 gives RGB, 1 gives grey, both 8 bit; any other number takes the file as it is stored.

    Returns:
        (H, W, in_chans), uint8 0..255, or float32 in units of 1 for files of 16 bits and of floats.
        The orientation tag is ignored, as Pillow does.

    Raises:
        UnreadableImage: damaged, not an image, or another number of channels.
    """
    if raw.size == 0:
        raise UnreadableImage("the file is empty")
    flags = {
        3: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
        1: cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION,
    }
    try:
        image = cv2.imdecode(raw, flags.get(in_chans, cv2.IMREAD_UNCHANGED))
    except cv2.error as error:  # sizes beyond OpenCV's limits
        raise UnreadableImage(str(error.err)) from None
    if image is None:
        head = raw[:4].tobytes()
        kind = {b"\xff\xd8\xff": "JPEG", b"\x89PN": "PNG"}.get(head[:3])
        raise UnreadableImage(f"truncated or damaged {kind}" if kind else f"not a known image format (begins {head!r})")
    image = np.atleast_3d(image)  # H W C
    if in_chans != 3 and image.shape[2] in (3, 4):
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
    return _checked(image, in_chans)


def _checked(image: np.ndarray, in_chans: int) -> np.ndarray:
    """The array as uint8 or float32 (H, W, in_chans); UnreadableImage when it is something else."""
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] != in_chans or 0 in image.shape:
        raise UnreadableImage(f"shape {image.shape}, expected (height, width, {in_chans})")
    if image.dtype == np.uint16:
        return image.astype(np.float32) / 65535
    if image.dtype.kind == "f":
        image = image.astype(np.float32, copy=False)
        if not np.isfinite(image).all():
            raise UnreadableImage("holds NaN or infinite values")
        return image
    if image.dtype != np.uint8:
        raise UnreadableImage(f"values of type {image.dtype}, expected uint8, uint16 or float")
    return image


class Source(ABC):
    """Base of all sources.

    Attributes:
        encoded: True when `s[i]` is the bytes of a file, False when it is an array.
        labels: int32 [N], -1 where there is none.
        class_names: names of the classes, empty when there are no labels.
    """

    encoded: bool = True
    labels: np.ndarray
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, i: int) -> np.ndarray:
        """Image i: bytes or array (see the module). UnreadableImage when that is impossible."""

    @abstractmethod
    def name(self, i: int) -> str:
        """Path or record name of image i."""

    def label(self, i: int) -> int:
        """Class number of image i, -1 when it has none."""
        return int(self.labels[i])

    @abstractmethod
    def _size(self, i: int) -> int:
        """A number that changes when image i is exchanged for another one; cheap."""

    def fingerprint(self) -> str:
        """16 hex digits over all names and labels in order, and the sizes of 1000 images spread over the set."""
        digest = hashlib.blake2b(digest_size=8)
        for i in range(len(self)):
            digest.update(self.name(i).encode("utf-8", "surrogateescape") + b"\n")
        digest.update(np.ascontiguousarray(self.labels, np.int32).tobytes())
        for i in np.unique(np.linspace(0, len(self) - 1, 1000).astype(int)):
            digest.update(b"%d\n" % self._size(int(i)))
        return digest.hexdigest()

    def loaders(self, order: Sequence[int]) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        """(i, call that reads image i) for each i in order; the calls may run in any thread."""
        for i in order:
            yield int(i), partial(self.__getitem__, int(i))


def spread(total: int, count: int) -> list[int]:
    """At most `count` numbers below `total`, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


class FileSource(Source):
    """Images in files of their own.

    Args:
        root: what names are relative to.
        names: relative paths, in the order of sample numbers.
        labels: class of each, or None.
        class_names: names of the classes.
        in_chans: 3 and 1 leave the decoding to the caller; other numbers, and .npy files, are decoded here.
    """

    def __init__(self, root: Path, names: list[str], labels: list[int] | None, class_names: list[str], in_chans: int):
        self.root, self.names, self.class_names, self.in_chans = root, names, class_names, in_chans
        self.labels = np.full(len(names), -1, np.int32) if labels is None else np.asarray(labels, np.int32)
        self.encoded = in_chans in (1, 3) and not any(name.lower().endswith(".npy") for name in names)

    def __getitem__(self, i: int) -> np.ndarray:
        path = os.path.join(self.root, self.names[i])
        try:
            if path.lower().endswith(".npy"):
                return _checked(np.load(path, allow_pickle=False), self.in_chans)
            with open(path, "rb", buffering=0) as file:
                raw = np.frombuffer(file.read(), np.uint8)
        except (OSError, ValueError, EOFError) as error:
            raise UnreadableImage(getattr(error, "strerror", None) or str(error).split("\n")[0]) from None
        return raw if self.encoded else decode(raw, self.in_chans)

    def name(self, i: int) -> str:
        return self.names[i]

    def _size(self, i: int) -> int:
        try:
            return os.path.getsize(os.path.join(self.root, self.names[i]))
        except OSError:
            return -1


class ArraySource(Source):
    """Images in memory.

    Args:
        images: sequence of (H, W, C) arrays, uint8 0..255 or float32 0..1.
        labels: class of each, or None.
        class_names: names of the classes.
        names: name of each, or None for "image 0", ...
    """

    encoded = False

    def __init__(
        self,
        images: Sequence[np.ndarray],
        labels: Sequence[int] | None = None,
        class_names: Sequence[str] = (),
        names: Sequence[str] | None = None,
    ):
        self.images, self.class_names, self.names = images, list(class_names), names
        self.labels = np.full(len(images), -1, np.int32) if labels is None else np.asarray(labels, np.int32)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.images[i]

    def name(self, i: int) -> str:
        return f"image {i}" if self.names is None else self.names[i]

    def _size(self, i: int) -> int:
        return zlib.crc32(np.ascontiguousarray(self.images[i]))


class MindRecordSource(Source):
    """Encoded images in MindRecord shards.

    Shards written by `python -m localmim.data pack`, or any whose image column is called `image` or `data`; columns
    `label` and `name` (or `file_name`) are used where they exist. Where images are the only bytes of a row, as in those
    of `pack`, they are read at the places that the index names, by any thread; MindData, which reads all others, takes
    five times as long. What comes first and last in each shard must be what MindData reads.
    """

    def __init__(self, files: list[Path], class_names: list[str]):
        self.files, self.class_names = [str(file) for file in files], class_names
        self.names: list[str] = []
        labels: list[int] = []
        self.firsts: list[int] = []  # of each shard: the number of its first image
        places = []  # of each shard: where the bytes of its images begin and end, int64 [n, 2]
        for file in files:
            self.firsts.append(len(labels))
            table = _index_of(file)
            columns = {row[1] for row in table.execute("PRAGMA table_info(indexes)")}
            label = "label_0" if "label_0" in columns else "-1"
            name = next((c for c in ("name_0", "file_name_0") if c in columns), f"'{file.name} row ' || row_id")
            for row in table.execute(f"SELECT {label}, {name} FROM indexes ORDER BY row_id"):
                labels.append(row[0])
                self.names.append(row[1])
            places.append(_places(file, table))
            table.close()
        self.labels = np.asarray(labels, np.int32)
        self.column = self._image_column()
        self.places = np.concatenate(places)
        self.direct = len(self.places) == len(labels) and self._is_direct()

    def _image_column(self) -> str:
        for column in ("image", "data"):
            try:
                self._records(column, [0]).get_dataset_size()
                next(self._records(column, [0]).create_tuple_iterator(num_epochs=1, output_numpy=True))
                return column
            except (RuntimeError, StopIteration):
                continue
        raise UserError(f"data.dir: {self.files[0]} is damaged or has no column 'image' or 'data'")

    def _records(self, column: str, order: Sequence[int]) -> ds.MindDataset:
        sampler = ds.SubsetSampler([int(i) for i in order])
        return ds.MindDataset(self.files, columns_list=[column], sampler=sampler, num_parallel_workers=1)

    def _is_direct(self) -> bool:
        """Whether the first and the last image of each shard are where the index says."""
        ends = [*self.firsts[1:], len(self.labels)]
        looked_at = sorted({i for first, end in zip(self.firsts, ends) if first < end for i in (first, end - 1)})
        return all(np.array_equal(self._read(i), load()) for i, load in self._by_minddata(looked_at))

    def _read(self, i: int) -> np.ndarray:
        begin, end = self.places[i].tolist()
        try:
            with open(self.files[bisect_right(self.firsts, i) - 1], "rb", buffering=0) as opened:
                opened.seek(begin)
                raw = opened.read(end - begin)
        except OSError as error:
            raise UnreadableImage(error.strerror) from None
        return np.frombuffer(raw, np.uint8)

    def __getitem__(self, i: int) -> np.ndarray:
        return self._read(i) if self.direct else next(self._by_minddata([i]))[1]()

    def loaders(self, order: Sequence[int]) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        return super().loaders(order) if self.direct else self._by_minddata(order)

    def _by_minddata(self, order: Sequence[int]) -> Iterator[tuple[int, Callable[[], np.ndarray]]]:
        rows = self._records(self.column, order).create_tuple_iterator(num_epochs=1, output_numpy=True)
        try:
            for i, (record,) in zip(order, rows):
                yield int(i), partial(np.frombuffer, record.tobytes(), np.uint8)
        finally:
            rows.stop()

    def name(self, i: int) -> str:
        return self.names[i]

    def _size(self, i: int) -> int:
        return sum(os.path.getsize(file) for file in self.files)


def open_source(
    path: str, format: str = "auto", in_chans: int = 3, evaluation: bool = False, called: str = "data.dir"
) -> Source:
    """Opens what `data.dir` names.

    Args:
        path: a folder of images or class folders, a list file, CIFAR binaries (their folder or one .bin file), or
            MindRecord shards (their folder or one file).
        format: auto, folder, list, cifar10, cifar100 or mindrecord.
        in_chans: channels that the model expects.
        evaluation: of a CIFAR folder take the test part, not the training part.
        called: what the user knows it by, for errors.

    Raises:
        UserError: nothing there, or something else than expected.
    """
    try:
        return _open(path, format, in_chans, evaluation)
    except UserError as error:
        raise UserError(str(error).replace("data.dir", called, 1)) from error.__cause__


def _open(path: str, format: str, in_chans: int, evaluation: bool) -> Source:
    if not path:
        raise UserError("data.dir is not set: a folder of images, a list file, CIFAR binaries or MindRecord shards")
    where = Path(path).expanduser()
    if not where.exists():
        raise UserError(f"data.dir: {path} does not exist")
    if format == "auto":
        format = _detect(where)
    if format in ("cifar10", "cifar100", "mindrecord") and in_chans not in ((3,) if format != "mindrecord" else (1, 3)):
        raise UserError(f"data.dir: {path} ({format}) holds colour images, but the model expects {in_chans} channels")
    if format == "folder":
        if not where.is_dir():
            raise UserError(f"data.dir: {path} is a file, data.format=folder expects a folder")
        return _open_folder(where, in_chans)
    if format == "list":
        if not where.is_file():
            raise UserError(f"data.dir: {path} is a folder, data.format=list expects a text file with paths")
        return _open_list(where, in_chans)
    if format == "mindrecord":
        return _open_mindrecord(where)
    return _open_cifar(where, format, evaluation)


def _detect(where: Path) -> str:
    if where.is_dir():
        if any(re.search(r"\.mindrecord\d*$", file.name) for file in where.iterdir()):
            return "mindrecord"
        for format, files in CIFAR_TRAIN.items():
            test = "test_batch.bin" if format == "cifar10" else "test.bin"
            if any((where / file).is_file() for file in [*files, test]):
                return format
        return "folder"
    if where.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"data.dir: {where} is a single image; give the folder that holds the images")
    if where.suffix == ".bin":
        return "cifar10" if where.stat().st_size % 3073 == 0 else "cifar100"
    return "mindrecord" if re.search(r"\.mindrecord\d*$", where.name) else "list"


def _open_folder(root: Path, in_chans: int) -> FileSource:
    names, others = [], Counter()
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = os.path.relpath(folder, root)
        for file in files:
            suffix = os.path.splitext(file)[1].lower()
            if file.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES:
                names.append(os.path.normpath(os.path.join(inside, file)))
            else:
                others[suffix or "no suffix"] += 1
    if not names:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
        held = f"holds {kinds} files" if others else "is empty"
        raise UserError(f"data.dir: {root} {held}; no images ({', '.join(IMAGE_SUFFIXES)}) in it or its sub-folders")
    for suffix in UNSUPPORTED_SUFFIXES:
        if others[suffix]:
            log.warning("data: %d %s files in %s are left out, they cannot be decoded", others[suffix], suffix, root)
    names.sort(key=lambda name: name.split(os.sep))
    tops = [name.split(os.sep, 1)[0] if os.sep in name else None for name in names]
    if None in tops:
        return FileSource(root, names, None, [], in_chans)
    classes = sorted(set(tops))
    number = {name: k for k, name in enumerate(classes)}
    return FileSource(root, names, [number[top] for top in tops], classes, in_chans)


def _open_list(file: Path, in_chans: int) -> FileSource:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"data.dir: {file} is not a text file; a list has a path on each line") from None
    names, labels = [], []
    for line in filter(None, map(str.strip, lines)):
        name, label = line, None
        if "\t" in line:
            name, label = (part.strip() for part in line.rsplit("\t", 1))
            if not re.fullmatch(r"-?\d+", label):
                raise UserError(f"data.dir: {file} has the label {label!r} at {name}, a whole number was expected")
        elif match := re.fullmatch(r"(.*\S)\s+(-?\d+)", line):
            name, label = match.groups()
        names.append(name)
        labels.append(label)
    if not names:
        raise UserError(f"data.dir: {file} is empty; a list has a path on each line")
    if None in labels and any(label is not None for label in labels):
        raise UserError(f"data.dir: {file} gives no label for {names[labels.index(None)]}, but labels for other images")
    missing = [name for name in names if not (file.parent / name).is_file()]
    if missing:
        first = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise UserError(f"data.dir: {file} names {len(missing)} files that do not exist, of {len(names)}: {first}")
    if None in labels:
        return FileSource(file.parent, names, None, [], in_chans)
    numbers = [int(label) for label in labels]
    return FileSource(file.parent, names, numbers, [str(k) for k in range(max(numbers) + 1)], in_chans)


def _open_cifar(where: Path, format: str, evaluation: bool) -> ArraySource:
    """The training part of a folder (or its test part, also when that is all there is), or the .bin file named."""
    classes, meta = CIFAR_CLASSES[format]
    if where.is_file():
        files = [where]
    else:
        present = [where / file for file in CIFAR_TRAIN[format] if (where / file).is_file()]
        test = where / ("test_batch.bin" if format == "cifar10" else "test.bin")
        if present and len(present) < len(CIFAR_TRAIN[format]):
            absent = sorted(set(CIFAR_TRAIN[format]) - {file.name for file in present})
            raise UserError(f"data.dir: {where} lacks {', '.join(absent)} of {format}")
        files = [test] if evaluation and test.is_file() else present or [test]
        if not files[0].is_file():
            raise UserError(f"data.dir: {where} has no {CIFAR_TRAIN[format][0]} or {test.name} of {format}")
    head = 1 if format == "cifar10" else 2  # label bytes of a record: CIFAR-100 has coarse, fine
    images, labels, names = [], [], []
    for file in files:
        raw = np.fromfile(file, np.uint8)
        if raw.size == 0 or raw.size % (head + 3072):
            raise UserError(f"data.dir: {file} is not {format} binary: {raw.size} bytes, records of {head + 3072}")
        raw = raw.reshape(-1, head + 3072)
        if raw[:, head - 1].max() >= classes:
            raise UserError(f"data.dir: {file} is not {format} binary: label {raw[:, head - 1].max()}")
        images.append(raw[:, head:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))  # N H W C
        labels.append(raw[:, head - 1])
        names += [f"{file.name} record {k}" for k in range(len(raw))]
    listed = files[0].parent / meta
    class_names = listed.read_text().split() if listed.is_file() else [str(k) for k in range(classes)]
    return ArraySource(np.concatenate(images), np.concatenate(labels), class_names, names)


def _open_mindrecord(where: Path) -> MindRecordSource:
    files = [where]
    if where.is_dir():
        files = [file for file in where.iterdir() if re.search(r"\.mindrecord\d*$", file.name)]
        files.sort(key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)])
        if not files:
            raise UserError(f"data.dir: {where} holds no MindRecord shards (*.mindrecord)")
        for file in files:
            named = re.search(r"^(.*-)(\d+)-of-(\d+)\.mindrecord$", file.name)
            numbered = re.search(r"^(.*\.mindrecord)(\d+)$", file.name)
            if named:
                stem, _, count = named.groups()
                wanted = [f"{stem}{k:05d}-of-{count}.mindrecord" for k in range(int(count))]
            elif numbered:
                wanted = [numbered[1] + str(k).zfill(len(numbered[2])) for k in range(int(numbered[2]))]
            else:
                continue
            absent = [name for name in wanted if not (where / name).is_file()]
            if absent:
                raise UserError(f"data.dir: {where} lacks the MindRecord shard {absent[0]}")
    listed = files[0].parent / "classes.txt"
    return MindRecordSource(files, listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else [])


def _places(file: Path, table: sqlite3.Connection) -> np.ndarray:
    """Where the images of a shard begin and end in it, int64 [n, 2]; none where they are not the only bytes of a row.

    A shard begins with the length of its header, 8 bytes, and the header, JSON. Pages of one size follow at
    `header_size`, and the index has the page of a row's bytes, and where in it they begin, with their length, and end.
    """
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(min(length, MOST_HEADER)))
            first, size, packed = (header[key] for key in ("header_size", "page_size", "compression_size"))
            alone = all(len(schema["blob_fields"]) == 1 for schema in header["schema"])
        except (ValueError, KeyError, TypeError):  # encrypted, damaged, or of another version
            return np.empty((0, 2), np.int64)
    if packed or not alone:
        return np.empty((0, 2), np.int64)
    columns = "page_id_blob, page_offset_blob, page_offset_blob_end"
    rows = table.execute(f"SELECT {columns} FROM indexes ORDER BY row_id").fetchall()
    page, begin, end = np.array(rows, np.int64).reshape(-1, 3).T
    start = first + size * page
    return np.stack([start + begin + 8, start + end], axis=1)


def _index_of(file: Path) -> sqlite3.Connection:
    """The index that lies beside a shard, opened for reading."""
    index = file.with_name(file.name + ".db")
    if not index.is_file():
        raise UserError(f"data.dir: {index}, the index of the MindRecord shard {file.name}, does not exist")
    table = sqlite3.connect(f"{index.absolute().as_uri()}?mode=ro", uri=True)
    try:
        recorded = table.execute("SELECT name FROM shard_name").fetchone()[0]
    except (sqlite3.DatabaseError, TypeError):
        raise UserError(f"data.dir: {index} is damaged, it is not the index of a MindRecord shard") from None
    if os.path.basename(recorded) != file.name:
        raise UserError(f"data.dir: {file} was written as {os.path.basename(recorded)}; shards cannot be renamed")
    return table

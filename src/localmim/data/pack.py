"""Packs a data set into MindRecord shards, and lists the images of one that cannot be read.

A MindRecord set is a folder: `images-00000-of-00004.mindrecord` ..., an index (`.db`) beside each, `classes.txt` when
there are labels. It is written under a hidden name beside its place and renamed when complete, so a set is there
as a whole or not at all. Image k of the set is the k-th readable image of the source.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from mindspore.mindrecord import FileWriter
from tqdm import tqdm

from localmim.data.pipeline import ordered_map
from localmim.data.sources import Source, UnreadableImage, decode, open_source
from localmim.errors import UserError

SCHEMA = {
    "image": {"type": "bytes"},
    "id": {"type": "int64"},
    "label": {"type": "int64"},
    "name": {"type": "string"},
}
ROWS_A_WRITE = 64


def pack(src: str, dst: str, shards: int = 4, short_side: int | None = None, quality: int = 95) -> list[str]:
    """Writes the images of a data set as MindRecord shards.

    Args:
        src: data set to pack, anything that `open_source` opens.
        dst: folder to write, not there yet.
        shards: number of shard files.
        short_side: larger images are shrunk to this many pixels on their short side, as JPEG; None: no image is.
            JPEG and PNG files that are not shrunk are stored byte for byte, other formats become PNG.
        quality: JPEG quality, 1 to 100.

    Returns:
        One line for each image that was left out: name and reason.

    Raises:
        UserError: `dst` exists, a number out of range, nothing to pack.
    """
    target = Path(dst).expanduser().absolute()
    if target.exists():
        raise UserError(f"--dst: {dst} exists; give a new name, nothing is overwritten")
    if not target.parent.is_dir():
        raise UserError(f"--dst: the folder {target.parent} does not exist")
    if short_side is not None and short_side < 1:
        raise UserError(f"--short-side is {short_side}, expected 1 or more pixels")
    if not 1 <= quality <= 100:
        raise UserError(f"--quality is {quality}, expected 1 to 100")
    source = open_source(src)
    if not 1 <= shards <= len(source):
        raise UserError(f"--shards is {shards}, expected 1 to {len(source)} (the number of images)")

    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    aside.mkdir()
    try:
        left_out = _write(source, aside, shards, short_side, quality)
        _sync(aside)
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # gone already when all went well
    return left_out


def _write(source: Source, folder: Path, shards: int, short_side: int | None, quality: int) -> list[str]:
    """Writes the shards, each a contiguous part of the source; returns what was left out."""

    def encode(job: tuple[int, Callable[[], np.ndarray]]) -> tuple[int, bytes | UnreadableImage]:
        sample, load = job
        try:
            return sample, _packed(load(), source.encoded, short_side, quality)
        except UnreadableImage as error:
            return sample, error

    left_out, written = [], 0
    with tqdm(total=len(source), desc="packing", unit="image") as bar:
        for shard in range(shards):
            part = range(shard * len(source) // shards, (shard + 1) * len(source) // shards)
            writer = FileWriter(str(folder / f"images-{shard:05d}-of-{shards:05d}.mindrecord"), shard_num=1)
            writer.add_schema(SCHEMA, "images")
            rows, before = [], written
            for sample, image in ordered_map(encode, source.loaders(part), os.cpu_count() or 1):
                bar.update()
                if isinstance(image, UnreadableImage):
                    left_out.append(f"{source.name(sample)}: {image}")
                    tqdm.write(f"left out: {left_out[-1]}")
                    continue
                rows.append({"image": image, "id": written, "label": source.label(sample), "name": source.name(sample)})
                written += 1
                if len(rows) == ROWS_A_WRITE:
                    writer.write_raw_data(rows)
                    rows = []
            if written == before:
                raise UserError(
                    f"--src: none of the {len(part)} images for shard {shard} can be read; nothing was written"
                )
            if rows:
                writer.write_raw_data(rows)
            writer.commit()
    if source.class_names:
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in source.class_names), encoding="utf-8")
    return left_out


def _packed(image: np.ndarray, encoded: bool, short_side: int | None, quality: int) -> bytes:
    """The bytes to store for bytes or an array as a source gives them."""
    pixels = decode(image, 3) if encoded else image  # H W 3; also shows that the file can be read
    shrink = 1.0 if short_side is None else short_side / min(pixels.shape[:2])
    if shrink < 1:
        size = [max(1, round(side * shrink)) for side in pixels.shape[:2]]
        pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA)
        return cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    if encoded and image[:3].tobytes() in (b"\xff\xd8\xff", b"\x89PN"):
        return image.tobytes()
    pixels = pixels if pixels.dtype == np.uint8 else np.rint(pixels * 255).astype(np.uint8)
    return cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()


def _sync(folder: Path) -> None:
    """Forces the files of a folder, and the folder, to disk."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def verify(dir: str, in_chans: int = 3) -> Iterator[str]:
    """Reads and decodes every image of a data set; yields a line, name and reason, for each that fails.

    Args:
        dir: as `data.dir`.
        in_chans: channels that the images must have.
    """
    source = open_source(dir, in_chans=in_chans)

    def check(job: tuple[int, Callable[[], np.ndarray]]) -> str | None:
        sample, load = job
        try:
            image = load()
            if source.encoded:
                decode(image, in_chans)
        except UnreadableImage as error:
            return f"{source.name(sample)}: {error}"
        return None

    jobs = ordered_map(check, source.loaders(range(len(source))), os.cpu_count() or 1)
    yield from filter(None, tqdm(jobs, total=len(source), desc="verifying", unit="image"))

"""Images a second from folder, MindRecord and memory, next to a Pillow pipeline of the same transforms.

    python benchmarks/data.py [--data-dir DIR] [--images 512] [--batch-size 64] [--workers 0] [--rounds 3]
                              [--augment]

Everything decodes, takes a random resized crop of 224 pixels (bicubic), mirrors, normalises and gives float32
[B, 3, 224, 224]. The ways take turns within each round, so a busy machine slows all of them. Pillow runs with the same
number of workers, once as threads and once as processes that hand batches over in shared memory; the faster one is
compared. `loader` is what people write instead, a DataLoader's processes with torchvision's transforms, one by one and
collated: crop, resize, mirror, to an array of floats in 0..1, normalise, stack. --augment adds the folder with what
fine-tuning does besides, RandAugment and random erasing (no Pillow counterpart). Without --data-dir the images are
drawn: smooth shapes and noise, JPEG of about 500x400. One JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import shared_memory
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SIZE = 224
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)


def draw_images(folder: Path, count: int) -> None:
    """Writes `count` JPEG files, photo-like in size (about 40 kB) and in how they compress."""
    for k in range(count):
        rng = np.random.default_rng(k)
        height, width = int(rng.integers(360, 441)), int(rng.integers(450, 551))
        image = np.zeros((height, width, 3), np.float32)
        for cells, strength in ((4, 110), (16, 50), (64, 18), (160, 7)):  # noise of ever finer grain
            noise = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
            image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        image = np.clip(image + 128, 0, 255).astype(np.uint8)
        for _ in range(12):
            centre = int(rng.integers(width)), int(rng.integers(height))
            axes = int(rng.integers(8, 90)), int(rng.integers(8, 90))
            colour = rng.integers(0, 256, 3).tolist()
            cv2.ellipse(image, centre, axes, float(rng.integers(180)), 0, 360, colour, -1, cv2.LINE_AA)
        cv2.imwrite(str(folder / f"{k:05d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 90])


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random part."""
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w, h = width, height
    return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h


def pillow_sample(path: str, rng: np.random.Generator, out: np.ndarray) -> None:
    """One image through Pillow and numpy into out, float32 [3, 224, 224]."""
    with open(path, "rb") as file:
        image = Image.open(io.BytesIO(file.read())).convert("RGB")
    left, top, w, h = random_box(*image.size, rng)
    image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(image).astype(np.float32)  # H W C
    pixels -= MEAN * 255
    pixels /= STD * 255
    out[:] = pixels.transpose(2, 0, 1)


def pillow_batch(paths: list[str], seed: int, out: np.ndarray) -> None:
    rng = np.random.default_rng(seed)
    for path, slot in zip(paths, out):
        pillow_sample(path, rng, slot)


def loader_sample(path: str, rng: np.random.Generator) -> np.ndarray:
    """One image as RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize make it, in numpy."""
    with open(path, "rb") as file:
        image = Image.open(file).convert("RGB")
    left, top, w, h = random_box(*image.size, rng)
    image = image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.ascontiguousarray(np.array(image).transpose(2, 0, 1)).astype(np.float32) / np.float32(255)
    return (pixels - MEAN[:, None, None]) / STD[:, None, None]


def loader_batch(paths: list[str], seed: int, out: np.ndarray) -> None:
    rng = np.random.default_rng(seed)
    np.stack([loader_sample(path, rng) for path in paths], out=out)


FILLS = {"processes": pillow_batch, "loader": loader_batch}


def batches_of(paths: list[str], size: int) -> list[list[str]]:
    return [paths[k : k + size] for k in range(0, len(paths) - size + 1, size)]


class PillowThreads:
    """Threads, each a part of the batch."""

    name = "threads"

    def __init__(self, workers: int, batch_size: int):
        self.pool, self.workers, self.size = ThreadPoolExecutor(workers), workers, batch_size

    def epoch(self, paths: list[str], seed: int) -> Iterator[np.ndarray]:
        for k, batch in enumerate(batches_of(paths, self.size)):
            images = np.empty((self.size, 3, SIZE, SIZE), np.float32)
            parts = range(self.workers)
            jobs = [
                self.pool.submit(pillow_batch, batch[p :: self.workers], seed + k * 64 + p, images[p :: self.workers])
                for p in parts
            ]
            for job in jobs:
                job.result()
            yield images

    def close(self) -> None:
        self.pool.shutdown()


def _fill(job: tuple[str, str, int, list[str], int]) -> int:
    """In a worker process: one batch into slot `slot` of the shared memory."""
    way, name, slot, paths, seed = job
    if name not in _attached:
        _attached[name] = shared_memory.SharedMemory(name=name)
    shape = (len(paths), 3, SIZE, SIZE)
    out = np.ndarray(shape, np.float32, _attached[name].buf, offset=slot * int(np.prod(shape)) * 4)
    FILLS[way](paths, seed, out)
    return slot


_attached: dict[str, shared_memory.SharedMemory] = {}


class PillowProcesses:
    """Processes, each a batch of its own, written into shared memory; two batches a process are under way."""

    def __init__(self, workers: int, batch_size: int, name: str = "processes"):
        self.name = name
        self.slots, self.size = 2 * workers, batch_size
        self.memory = shared_memory.SharedMemory(create=True, size=self.slots * batch_size * 3 * SIZE * SIZE * 4)
        self.pool = multiprocessing.get_context("spawn").Pool(workers)

    def epoch(self, paths: list[str], seed: int) -> Iterator[np.ndarray]:
        shape = (self.slots, self.size, 3, SIZE, SIZE)
        images = np.ndarray(shape, np.float32, self.memory.buf)
        running = []
        for k, batch in enumerate(batches_of(paths, self.size)):
            if len(running) == self.slots:
                yield images[running.pop(0).get()]
            running.append(
                self.pool.apply_async(_fill, ((self.name, self.memory.name, k % self.slots, batch, seed + k),))
            )
        for job in running:
            yield images[job.get()]

    def close(self) -> None:
        self.pool.terminate()
        self.pool.join()
        self.memory.close()
        self.memory.unlink()


def rate(epoch: Callable[[], Iterator], batch_size: int) -> float:
    """Images a second of one pass, looking at a value of each batch so that none is skipped."""
    begin, images, seen = time.perf_counter(), 0, 0.0
    for batch in epoch():
        pixels = batch if isinstance(batch, np.ndarray) else batch.images
        seen += float(pixels[0, 0, 0, 0])
        images += batch_size
    if not math.isfinite(seen):
        raise RuntimeError("a batch holds values that are not finite")
    return images / (time.perf_counter() - begin)


def main() -> None:
    # here, not above: the Pillow processes import this file and need none of it
    from localmim.config import DataConfig
    from localmim.data import ArraySource, TrainPipeline, open_source
    from localmim.data.pack import pack
    from localmim.data.pipeline import resolve_workers
    from localmim.data.sources import decode
    from localmim.errors import UserError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of JPEG files; default: images drawn for this run")
    parser.add_argument("--images", type=int, default=512, help="images to draw, or to take of --data-dir")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="0: one a core, at most 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--augment", action="store_true", help="also with RandAugment m9-mstd0.5-inc1, erase 0.25")
    options = parser.parse_args()

    try:
        workers = resolve_workers(options.workers)
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary) / "images"
            root.mkdir()
            if options.data_dir:
                given = open_source(options.data_dir, "folder")
                for k in range(min(options.images, len(given))):
                    source = Path(options.data_dir, given.name(k)).absolute()
                    (root / f"{k:05d}{source.suffix}").symlink_to(source)
            else:
                draw_images(root, options.images)
            pack(str(root), str(Path(temporary) / "records"), shards=2)
            folder = open_source(str(root))
            sources = {
                "folder": folder,
                "mindrecord": open_source(str(Path(temporary) / "records")),
                "memory": ArraySource([decode(folder[i], 3) for i in range(len(folder))]),
            }
            config = DataConfig(workers=workers, crop_scale=SCALE, crop_ratio=RATIO)
            size = options.batch_size
            ways = {
                name: TrainPipeline(source, config, (SIZE, SIZE), 3, size, seed=0).epoch
                for name, source in sources.items()
            }
            if options.augment:
                augmented = dataclasses.replace(config, rand_augment="m9-mstd0.5-inc1", erase=0.25)
                ways["augmented"] = TrainPipeline(folder, augmented, (SIZE, SIZE), 3, size, seed=0).epoch
            paths = [str(root / folder.name(i)) for i in range(len(folder))]
            peers = [PillowThreads(workers, size), PillowProcesses(workers, size)]
            loader = PillowProcesses(workers, size, "loader")
            ways["loader"] = lambda epoch: loader.epoch(paths, epoch)
            for peer in peers:
                ways[f"pillow_{peer.name}"] = lambda epoch, peer=peer: peer.epoch(paths, epoch)
            try:
                rates: dict[str, list[float]] = {name: [] for name in ways}
                for turn in range(options.rounds + 1):  # the first one warms up
                    for name, epoch in ways.items():
                        measured = rate(lambda epoch=epoch, turn=turn: epoch(turn), size)
                        if turn:
                            rates[name].append(measured)
            finally:
                for peer in [*peers, loader]:
                    peer.close()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    median = {name: statistics.median(values) for name, values in rates.items()}
    best = max((peer.name for peer in peers), key=lambda name: median[f"pillow_{name}"])
    pillow = median[f"pillow_{best}"]
    result = {f"{name}_images_per_s": round(value, 1) for name, value in median.items()}
    result.update(pillow_images_per_s=round(pillow, 1), pillow_workers_are=best, workers=workers, cores=os.cpu_count())
    result.update(images=len(paths), batch_size=size, rounds=options.rounds)
    result.update({f"{name}_vs_pillow": round(median[name] / pillow, 2) for name in sources})
    result.update({f"{name}_vs_loader": round(median[name] / median["loader"], 2) for name in sources})
    print(json.dumps(result))


if __name__ == "__main__":
    main()

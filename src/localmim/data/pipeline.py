"""Batches of augmented images, the same ones every time: an image is a function of (seed, epoch, its number) alone.

The order of an epoch is a numpy permutation of (seed, epoch), and crops, mirrors, RandAugment and random erasing take
their numbers from `generator`. So the number of threads, the size of a batch, the number of devices and the step that
a run goes on from change nothing: step s over all ranks is always the same images with the same pixels.

Threads of ours each read, decode (OpenCV), crop, resize (`localmim.data.resize`) and normalise an image straight into
its place in a batch, all of it outside Python's lock; they are one batch ahead of the training step.

The place of an image that cannot be read is given to the one that stands there one step later in the permutation, or
two, ..., from the start again after the end. That too depends on the permutation and the files alone, so a run that
goes on needs to remember nothing to get equal batches; what was found is kept only to be named once and counted.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import cv2
import numpy as np

from localmim.config import DataConfig
from localmim.data.augment import (
    CROP,
    ERASE,
    INTERPOLATION,
    RAND_AUGMENT,
    RandAugment,
    RandomCrop,
    RandomErasing,
    generator,
    parse_policy,
)
from localmim.data.resize import normalise, resize, resized_lines, to_image, to_lines
from localmim.data.sources import Source, UnreadableImage, decode
from localmim.errors import UserError
from localmim.worker import LOCAL_DEVICES

log = logging.getLogger("localmim.data")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
EVAL_MARGIN = 256 / 224  # short side after resizing, in units of the crop
UNUSED = 3  # references to an array of `Memory`: its list's, the loop's and the count's own
MOST_STAND_INS = 64  # images that are looked at together for one place

Rows = tuple[np.ndarray, np.ndarray]  # images float32 [n, C, H, W], sample numbers int32 [n]


class Batch(NamedTuple):
    """images float32 [B, C, H, W], normalised; ids int32 [B], numbers in the source; labels int32 [B], -1: none."""

    images: np.ndarray
    ids: np.ndarray
    labels: np.ndarray


def resolve_workers(workers: int) -> int:
    """`data.workers` as a number of threads. UserError when there are not as many cores."""
    cores = os.cpu_count() or 1
    if not 0 <= workers <= cores:
        raise UserError(f"data.workers is {workers}, expected 0 (choose) to {cores} (the cores of this machine)")
    ours = len(os.sched_getaffinity(0)) // int(
        os.environ.get(LOCAL_DEVICES, "1")
    )  # of this process, in a container too
    return workers or max(1, min(ours, 8))


def resolve_mean_std(config: DataConfig, in_chans: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each channel for pixels in [0, 1], float32 [C] both."""
    resolved = []
    for key, given, imagenet in (("mean", config.mean, IMAGENET_MEAN), ("std", config.std, IMAGENET_STD)):
        values = given if given is not None else imagenet if in_chans == 3 else [0.5] * in_chans
        if len(values) != in_chans:
            raise UserError(f"data.{key} has {len(values)} values, but images have {in_chans} channels")
        resolved.append(np.asarray(values, np.float32))
    if (resolved[1] <= 0).any():
        raise UserError(f"data.std is {config.std}, every value must be above 0")
    return resolved[0], resolved[1]


class BadImages:
    """Names each unreadable image once and stops the run when they are too many.

    Args:
        source: where the images come from.
        max_share: `data.max_bad_share`.
        total: number of images that the share is taken of.
    """

    def __init__(self, source: Source, max_share: float, total: int):
        self.source, self.max_share, self.total = source, max_share, total
        self.ids: set[int] = set()

    def add(self, sample: int, reason: str, instead: str) -> None:
        """Logs image `sample` if it is new. UserError past the share."""
        if sample in self.ids:
            return
        self.ids.add(sample)
        log.warning("data: cannot read %s: %s; %s", self.source.name(sample), reason, instead)
        self.check()

    def merge(self, ids: set[int]) -> None:
        """Takes over what all devices have found together."""
        self.ids |= ids

    def check(self) -> None:
        """UserError past the share."""
        if len(self.ids) > self.max_share * self.total:
            first = sorted(self.ids)[:10]
            names = ", ".join(self.source.name(i) for i in first) + (", …" if len(self.ids) > len(first) else "")
            raise UserError(
                f"data.dir: {len(self.ids)} of {self.total} images cannot be read, more than "
                f"data.max_bad_share={self.max_share:g} ('python -m localmim.data verify' names them all): {names}"
            )


class Memory:
    """Arrays in memory that is used again when nobody holds them any more: the system zeroes what it newly gives.

    For one thread.
    """

    MOST = 4  # of them that are kept

    def __init__(self):
        self.kept: list[np.ndarray] = []

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32, of any values."""
        for own in self.kept:
            if own.shape == shape and sys.getrefcount(own) == UNUSED:
                return own[:]  # every view of a view holds `own` itself
        self.kept = [*self.kept[1 - self.MOST :], np.empty(shape, np.float32)]
        return self.kept[-1][:]


class TrainPipeline:
    """Random crops for training, with RandAugment and random erasing where the recipe asks for them.

    Args:
        source: the images.
        config: `data` of the recipe.
        image_size: (height, width) of the crops, pixels.
        in_chans: channels C.
        batch_size: images of one step on this rank.
        seed: of the order and of all that is random.
        rank, world: rank r of `world` takes the r-th part of a step's images.
        step_images: images of the permutation that belong to a step, None: world x batch_size. With more, the last ones
            are left out: a run that goes on with fewer images a step keeps its numbering of steps.

    Raises:
        UserError: fewer images than a step needs, or a value of `config` that cannot be used.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        image_size: tuple[int, int],
        in_chans: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        step_images: int | None = None,
    ):
        needed = world * batch_size
        self.step_images = needed if step_images is None else step_images
        if self.step_images < needed:
            raise UserError(f"a step has {self.step_images} images, fewer than {world} x batch_size {batch_size}")
        if len(source) < self.step_images:
            each = f", {len(source) // world} for each of {world} devices" if world > 1 else ""
            size = f"batch_size {batch_size}" if self.step_images == needed else f"the {self.step_images} of a step"
            raise UserError(f"data.dir has {len(source)} images{each}, fewer than {size}")
        low, high = config.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"data.crop_scale is {config.crop_scale}, expected 0 < low <= high <= 1")
        if not 0 < config.crop_ratio[0] <= config.crop_ratio[1]:
            raise UserError(f"data.crop_ratio is {config.crop_ratio}, expected 0 < low <= high")
        if not 0 <= config.hflip <= 1:
            raise UserError(f"data.hflip is {config.hflip}, expected 0 to 1")
        policy = parse_policy(config.rand_augment) if config.rand_augment else None
        if policy and in_chans != 3:
            raise UserError(f"data.rand_augment needs colour images, but model.in_chans is {in_chans}")
        self.source, self.config, self.image_size, self.in_chans = source, config, tuple(image_size), in_chans
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.workers = resolve_workers(config.workers)
        self.mean, self.std = resolve_mean_std(config, in_chans)
        self.shift, self.scale = self.mean * 255, 1 / (self.std * np.float32(255))
        self.crop = RandomCrop(config.crop_scale, config.crop_ratio, config.hflip)
        self.erase = RandomErasing(config.erase) if config.erase else None
        self.rand_augment = None
        if policy:
            self.rand_augment = RandAugment(policy, np.rint(self.mean * 255).astype(int).tolist(), config.interpolation)
        self.steps_per_epoch = len(source) // self.step_images
        self.bad = BadImages(source, config.max_bad_share, len(source))

    @cached_property
    def fingerprint(self) -> str:
        """The source's, worked out once."""
        return self.source.fingerprint()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, ready for JSON. The position (epoch, step) is the caller's."""
        return {"bad": sorted(self.bad.ids), "fingerprint": self.fingerprint}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave. UserError when the data set is another one."""
        if state["fingerprint"] != self.fingerprint:
            raise UserError("data.dir: not the data set that the run began with (names, labels or sizes differ)")
        self.bad.ids = set(state["bad"])

    def order(self, epoch: int) -> np.ndarray:
        """All images in the order of an epoch, int32 [N]: step s has those from s x step_images on."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.source)).astype(np.int32)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, start_step + 1, ... of an epoch; those of `epoch(epoch)`, bit for bit.

        Raises:
            UserError: more unreadable images than `data.max_bad_share`.
        """
        with closing(self._batches(epoch, start_step)) as batches, closing(one_ahead(batches)) as ahead:
            for batch, unreadable in ahead:
                for sample, reason in unreadable:  # now, not when it is found: that is one batch ahead, more or less
                    self.bad.add(sample, reason, "another image takes its place")
                yield batch

    def _batches(self, epoch: int, start_step: int) -> Generator[tuple[Batch, list[tuple[int, str]]], None, None]:
        """Batches, and what could not be read on the way to each: numbers and reasons."""
        order = self.order(epoch)
        steps = np.arange(start_step, self.steps_per_epoch)[:, None] * self.step_images
        places = steps + self.rank * self.batch_size + np.arange(self.batch_size)  # [steps, B], in order
        with closing(self._read(order[places.ravel()], epoch)) as read:
            for own, (images, ids, missing) in zip(places, read):
                found = [(int(ids[slot]), reason) for slot, reason in missing.items()]
                if missing:
                    self._stand_in(images, ids, {slot: int(own[slot]) for slot in missing}, order, epoch, found)
                yield Batch(images, ids, self.source.labels[ids]), found

    def _stand_in(
        self,
        images: np.ndarray,
        ids: np.ndarray,
        places: dict[int, int],
        order: np.ndarray,
        epoch: int,
        found: list[tuple[int, str]],
    ) -> None:
        """Fills the slots of a batch whose images cannot be read; `places` says where in `order` these stand."""
        queues = {slot: self._followers(order, place) for slot, place in places.items()}
        number = 1
        while queues:
            looked_at = {slot: list(islice(queue, number)) for slot, queue in queues.items()}
            if not all(looked_at.values()):
                raise UserError(f"data.dir: none of {len(order)} images can be read")
            readable = {}
            rows = np.array(sorted(set().union(*looked_at.values())), np.int32)
            for batch, numbers in self._rows(rows, epoch, found):
                readable.update(zip(numbers.tolist(), batch))
            for slot, samples in looked_at.items():
                for sample in samples:
                    if sample in readable:
                        images[slot], ids[slot] = readable[sample], sample
                        del queues[slot]
                        break
            number = min(2 * number, MOST_STAND_INS)

    def _followers(self, order: np.ndarray, place: int) -> Iterator[int]:
        """What may stand in for order[place]: the images at its place in later steps, then the next place's, ..."""
        step, column = divmod(place, self.step_images)
        for offset in range(self.step_images):
            images = order[(column + offset) % self.step_images :: self.step_images]
            yield from np.roll(images, -step - 1).tolist()

    def _rows(self, rows: np.ndarray, epoch: int, found: list[tuple[int, str]]) -> Iterator[Rows]:
        """Augmented images of `rows` and their numbers, in order; the unreadable ones go to `found` instead."""
        with closing(self._read(rows, epoch)) as read:
            for images, ids, missing in read:
                found += [(int(ids[slot]), reason) for slot, reason in missing.items()]
                kept = [slot for slot in range(len(ids)) if slot not in missing]
                yield (images[kept], ids[kept]) if missing else (images, ids)

    def _read(
        self, rows: np.ndarray, epoch: int
    ) -> Generator[tuple[np.ndarray, np.ndarray, dict[int, str]], None, None]:
        """The images `rows` in order, augmented, a batch at a time; the last one may be short.

        Yields float32 [n, C, H, W], the numbers int32 [n], and the places of those that cannot be read, with reasons.
        """
        parts = [rows[first : first + self.batch_size].copy() for first in range(0, len(rows), self.batch_size)]
        memory = Memory()

        def jobs() -> Iterator[tuple[np.ndarray, np.ndarray, int, Callable[[], np.ndarray]]]:
            loaders = self.source.loaders(rows)
            for part in parts:
                images = memory.array((len(part), self.in_chans, *self.image_size))
                for image in images:
                    yield images, image, *next(loaders)

        def make(job: tuple[np.ndarray, np.ndarray, int, Callable[[], np.ndarray]]) -> tuple[np.ndarray, str | None]:
            images, image, sample, load = job
            try:
                self._make(load(), sample, epoch, image)
            except UnreadableImage as error:
                return images, str(error)
            return images, None

        with closing(ordered_map(make, jobs(), self.workers)) as made:
            for part in parts:
                done = list(islice(made, len(part)))
                missing = {slot: reason for slot, (_, reason) in enumerate(done) if reason is not None}
                yield done[0][0], part, missing

    def _make(self, stored: np.ndarray, sample: int, epoch: int, image: np.ndarray) -> None:
        """Makes `image`, float32 [C, H, W], of what the source holds. UnreadableImage when it cannot be decoded."""
        whole = decode(stored, 3) if self.source.encoded else stored
        lines = self._resized(*self.crop.part(whole, generator(self.seed, epoch, sample, CROP)))
        if self.rand_augment:
            lines = to_lines(self.rand_augment(to_image(lines), generator(self.seed, epoch, sample, RAND_AUGMENT)))
        if self.source.encoded and self.in_chans == 1:
            lines = cv2.cvtColor(to_image(lines), cv2.COLOR_RGB2GRAY)[:, None]
        normalise(lines, self.shift, self.scale, image)
        if self.erase:
            erased = self.erase(image, generator(self.seed, epoch, sample, ERASE))
            if erased is not image:
                image[:] = erased

    def _resized(self, part: np.ndarray, mirrored: bool) -> np.ndarray:
        """A crop (h, w, C) as lines [H, C, W] of values 0..255, uint8 or float32."""
        if part.dtype == np.uint8 and self.config.interpolation == "bicubic":
            return resized_lines(part, self.image_size, mirrored)
        part = part[:, ::-1] if mirrored else part
        part = np.ascontiguousarray(part) if part.dtype == np.uint8 else part * np.float32(255)
        pixels = cv2.resize(part, self.image_size[::-1], interpolation=INTERPOLATION[self.config.interpolation])
        return to_lines(pixels)


def eval_batches(
    source: Source,
    config: DataConfig,
    image_size: tuple[int, int],
    in_chans: int,
    batch_size: int,
    samples: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every image (or those of `samples`) once, in order: resize, centre crop, normalise.

    The last batch may be short.

    The image is scaled so that it just covers 256/224 of the crop in both directions, the longer side cut off to whole
    pixels, as torchvision and timm do; one that has exactly the crop's size already is taken as it is. Unreadable
    images are named in the log and left out of the batches.

    Args:
        source, config: where images come from; `data` of the recipe.
        image_size: (height, width) of the crop, pixels.
        in_chans: channels C.
        batch_size: images a batch.
        samples: numbers of the images wanted; None: all.

    Raises:
        UserError: more unreadable images than `data.max_bad_share`.
    """
    samples = range(len(source)) if samples is None else [int(i) for i in samples]
    mean, std = resolve_mean_std(config, in_chans)
    workers = resolve_workers(config.workers)
    bad = BadImages(source, config.max_bad_share, len(source))

    def prepare(job: tuple[int, Callable[[], np.ndarray]]) -> tuple[int, np.ndarray | UnreadableImage]:
        sample, load = job
        try:
            image = load()
            image = decode(image, in_chans) if source.encoded else image
        except UnreadableImage as error:
            return sample, error
        image = _centre_crop(image, *image_size)
        image = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
        return sample, ((image - mean) / std).transpose(2, 0, 1)  # C H W

    kept: list[tuple[int, np.ndarray]] = []

    def batch() -> Batch:
        ids = np.asarray([sample for sample, _ in kept], np.int32)
        return Batch(np.stack([image for _, image in kept]).astype(np.float32), ids, source.labels[ids])

    for sample, image in ordered_map(prepare, source.loaders(samples), workers):
        if isinstance(image, UnreadableImage):
            bad.add(sample, str(image), "it is left out")
            continue
        kept.append((sample, image))
        if len(kept) == batch_size:
            yield batch()
            kept.clear()
    if kept:
        yield batch()


def _centre_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, C) to the middle (height, width, C) after scaling to cover EVAL_MARGIN of it."""
    if image.shape[:2] == (height, width):
        return image
    scale = max(EVAL_MARGIN * height / image.shape[0], EVAL_MARGIN * width / image.shape[1])
    size = [max(low, int(side * scale + 1e-6)) for side, low in zip(image.shape[:2], (height, width))]
    image = resize(image, (size[0], size[1]))
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    return image[top : top + height, left : left + width]


def ordered_map(call: Callable, items: Iterable, threads: int) -> Iterator:
    """`map` in threads: results in order, at most four items a thread read ahead."""
    with ThreadPoolExecutor(threads) as pool:
        running: deque = deque()
        for item in items:
            running.append(pool.submit(call, item))
            if len(running) >= 4 * threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def one_ahead(items: Iterator) -> Iterator:
    """The same items; while one is in use, a thread makes the next."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item

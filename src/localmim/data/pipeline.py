"""Batches of augmented images, the same ones every time: a pure function of (seed, epoch, rank, worker count, files).

The order of an epoch is a numpy permutation of (seed, epoch). Crops and mirrors are drawn inside MindData's C++ ops,
whose random streams start when a pipeline is built; so an epoch is cut into segments of `data.segment_steps` steps,
each a pipeline of its own with its own seed. To start in the middle of an epoch, the segment that holds the step is
built and its first steps are thrown away.

An image that cannot be decoded is skipped by MindData in order (`ErrorSamplesMode.SKIP`): the rest of its segment
moves up by one, and the end is filled with the images that follow in the permutation, from its start again after its
end. That happens the same way each time, so a resumed run needs to remember nothing to get equal batches; what was
found is kept only to be named once and counted. RandAugment and random erasing are Python maps, whose random numbers
follow from (seed, epoch, sample) alone. Building a pipeline sets MindData's global seed (and with it numpy's
legacy one) and its global error mode.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import mindspore.dataset as ds
import numpy as np
from mindspore.dataset import vision

from localmim.config import DataConfig
from localmim.data.augment import ERASE, RAND_AUGMENT, RandAugment, RandomErasing, generator, parse_policy
from localmim.data.sources import Source, UnreadableImage, decode
from localmim.errors import UserError

log = logging.getLogger("localmim.data")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PILLOW = vision.Inter.PILCUBIC  # Pillow's antialiased bicubic, which MindData has for 8 bit RGB alone
INTERPOLATION = {"bicubic": vision.Inter.BICUBIC, "bilinear": vision.Inter.BILINEAR}
EVAL_MARGIN = 256 / 224  # short side after resizing, in units of the crop

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
    return workers or min(cores, 8)


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

    def add(self, sample: int, in_chans: int, instead: str) -> None:
        """Logs image `sample` if it is new. UserError past the share."""
        if sample in self.ids:
            return
        self.ids.add(sample)
        reason = unreadable_reason(self.source, sample, in_chans) or "MindData's decoder refuses it"
        log.warning("data: cannot read %s: %s; %s", self.source.name(sample), reason, instead)
        if len(self.ids) > self.max_share * self.total:
            first = sorted(self.ids)[:10]
            names = ", ".join(self.source.name(i) for i in first) + (", …" if len(self.ids) > len(first) else "")
            raise UserError(
                f"data.dir: {len(self.ids)} of {self.total} images cannot be read, more than "
                f"data.max_bad_share={self.max_share:g} ('python -m localmim.data verify' names them all): {names}"
            )


def unreadable_reason(source: Source, sample: int, in_chans: int = 3) -> str | None:
    """Why an image cannot be read or decoded; None when it can."""
    try:
        image = source[sample]
        if source.encoded:
            decode(image, in_chans)
    except UnreadableImage as error:
        return str(error)
    return None


class PerSample:
    """A MindData op over (image, sample) that gives `call` the image and random numbers of its own.

    The first error is kept and the images stay as they are from then on: MindData would leave out the image of an op
    that raises. Who takes the batches raises `error`.
    """

    def __init__(self, call: Callable, seed: int, epoch: int, purpose: int):
        self.call, self.seed, self.epoch, self.purpose = call, seed, epoch, purpose
        self.error: Exception | None = None

    def __call__(self, image: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.error is None:
            try:
                image = self.call(image, generator(self.seed, self.epoch, int(sample), self.purpose))
            except Exception as error:
                self.error = error
        return image, sample


class TrainPipeline:
    """Random crops for training, with RandAugment and random erasing where the recipe asks for them.

    Args:
        source: the images.
        config: `data` of the recipe.
        image_size: (height, width) of the crops, pixels.
        in_chans: channels C.
        batch_size: images a batch on this rank.
        seed, rank, world: rank r of `world` gets every world-th image of the permutation, from the r-th on.

    Raises:
        UserError: fewer images than a batch needs, or a value of `config` that cannot be used.
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
    ):
        share = len(source) // world
        if share < batch_size:
            each = f", {share} for each of {world} devices" if world > 1 else ""
            raise UserError(f"data.dir has {len(source)} images{each}, fewer than batch_size {batch_size}")
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
        if config.segment_steps < 1:
            raise UserError(f"data.segment_steps is {config.segment_steps}, expected 1 or more")
        self.source, self.config, self.image_size, self.in_chans = source, config, tuple(image_size), in_chans
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.workers = resolve_workers(config.workers)
        self.mean, self.std = resolve_mean_std(config, in_chans)
        self.erase = RandomErasing(config.erase) if config.erase else None
        self.rand_augment = None
        if policy:
            self.rand_augment = RandAugment(policy, np.rint(self.mean * 255).astype(int).tolist(), config.interpolation)
        self.steps_per_epoch = share // batch_size
        self.bad = BadImages(source, config.max_bad_share, share)

    @cached_property
    def fingerprint(self) -> str:
        """The source's, worked out once."""
        return self.source.fingerprint()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, ready for JSON. The position (epoch, step) is the caller's."""
        return {"bad": sorted(self.bad.ids), "workers": self.workers, "fingerprint": self.fingerprint}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave. UserError when the data set is another one."""
        if state["fingerprint"] != self.fingerprint:
            raise UserError("data.dir: not the data set that the run began with (names, labels or sizes differ)")
        self.bad.ids = set(state["bad"])
        if state["workers"] != self.workers:
            if state["workers"] <= (os.cpu_count() or 1):
                self.workers = state["workers"]
            else:
                log.warning(
                    "data: the run began with %d workers, this machine has %d cores: crops will not be the same ones",
                    state["workers"],
                    os.cpu_count(),
                )

    def order(self, epoch: int) -> np.ndarray:
        """This rank's images in the order of an epoch, int32 [N // world]."""
        permutation = np.random.default_rng([self.seed, epoch]).permutation(len(self.source)).astype(np.int32)
        return permutation[: len(permutation) // self.world * self.world][self.rank :: self.world]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, start_step + 1, ... of an epoch; those of `epoch(epoch)`, bit for bit.

        Raises:
            UserError: more unreadable images than `data.max_bad_share`.
        """
        order = self.order(epoch)
        length = self.config.segment_steps
        for segment in range(start_step // length, math.ceil(self.steps_per_epoch / length)):
            first = segment * length
            steps = min(length, self.steps_per_epoch - first)
            for step, (images, ids) in enumerate(self._segment(order, epoch, segment, steps), first):
                if step >= start_step:
                    yield Batch(images, ids, self.source.labels[ids])

    def _segment(self, order: np.ndarray, epoch: int, segment: int, steps: int) -> Iterator[Rows]:
        """The batches of one segment. A second, third, ... pipeline fills it up when images were skipped."""
        begin = segment * self.config.segment_steps * self.batch_size
        queue = np.roll(order, -begin)  # this segment's images, then those that may stand in for unreadable ones
        missing = steps * self.batch_size
        readable: list[np.ndarray] = []  # sample numbers
        rest = np.empty(0, np.float32), np.empty(0, np.int32)  # rows that do not fill a batch yet
        attempt = 0
        while missing:
            if not len(queue):  # the segment is all of the epoch: its own images once more
                queue = np.unique(np.concatenate(readable)) if readable else queue
            if not len(queue):
                raise UserError(f"data.dir: none of {len(order)} images can be read")
            rows, queue = queue[:missing], queue[missing:]
            stream = np.random.SeedSequence([self.seed, epoch, segment, self.rank, attempt])
            for images, ids in self._rows(rows, int(stream.generate_state(1)[0]), epoch):
                missing -= len(ids)
                readable.append(ids)
                if len(rest[1]):
                    images, ids = (np.concatenate(pair) for pair in zip(rest, (images, ids)))
                while len(ids) >= self.batch_size:
                    yield images[: self.batch_size], ids[: self.batch_size]
                    images, ids = images[self.batch_size :], ids[self.batch_size :]
                rest = images, ids
            attempt += 1

    def _rows(self, rows: np.ndarray, seed: int, epoch: int = 0) -> Iterator[Rows]:
        """Augmented images of `rows` and their numbers, in order and without the unreadable ones."""
        ds.config.set_error_samples_mode(ds.config.ErrorSamplesMode.SKIP)  # read while running: stays set
        ds.config.set_seed(seed)  # read when the iterator is made
        dataset, maps = self.source.dataset(rows, self.workers), self._maps(epoch)
        for op in maps:
            columns = ["image", "sample"] if isinstance(op, PerSample) else ["image"]
            dataset = dataset.map(op, columns, columns, num_parallel_workers=self.workers)
        batches = dataset.batch(self.batch_size, num_parallel_workers=1)
        iterator = batches.create_tuple_iterator(num_epochs=1, output_numpy=True)
        place = 0  # in rows: the next one that is expected
        try:
            for images, ids in iterator:
                for op in maps:
                    if isinstance(op, PerSample) and op.error:
                        raise op.error
                end = place + 1 + int(np.flatnonzero(rows[place:] == ids[-1])[0])
                self._report(np.setdiff1d(rows[place:end], ids))
                place = end
                yield images.reshape(len(ids), self.in_chans, *self.image_size), ids
            self._report(rows[place:])
        finally:
            iterator.stop()

    def _report(self, skipped: np.ndarray) -> None:
        for sample in skipped:
            self.bad.add(int(sample), self.in_chans, "another image takes its place")

    def _maps(self, epoch: int) -> list[list | PerSample]:
        """Bytes or (H, W, C) to normalised float32 (C, H, W), or (H, W) for encoded grey images: map after map."""
        crop_op = vision.RandomCropDecodeResize if self.source.encoded else vision.RandomResizedCrop
        scale, ratio = tuple(self.config.crop_scale), tuple(self.config.crop_ratio)
        pillow = self.config.interpolation == "bicubic" and self.source.eight_bit_rgb
        crop = [crop_op(self.image_size, scale, ratio, PILLOW if pillow else INTERPOLATION[self.config.interpolation])]
        if self.config.hflip:
            crop.append(vision.RandomHorizontalFlip(self.config.hflip))
        if self.source.encoded and self.in_chans == 1:
            crop.append(vision.ConvertColor(vision.ConvertMode.COLOR_RGB2GRAY))
        normalise = [vision.Normalize((self.mean * 255).tolist(), (self.std * 255).tolist()), vision.HWC2CHW()]
        maps: list[list | PerSample] = [[*crop, *normalise]]
        if self.rand_augment:
            maps = [crop, PerSample(self.rand_augment, self.seed, epoch, RAND_AUGMENT), normalise]
        if self.erase:
            maps.append(PerSample(self.erase, self.seed, epoch, ERASE))
        return maps


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

    def prepare(job: tuple[int, Callable[[], np.ndarray]]) -> tuple[int, np.ndarray | None]:
        sample, load = job
        try:
            image = load()
            image = decode(image, in_chans) if source.encoded else image
        except UnreadableImage:
            return sample, None
        image = _centre_crop(image, *image_size)
        image = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
        return sample, ((image - mean) / std).transpose(2, 0, 1)  # C H W

    kept: list[tuple[int, np.ndarray]] = []

    def batch() -> Batch:
        ids = np.asarray([sample for sample, _ in kept], np.int32)
        return Batch(np.stack([image for _, image in kept]).astype(np.float32), ids, source.labels[ids])

    for sample, image in ordered_map(prepare, source.loaders(samples), workers):
        if image is None:
            bad.add(sample, in_chans, "it is left out")
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


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, C) -> (*size, C) as Pillow's bicubic, which shrinks with antialiasing; 8 bit to the bit, or float.

    Rows first, then columns, as Pillow had it in the authors' time; today it begins with the side that shrinks more.
    """
    H, W, C = image.shape
    if image.dtype != np.uint8:
        rows = np.tensordot(bicubic_weights(H, size[0]), image, 1)  # [h, W, C]
        return np.tensordot(bicubic_weights(W, size[1]), rows, (1, 1)).transpose(1, 0, 2)  # [w, h, C] -> [h, w, C]
    threes = [np.minimum(np.arange(i, i + 3), C - 1) for i in range(0, C, 3)]
    parts = [vision.Resize(size, PILLOW)(np.ascontiguousarray(image[..., three])) for three in threes]
    return np.concatenate(parts, axis=2)[..., :C]


@lru_cache(maxsize=256)
def bicubic_weights(before: int, after: int) -> np.ndarray:
    """What each of `before` pixels in a row gives to each of `after`, float32 [after, before]; a = -0.5."""
    step = before / after
    wide = max(step, 1.0)  # the kernel grows when the image shrinks
    x = np.abs((np.arange(before) + 0.5) - (np.arange(after)[:, None] + 0.5) * step) / wide
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


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

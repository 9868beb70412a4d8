"""An image is a function of (seed, epoch, its number): whatever the batch, threads, devices or step begun from."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time

import cv2
import numpy as np
import pytest
from data_images import draw, jpeg
from PIL import Image

from localmim.config import DataConfig
from localmim.data import ArraySource, TrainPipeline, eval_batches, open_source
from localmim.data.augment import ERASE, RAND_AUGMENT, RandAugment, RandomErasing, generator, parse_policy
from localmim.data.pipeline import IMAGENET_MEAN, IMAGENET_STD, Memory, one_ahead
from localmim.data.resize import resize
from localmim.errors import UserError

SIZE = (24, 32)
WORKERS = [1, 2] if (os.cpu_count() or 1) > 1 else [1]


def pipeline(source, batch_size=4, seed=0, rank=0, world=1, step_images=None, size=SIZE, in_chans=3, **changes):
    config = dataclasses.replace(DataConfig(workers=1), **changes)
    return TrainPipeline(source, config, size, in_chans, batch_size, seed, rank, world, step_images)


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def damaged(tree, tmp_path_factory):
    """The tree with one empty, one truncated, one text and one unreadable file among the 40."""
    root = tmp_path_factory.mktemp("damaged") / "tree"
    shutil.copytree(tree, root)
    (root / "cat/03.jpg").write_bytes(b"")
    (root / "cat/17.jpg").write_bytes((root / "cat/17.jpg").read_bytes()[:600])
    (root / "dog/05.jpg").write_text("no image")
    (root / "dog/06.jpg").unlink()
    (root / "dog/06.jpg").symlink_to(root / "gone")
    return root


BAD = [3, 17, 25, 26]


@pytest.mark.parametrize("workers", WORKERS)
def test_starting_inside_an_epoch(tree, workers):
    """epoch(e, start_step=s) is the tail of epoch(e), bit for bit, to the last step and to none at all."""
    data = pipeline(open_source(str(tree)), workers=workers)
    whole = list(data.epoch(2))
    assert len(whole) == data.steps_per_epoch == 10
    assert whole[0].images.shape == (4, 3, *SIZE) and whole[0].images.dtype == np.float32
    for start in (1, 3, 9):
        assert_same(list(data.epoch(2, start_step=start)), whole[start:])
    assert list(data.epoch(2, start_step=10)) == []
    again = pipeline(open_source(str(tree)), workers=workers)  # as after a restart of the process
    assert_same(list(again.epoch(2)), whole)


def test_what_the_stream_depends_on(tree):
    """Another epoch, seed or sample draws other crops of the same image; labels follow the images."""
    source = ArraySource([draw(0, 240, 300)] * 40, labels=np.arange(40))
    first, other = pipeline(source), pipeline(source, seed=1)
    epochs = [list(first.epoch(0)), list(first.epoch(1)), list(other.epoch(0))]
    crops = np.concatenate([batch.images for batches in epochs for batch in batches])
    assert len({crop.tobytes() for crop in crops}) == len(crops) == 120
    for batches in epochs:
        ids = np.concatenate([batch.ids for batch in batches])
        assert sorted(ids) == list(range(40)) and ids.tolist() != sorted(ids)
        np.testing.assert_array_equal(ids, np.concatenate([batch.labels for batch in batches]))
    assert epochs[0][0].ids.tolist() != epochs[1][0].ids.tolist() != epochs[2][0].ids.tolist()


def test_an_abandoned_epoch_leaves_nothing_behind(tree):
    """A loop that breaks off (SIGTERM, an error) and starts again must get the same batches."""
    data = pipeline(open_source(str(tree)))
    whole = list(data.epoch(0))
    for stop in (1, 4):
        running = data.epoch(0)
        for _ in range(stop):
            next(running)
        running.close()
        assert_same(list(data.epoch(0)), whole)


def steps_of(source, world, batch_size, epoch=1, **options):
    """What all ranks together take in each step of an epoch: number to pixels. No image may come twice."""
    ranks = [list(pipeline(source, batch_size, rank=r, world=world, **options).epoch(epoch)) for r in range(world)]
    steps = []
    for parts in zip(*ranks, strict=True):
        pixels = {sample: image for part in parts for sample, image in zip(part.ids.tolist(), part.images)}
        assert len(pixels) == world * batch_size
        steps.append(pixels)
    return steps


@pytest.mark.parametrize("changes", [{}, {"rand_augment": "m9-mstd0.5-inc1", "erase": 0.5}])
def test_a_step_is_the_same_on_any_number_of_devices(damaged, changes):
    """1, 2, 4 ranks, with unreadable images among them: each step's images are the same set, bit for bit."""
    options = {"max_bad_share": 0.2, **changes}
    alone = steps_of(open_source(str(damaged)), 1, 8, **options)
    assert len(alone) == 5
    for world, workers in ((2, WORKERS[-1]), (4, 1)):
        shared = steps_of(open_source(str(damaged)), world, 8 // world, workers=workers, **options)
        for one, other in zip(alone, shared, strict=True):
            assert one.keys() == other.keys()
            for sample in one:
                np.testing.assert_array_equal(one[sample], other[sample])


def test_ranks_share_a_step(tree):
    """Rank r of w has the r-th part of each step, neighbours together, and the epoch is every image once."""
    source = open_source(str(tree))
    order = pipeline(source).order(0)
    assert sorted(order.tolist()) == list(range(40))
    for rank in range(2):
        batches = list(pipeline(source, rank=rank, world=2).epoch(0))
        np.testing.assert_array_equal([b.ids for b in batches], order.reshape(5, 2, 4)[:, rank])


def test_fewer_images_than_a_step_has(tree):
    """A run that goes on with a smaller batch: the same steps in the same places, their last images left out."""
    source = open_source(str(tree))
    full, fewer = (pipeline(source, size, rank=0, world=2, step_images=8) for size in (4, 3))
    assert full.steps_per_epoch == fewer.steps_per_epoch == 5
    for one, other in zip(full.epoch(0, 2), fewer.epoch(0, 2), strict=True):
        np.testing.assert_array_equal(one.ids[:3], other.ids)
        np.testing.assert_array_equal(one.images[:3], other.images)


def test_pixels_depend_on_neither_batch_nor_threads():
    """Each image of an epoch by its number: other batch sizes and thread counts give the same pixels."""
    source = ArraySource([draw(k, 40, 50) for k in range(24)])
    runs = []
    for batch_size, workers in ((1, 1), (6, WORKERS[-1]), (24, 1)):
        steps = steps_of(source, 1, batch_size, workers=workers)
        runs.append({sample: image for step in steps for sample, image in step.items()})
    assert all(run.keys() == runs[0].keys() for run in runs) and len(runs[0]) == 24
    for sample, image in runs[0].items():
        np.testing.assert_array_equal(image, runs[1][sample])
        np.testing.assert_array_equal(image, runs[2][sample])


@pytest.mark.parametrize("workers", WORKERS)
def test_bad_images_are_named_counted_replaced(damaged, workers, caplog):
    """The epoch keeps its length, every bad file is named once with a reason, and a resumed run is bit-identical."""
    data = pipeline(open_source(str(damaged)), workers=workers, max_bad_share=0.1)
    with caplog.at_level(logging.WARNING, "localmim.data"):
        epochs = [list(data.epoch(epoch)) for epoch in (0, 1)]
    for batches in epochs:
        assert len(batches) == 10 and not set(np.concatenate([b.ids for b in batches]).tolist()) & set(BAD)
        assert all(np.isfinite(batch.images).all() and len(batch.ids) == 4 for batch in batches)
    messages = sorted(record.getMessage() for record in caplog.records)
    assert len(messages) == 4 and sorted(data.bad.ids) == BAD
    for message, words in zip(messages, ["03.jpg: the file is empty", "17.jpg: truncated", "05.jpg: not a", "No such"]):
        assert words in message
    for start in (2, 3, 7):
        resumed = pipeline(open_source(str(damaged)), workers=workers, max_bad_share=0.1)
        saved = pipeline(open_source(str(damaged)), workers=workers, max_bad_share=0.1)
        for _ in zip(range(start), saved.epoch(0)):
            pass
        resumed.load_state(json.loads(json.dumps(saved.state())))
        assert_same(list(resumed.epoch(0, start_step=start)), epochs[0][start:])
        assert_same(list(resumed.epoch(1)), epochs[1])
        assert sorted(resumed.bad.ids) == BAD


def test_too_many_bad_images(damaged):
    """Past the set share the run stops with the count and the names."""
    data = pipeline(open_source(str(damaged)), max_bad_share=0.07)
    with pytest.raises(UserError, match=r"3 of 40 images cannot be read, more than data.max_bad_share=0.07.*\.jpg"):
        list(data.epoch(0))


def test_too_many_bad_images_of_all_devices(damaged):
    """No device alone has met too many, all of them together have."""
    ranks = [pipeline(open_source(str(damaged)), rank=r, world=2, max_bad_share=0.08) for r in range(2)]
    for one in ranks:
        list(one.epoch(0))
    found = [one.bad.ids for one in ranks]
    assert all(len(ids) <= 0.08 * 40 for ids in found) and len(found[0] | found[1]) > 0.08 * 40
    ranks[0].bad.merge(found[1])
    with pytest.raises(UserError, match="images cannot be read, more than"):
        ranks[0].bad.check()


def test_half_of_the_images_are_bad(tmp_path):
    """Stand-ins in every batch, bad ones among those that are looked at; they must repeat images."""
    for k in range(22):
        (tmp_path / f"{k:02d}.jpg").write_bytes(b"" if k % 2 else jpeg(draw(k)))
    data = pipeline(open_source(str(tmp_path)), max_bad_share=1)
    batches = list(data.epoch(0))
    assert [batch.images.shape for batch in batches] == [(4, 3, *SIZE)] * 5
    assert not any((batch.ids % 2).any() for batch in batches)
    assert_same(list(data.epoch(0, start_step=2)), batches[2:])


def test_who_stands_in(tmp_path):
    """The image at the same place of the next steps, what is left over included, then at the place after it."""
    for k in range(11):
        (tmp_path / f"{k:02d}.jpg").write_bytes(jpeg(draw(k)))
    source = open_source(str(tmp_path))
    order = pipeline(source).order(0)  # two steps of 4, three left over
    for places, expected in (((1,), {1: 5}), ((5,), {5: 9}), ((1, 5, 9), {1: 6, 5: 10}), ((3, 7), {3: 4, 7: 8})):
        for place in places:
            (tmp_path / f"{order[place]:02d}.jpg").write_bytes(b"")
        batches = list(pipeline(source, max_bad_share=1).epoch(0))
        found = np.concatenate([batch.ids for batch in batches])
        wanted = order[[expected.get(place, place) for place in range(8)]]
        np.testing.assert_array_equal(found, wanted)
        for place in places:
            (tmp_path / f"{order[place]:02d}.jpg").write_bytes(jpeg(draw(order[place])))
    # the pixels are those that the image has at its own place
    twice = [image for batch in batches for image, sample in zip(batch.images, batch.ids) if sample == order[4]]
    assert len(twice) == 2
    np.testing.assert_array_equal(*twice)


def test_no_image_can_be_read(tmp_path):
    """All bad, and all allowed: the run must stop, not wait for ever."""
    for k in range(6):
        (tmp_path / f"{k}.jpg").write_text("no image")
    with pytest.raises(UserError, match="none of 6 images can be read"):
        list(pipeline(open_source(str(tmp_path)), max_bad_share=1).epoch(0))


def test_state_refuses_another_data_set(tree, damaged):
    """A checkpoint must not go on with other images under the same numbers."""
    state = pipeline(open_source(str(tree))).state()
    with pytest.raises(UserError, match="not the data set that the run began with"):
        pipeline(open_source(str(damaged))).load_state(state)


def test_state_of_an_older_run(tree):
    """States once held the number of workers, which no longer decides anything: they are taken over all the same."""
    data = pipeline(open_source(str(tree)))
    data.load_state({**data.state(), "workers": 10**6, "bad": [7]})
    assert data.state() == {"bad": [7], "fingerprint": data.fingerprint} and data.workers == 1


def test_crops_come_from_the_image(tmp_path):
    """Scale 1 and ratio of the image, no mirror: the crop is the image, in RGB, normalised by ImageNet's values."""
    image = draw(4, 48, 64)
    cv2.imwrite(str(tmp_path / "a.png"), image[..., ::-1])
    whole = dict(crop_scale=(1.0, 1.0), crop_ratio=(64 / 48, 64 / 48), hflip=0.0, size=(48, 64), batch_size=1)
    (batch,) = pipeline(open_source(str(tmp_path)), **whole).epoch(0)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(batch.images[0].transpose(1, 2, 0), (image / 255 - mean) / std, atol=1e-5)
    (batch,) = pipeline(open_source(str(tmp_path)), **{**whole, "hflip": 1.0}).epoch(0)
    np.testing.assert_allclose(batch.images[0].transpose(1, 2, 0)[:, ::-1], (image / 255 - mean) / std, atol=1e-5)


def odd_files(root):
    """Files that decoders treat in different ways; all of one red image."""
    red = np.zeros((20, 30, 3), np.uint8)
    red[..., 2] = 255  # BGR
    cv2.imwrite(str(root / "a.webp"), red)
    cv2.imwrite(str(root / "alpha.png"), np.dstack([red, red[..., :1]]))
    cv2.imwrite(str(root / "deep.png"), red.astype(np.uint16) * 257)
    cv2.imwrite(str(root / "tiny.png"), red[:1, :1])
    cv2.imwrite(str(root / "a.bmp"), red)
    cv2.imwrite(str(root / "a.tif"), red)


def test_odd_files_become_rgb(tmp_path):
    """Alpha, 16 bit, WebP, TIFF and one single pixel train and evaluate as plain RGB."""
    odd_files(tmp_path)
    source = open_source(str(tmp_path))
    data = pipeline(source, batch_size=6, size=(8, 8), mean=[0.0] * 3, std=[1.0] * 3)
    (train,) = data.epoch(0)
    (test,) = eval_batches(source, data.config, (8, 8), 3, 6)
    for images in (train.images, test.images):
        np.testing.assert_allclose(images, np.broadcast_to([[[[1.0]], [[0.0]], [[0.0]]]], images.shape), atol=0.02)


@pytest.mark.parametrize("in_chans, kind", [(1, "jpg"), (1, "npy"), (4, "png"), (5, "npy"), (12, "npy")])
def test_channel_counts(tmp_path, in_chans, kind):
    """Any number of channels from config alone, train and evaluation, mean 0.5 unless given."""
    pixels = np.dstack([draw(k, 30, 40) for k in range(4)])[..., :in_chans] // 2 + 64  # no overshoot to be clipped
    for name in "abcd":
        if kind == "npy":
            np.save(tmp_path / f"{name}.npy", pixels.astype(np.float32) / 255 if name == "a" else pixels)
        else:
            cv2.imwrite(str(tmp_path / f"{name}.{kind}"), pixels)
    source = open_source(str(tmp_path), in_chans=in_chans)
    data = pipeline(source, size=(8, 12), in_chans=in_chans)
    (train,) = data.epoch(0)
    (test,) = eval_batches(source, data.config, (8, 12), in_chans, 4)
    for images in (train.images, test.images):
        assert images.shape == (4, in_chans, 8, 12) and images.dtype == np.float32
        assert 0.1 < np.abs(images).mean() < 1 and np.abs(images).max() < 2
    np.testing.assert_allclose(test.images[0], test.images[1], atol=0.02)  # float and uint8 of one image


def test_wrong_channel_count_is_a_bad_image(tmp_path):
    """It is named with its shape, not passed on to a crash inside the resizing."""
    for k in range(4):
        np.save(tmp_path / f"{k}.npy", np.zeros((9, 9, 4 if k == 2 else 5), np.uint8))
    with pytest.raises(UserError, match=r"1 of 4 images cannot be read.*2\.npy"):
        list(pipeline(open_source(str(tmp_path), in_chans=5), in_chans=5, size=(8, 8)).epoch(0))


AUGMENTED = {"rand_augment": "m9-mstd0.5-inc1", "erase": 0.5}


@pytest.mark.parametrize("workers", WORKERS)
def test_starting_inside_an_augmented_epoch(damaged, workers):
    """The tail of an epoch stays the tail, with images that cannot be read among them, for each way to augment."""
    for changes in (AUGMENTED, {"rand_augment": "m9"}, {"erase": 1.0}):
        changes = {**changes, "workers": workers, "max_bad_share": 0.1}
        whole = list(pipeline(open_source(str(damaged)), **changes).epoch(1))
        assert [batch.images.shape for batch in whole] == [(4, 3, *SIZE)] * 10
        plain = list(pipeline(open_source(str(damaged)), workers=workers, max_bad_share=0.1).epoch(1))
        np.testing.assert_array_equal([batch.ids for batch in whole], [batch.ids for batch in plain])
        for start in (2, 3, 7):
            resumed = pipeline(open_source(str(damaged)), **changes)
            assert_same(list(resumed.epoch(1, start_step=start)), whole[start:])


def test_what_an_augmented_image_depends_on():
    """On (seed, epoch, sample) alone: with crops that change nothing, each image is what the ops by themselves give."""
    images = [draw(k, *SIZE) for k in range(16)]
    fixed = {"crop_scale": (1.0, 1.0), "crop_ratio": (SIZE[1] / SIZE[0],) * 2, "hflip": 0.0, "seed": 5, **AUGMENTED}
    policy, erase = RandAugment(parse_policy("m9-mstd0.5-inc1"), (124, 116, 104), "bicubic"), RandomErasing(0.5)
    mean, std = (np.float32(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    for changes in ({}, {"workers": WORKERS[-1], "batch_size": 8}, {"rank": 1, "world": 2}):
        for batch in pipeline(ArraySource(images), **fixed, **changes).epoch(3):
            for image, sample in zip(batch.images, batch.ids.tolist()):
                expected = policy(images[sample], generator(5, 3, sample, RAND_AUGMENT)).transpose(2, 0, 1)
                expected = erase((expected / np.float32(255) - mean) / std, generator(5, 3, sample, ERASE))
                np.testing.assert_allclose(image, expected, atol=1e-5)


def test_an_error_in_augmentation_is_raised():
    """An image that the augmentation refuses is no unreadable one, which another would stand in for."""
    images = [draw(k, *SIZE) for k in range(8)]
    images[5] = images[5].astype(np.float32) / 255
    with pytest.raises(UserError, match=r"data\.rand_augment needs 8 bit colour images, .* float32 of shape"):
        list(pipeline(ArraySource(images), rand_augment="m9", max_bad_share=1).epoch(0))


def test_an_error_in_a_source_is_raised():
    """Only what is known to be unreadable is replaced; a source that fails otherwise ends the run as it failed."""

    class Broken(list):
        def __getitem__(self, k):
            if k == 5:
                raise KeyError("no such image")
            return super().__getitem__(k)

    with pytest.raises(KeyError, match="no such image"):
        list(pipeline(ArraySource(Broken(draw(k) for k in range(8)))).epoch(0))


def test_one_ahead():
    """The next item is made while one is in use, no further one is, and an error comes in its turn."""
    made = []

    def items():
        for k in range(4):
            if k == 3:
                raise ValueError("three")
            made.append(k)
            yield k

    taken = one_ahead(items())
    assert next(taken) == 0
    for _ in range(500):
        if len(made) == 2:
            break
        time.sleep(0.01)
    assert made == [0, 1]
    assert [next(taken), next(taken)] == [1, 2]
    with pytest.raises(ValueError, match="three"):
        next(taken)


def test_memory_is_used_again():
    """Only what nobody holds, not even a part of it, is given out again."""
    memory = Memory()
    first = memory.array((4, 3, 2))
    first[:] = 1
    part = first[1, 1:]
    where = first.ctypes.data
    del first
    second = memory.array((4, 3, 2))
    assert second.ctypes.data != where and (part == 1).all()
    del part
    assert memory.array((4, 3, 2)).ctypes.data == where
    assert memory.array((4, 3)).shape == (4, 3)
    held = [memory.array((4, 3, 2)) for _ in range(9)]
    assert len({array.ctypes.data for array in held} | {second.ctypes.data}) == 10 and len(memory.kept) == Memory.MOST


def test_nothing_stays_behind(tree):
    """Whole epochs and broken-off ones leave no thread and no open file; an ended thread may need a moment to go."""
    data = pipeline(open_source(str(tree)), rand_augment="m9")

    def left(folder):
        return len(os.listdir(f"/proc/self/{folder}"))

    def run():
        list(data.epoch(0))
        running = data.epoch(1)
        next(running)
        running.close()

    run()
    threads, files = left("task"), left("fd")
    for _ in range(10):
        run()
    end = time.monotonic() + 10
    while left("task") > threads and time.monotonic() < end:
        time.sleep(0.01)
    assert left("task") <= threads and left("fd") <= files


def test_erasing_grey_and_float_images(tmp_path):
    """Erasing needs neither colour nor 8 bits: noise where images of one level were, from arrays and from files."""
    for k in range(4):
        cv2.imwrite(str(tmp_path / f"{k}.png"), np.full(SIZE, 51, np.uint8))
    for source in (ArraySource([np.full((*SIZE, 1), 0.2, np.float32)] * 4), open_source(str(tmp_path), in_chans=1)):
        (batch,) = pipeline(source, in_chans=1, erase=1.0, mean=[0.2]).epoch(0)
        assert batch.images.shape == (4, 1, *SIZE)
        assert all(0.01 < (np.abs(image) > 1e-5).mean() < 0.4 for image in batch.images)


def test_interpolation_of_the_crop():
    """Bicubic overshoots at an edge, bilinear does not."""
    step = np.full((12, 16, 3), 100, np.uint8)
    step[:, 8:] = 150
    limits = {}
    for interpolation in ("bicubic", "bilinear"):
        changes = {"mean": [0.0] * 3, "std": [1.0] * 3, "crop_scale": (1.0, 1.0), "crop_ratio": (4 / 3, 4 / 3)}
        (batch,) = pipeline(ArraySource([step] * 4), interpolation=interpolation, **changes).epoch(0)
        limits[interpolation] = np.rint([batch.images.min() * 255, batch.images.max() * 255]).tolist()
    assert limits["bilinear"] == [100, 150]
    assert limits["bicubic"][0] < 98 and limits["bicubic"][1] > 152


def test_evaluation_sees_every_image_once_in_order(damaged, caplog):
    """The last batch is short; unreadable images are left out and named."""
    config = DataConfig(max_bad_share=0.1)
    with caplog.at_level(logging.WARNING, "localmim.data"):
        batches = list(eval_batches(open_source(str(damaged)), config, SIZE, 3, 16))
    assert [len(batch.ids) for batch in batches] == [16, 16, 4] and len(caplog.records) == 4
    ids = np.concatenate([batch.ids for batch in batches])
    assert ids.tolist() == [i for i in range(40) if i not in BAD]
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in batches]), ids // 20)
    with pytest.raises(UserError, match="max_bad_share"):
        list(eval_batches(open_source(str(damaged)), DataConfig(), SIZE, 3, 16))


def test_evaluation_crop():
    """Exact size: untouched. Otherwise the short side becomes 256/224 of the crop and the middle is kept."""
    config = DataConfig(mean=[0.0] * 3, std=[1.0] * 3)
    exact, wide = draw(0, 28, 28), draw(1, 64, 128)
    first, second = next(eval_batches(ArraySource([exact, wide]), config, (28, 28), 3, 2)).images
    np.testing.assert_allclose(first, exact.transpose(2, 0, 1) / np.float32(255), atol=1e-6)
    middle = pillow(wide, (32, 64))[2:30, 18:46]
    np.testing.assert_allclose(second, middle.transpose(2, 0, 1) / np.float32(255), atol=1e-6)


@pytest.mark.parametrize("size", [(50, 61), (71, 33), (37, 53), (100, 41)])
def test_evaluation_crop_is_torchvisions(size):
    """Resize(32) cuts the longer side off to whole pixels, CenterCrop(28) rounds its corner: the same pixels."""
    config = DataConfig(mean=[0.0] * 3, std=[1.0] * 3)
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    (found,) = next(eval_batches(ArraySource([image]), config, (28, 28), 3, 1)).images
    scaled = [32 if side == min(size) else int(32 * side / min(size)) for side in size]
    top, left = (round((side - 28) / 2.0) for side in scaled)
    expected = pillow(image, scaled)[top : top + 28, left : left + 28].transpose(2, 0, 1) / np.float32(255)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def pillow(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's antialiased bicubic, channel by channel, rows first: a pass a side, for releases choose the order."""
    channels = []
    for c in image.transpose(2, 0, 1):
        rows = Image.fromarray(c).resize((size[1], len(c)), Image.Resampling.BICUBIC)
        channels.append(np.asarray(rows.resize((size[1], size[0]), Image.Resampling.BICUBIC)))
    return np.stack(channels, axis=2)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(17, 40), (90, 61), (20, 69), (50, 30), (45, 50)])
def test_resize_is_pillows(channels, size):
    """Evaluation sees the pixels that torchvision and timm give, larger or smaller, for any number of channels."""
    image = np.random.default_rng(0).integers(0, 256, (50, 70, channels)).astype(np.uint8)
    np.testing.assert_array_equal(resize(image, size), pillow(image, size))


@pytest.mark.parametrize("size", [(17, 40), (90, 61), (50, 20)])
def test_resize_of_float_images(size):
    """The same pixels as for 8 bit, but for rounding and for what does not fit into 8 bits; any number of channels."""
    image = np.random.default_rng(0).integers(60, 200, (50, 70, 5)).astype(np.uint8)
    found = resize(image.astype(np.float32), size)
    assert found.shape == (*size, 5) and found.dtype == np.float32
    assert np.abs(np.clip(found, 0, 255) - pillow(image, size)).max() < 2


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_training_crops_are_pillows(interpolation):
    """A crop of everything, resized: bicubic is Pillow's, with antialiasing, as the authors have it."""
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "hflip": 0.0, "mean": [0.0] * 3, "std": [1 / 255] * 3}
    config = DataConfig(interpolation=interpolation, workers=1, **whole)
    source = ArraySource(np.stack([image] * 2))
    batch = next(TrainPipeline(source, config, (32, 24), 3, 2, 0).epoch(0))
    difference = np.abs(batch.images[0].transpose(1, 2, 0) - pillow(image, (32, 24))).max()
    assert (difference < 1e-3) == (interpolation == "bicubic")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 41}, "data.dir has 40 images, fewer than batch_size 41"),
        ({"batch_size": 21, "world": 2}, "20 for each of 2 devices, fewer than batch_size 21"),
        ({"step_images": 41}, "data.dir has 40 images, fewer than the 41 of a step"),
        ({"step_images": 7, "world": 2}, "a step has 7 images, fewer than 2 x batch_size 4"),
        ({"mean": [0.5]}, "data.mean has 1 values, but images have 3 channels"),
        ({"std": [1.0, 0.0, 1.0]}, "data.std"),
        ({"crop_scale": (0.5, 0.2)}, "data.crop_scale"),
        ({"crop_ratio": (0.0, 1.0)}, "data.crop_ratio"),
        ({"hflip": 1.5}, "data.hflip"),
        ({"rand_augment": "m9-x3"}, "data.rand_augment is 'm9-x3'"),
        ({"rand_augment": "m9", "in_chans": 1}, "data.rand_augment needs colour images, but model.in_chans is 1"),
        ({"workers": 10**6}, "data.workers is 1000000"),
    ],
)
def test_wrong_values(tree, changes, message):
    """Each is refused before anything is read, with the key's name."""
    with pytest.raises(UserError) as error:
        pipeline(open_source(str(tree)), **changes)
    assert message in str(error.value) and "\n" not in str(error.value)

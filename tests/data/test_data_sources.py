"""What counts as a data set, in which order, and what is said when it is none."""

from __future__ import annotations

import logging

import cv2
import numpy as np
import pytest
from data_images import draw, jpeg

from localmim.data import open_source
from localmim.data.sources import UnreadableImage, decode
from localmim.errors import UserError


def put(path, content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(draw(1)) if content is None else content)
    return path


def test_class_folders(tree):
    """Sub-folders are classes; numbers follow the sorted names."""
    source = open_source(str(tree))
    assert len(source) == 40 and source.class_names == ["cat", "dog"]
    assert source.name(20) == "dog/00.jpg" and source.label(19) == 0 and source.label(20) == 1
    assert source[3].dtype == np.uint8 and source[3].ndim == 1 and source.encoded


def test_one_image_in_the_root_makes_it_unlabelled(tmp_path):
    """The rule that tells a class-folder tree from a nested folder; hidden files are not images."""
    for name in ("b.jpg", "sub/a.PNG", "sub/deep/c.jpeg", ".hidden.jpg", "._d.jpg", ".cache/e.jpg"):
        put(tmp_path / name)
    source = open_source(str(tmp_path))
    assert [source.name(i) for i in range(len(source))] == ["b.jpg", "sub/a.PNG", "sub/deep/c.jpeg"]
    assert source.class_names == [] and source.label(0) == -1


def test_linked_folders_are_followed_once(tmp_path):
    """Subsets are often made of links; a link that leads back must not hang."""
    put(tmp_path / "real" / "a.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "set")
    assert [open_source(str(tmp_path / "set")).name(0)] == ["x/a.jpg"]


def test_fingerprint_tells_a_changed_set(tmp_path):
    """Resuming relies on it: a new name, another size, another label."""
    for name in ("x/a.jpg", "y/b.jpg"):
        put(tmp_path / name)
    seen = [open_source(str(tmp_path)).fingerprint()]
    assert seen[0] == open_source(str(tmp_path)).fingerprint()
    put(tmp_path / "x/a.jpg", jpeg(draw(2)))
    seen.append(open_source(str(tmp_path)).fingerprint())
    put(tmp_path / "y/c.jpg")
    seen.append(open_source(str(tmp_path)).fingerprint())
    assert len(set(seen)) == 3


def test_unsupported_images_are_not_left_out_in_silence(tmp_path, caplog):
    """A folder that is half .gif would otherwise train on half the data."""
    put(tmp_path / "a.jpg")
    put(tmp_path / "b.gif")
    with caplog.at_level(logging.WARNING, "localmim.data"):
        assert len(open_source(str(tmp_path))) == 1
    assert "1 .gif files" in caplog.text


@pytest.mark.parametrize("lines", ["a.jpg 3\nsub/my b.jpg 0\n", "a.jpg\t3\n\nsub/my b.jpg\t0"])
def test_list_file(tmp_path, lines):
    """Paths are relative to the list and may hold spaces; labels follow a tab or a space."""
    put(tmp_path / "a.jpg"), put(tmp_path / "sub/my b.jpg")
    (tmp_path / "train.txt").write_text(lines)
    source = open_source(str(tmp_path / "train.txt"))
    assert source.name(1) == "sub/my b.jpg" and source.labels.tolist() == [3, 0] and source[1].size > 100
    (tmp_path / "plain.txt").write_text("sub/my b.jpg\n")
    assert open_source(str(tmp_path / "plain.txt")).labels.tolist() == [-1]


@pytest.mark.parametrize("kind, head, count", [("cifar10", 1, 5), ("cifar100", 2, 1)])
def test_cifar_binaries(tmp_path, kind, head, count):
    """Both record layouts; the label of CIFAR-100 is the fine one; planes come out as channels."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if kind == "cifar10" else ["train.bin"]
    image = draw(5, 32, 32)
    record = bytes([7] * (head - 1) + [9]) + image.transpose(2, 0, 1).tobytes()
    for name in names:
        (tmp_path / name).write_bytes(record * 3)
    source = open_source(str(tmp_path))
    assert len(source) == 3 * count and source.label(0) == 9 and not source.encoded
    np.testing.assert_array_equal(source[1], image)
    test = tmp_path / ("test_batch.bin" if kind == "cifar10" else "test.bin")
    test.write_bytes(record)
    assert len(open_source(str(tmp_path))) == 3 * count
    assert len(open_source(str(tmp_path), evaluation=True)) == 1  # the test part
    test.unlink()
    (tmp_path / names[0]).write_bytes(record[:-1])
    with pytest.raises(UserError, match=f"is not {kind} binary"):
        open_source(str(tmp_path), kind)
    (tmp_path / names[0]).unlink()
    with pytest.raises(UserError, match=r"lacks|has no"):
        open_source(str(tmp_path), kind)


def test_many_channels(tmp_path):
    """.npy arrays, and files with another channel count than 3, come out as arrays of exactly that many channels."""
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((9, 8, 5)).astype(np.float32))
    np.save(tmp_path / "b.npy", np.zeros((9, 8, 4), np.uint8))
    source = open_source(str(tmp_path), in_chans=5)
    assert source[0].shape == (9, 8, 5) and not source.encoded
    with pytest.raises(UnreadableImage, match=r"shape \(9, 8, 4\), expected \(height, width, 5\)"):
        source[1]
    four = np.dstack([draw(0), np.full((48, 60), 77, np.uint8)])
    cv2.imwrite(str(tmp_path / "c.png"), four[..., [2, 1, 0, 3]])
    np.testing.assert_array_equal(open_source(str(tmp_path), in_chans=4)[2], four)


def test_decode_gives_rgb_whatever_the_file():
    """Grey, alpha and 16-bit files become three channels of 8 bit; 16 bit is kept when taken as stored."""
    image = draw(3)
    alpha = np.dstack([image[..., ::-1], np.full(image.shape[:2], 9, np.uint8)])
    deep = image[..., ::-1].astype(np.uint16) * 257
    for stored in (image[..., ::-1], alpha, deep):
        raw = cv2.imencode(".png", stored)[1]
        np.testing.assert_array_equal(decode(raw, 3), image)
    grey = cv2.imencode(".png", image[..., 0])[1]
    np.testing.assert_array_equal(decode(grey, 3), np.repeat(image[..., :1], 3, axis=2))
    np.testing.assert_array_equal(decode(grey, 1), image[..., :1])
    four = cv2.imencode(".png", np.dstack([deep, deep[..., :1]]))[1]
    np.testing.assert_allclose(decode(four, 4)[..., :3], image / np.float32(255), rtol=1e-6)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "the file is empty"),
        (b"hello" * 9, "not a known image format"),
        (jpeg(draw(0))[:700], "truncated or damaged JPEG"),
    ],
)
def test_reasons(content, reason):
    """What the log says about a bad file must help to find the cause."""
    with pytest.raises(UnreadableImage, match=reason):
        decode(np.frombuffer(content, np.uint8), 3)


@pytest.mark.parametrize("options", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_RST_INTERVAL, 2)])
def test_truncated_jpeg_files_are_refused(options):
    """Whatever is missing at the end: a half-grey image would train like any other."""
    raw = cv2.imencode(".jpg", draw(17), options)[1]
    assert decode(raw, 3).shape == (48, 60, 3)
    for length in range(len(raw)):
        with pytest.raises(UnreadableImage):
            decode(raw[:length], 3)


def test_bytes_behind_the_end_of_a_jpeg():
    """Cameras and editors append things; the image is all there."""
    raw = jpeg(draw(0))
    for tail in (b"\0" * 7, b"appended"):
        found = decode(np.frombuffer(raw + tail, np.uint8), 3)
        np.testing.assert_array_equal(found, decode(np.frombuffer(raw, np.uint8), 3))


def test_random_damage_gives_an_image_or_a_reason():
    """600 files with up to five changed bytes, in their headers or anywhere: no crash, no hang, no odd array."""
    base, decoded = np.frombuffer(jpeg(draw(3)), np.uint8), 0
    for k in range(600):
        rng = np.random.default_rng(k)
        raw = base.copy()
        raw[rng.integers(0, 700 if k % 2 else len(raw), rng.integers(1, 6))] = rng.integers(0, 256)
        try:
            image = decode(raw, 3)
        except UnreadableImage as error:
            assert str(error)
            continue
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        decoded += 1
    assert 100 < decoded < 600


def test_wrong_places(tmp_path, tree):
    """Each mistake gives one line that names the place and what is there instead."""
    (tmp_path / "empty").mkdir()
    put(tmp_path / "docs/a.csv"), put(tmp_path / "docs/b.csv"), put(tmp_path / "x.jpg")
    lists = {"gone.txt": "x.jpg\nnot.jpg\nnor.jpg\n", "half.txt": "x.jpg 1\nx.jpg\n", "none.txt": "\n"}
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    for where, options, message in [
        ("", {}, "data.dir is not set"),
        (tmp_path / "nowhere", {}, "nowhere does not exist"),
        (tmp_path / "empty", {}, "empty is empty; no images"),
        (tmp_path / "docs", {}, "docs holds 2 .csv files; no images"),
        (tmp_path / "x.jpg", {}, "single image"),
        (tmp_path / "gone.txt", {}, "names 2 files that do not exist, of 3: not.jpg, nor.jpg"),
        (tmp_path / "half.txt", {}, "gives no label for x.jpg"),
        (tmp_path / "none.txt", {}, "none.txt is empty"),
        (tmp_path / "gone.txt", {"format": "folder"}, "is a file"),
        (tree, {"format": "list"}, "is a folder"),
        (tree, {"format": "mindrecord"}, "holds no MindRecord shards"),
        (tree, {"format": "cifar10"}, "has no data_batch_1.bin or test_batch.bin"),
        (tree, {"format": "cifar10", "in_chans": 4}, "expects 4 channels"),
    ]:
        with pytest.raises(UserError) as error:
            open_source(str(where), **options)
        assert message in str(error.value) and "\n" not in str(error.value)

"""Codebooks: each kind of tokenizer, the commands that make them, and what they refuse."""

from __future__ import annotations

import cv2
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from safetensors.numpy import load_file, save_file

from localmim import cli
from localmim.config import DataConfig
from localmim.data.pipeline import TrainPipeline
from localmim.data.sources import ArraySource, open_source
from localmim.errors import UserError
from localmim.mim.codebook import cluster, main
from localmim.mim.tokenizers import FORMAT, Patches, open_tokenizer, pooled_side, require_fixed_crops

SIZE = (32, 64)  # height and width differ everywhere


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Random colours in blocks of 5 px, uint8 [height, width, 3]."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), dtype=np.uint8)
    return blocks.repeat(5, axis=0).repeat(5, axis=1)[:height, :width]


def batch(B: int, C: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(B, C, *SIZE)).astype(np.float32)


def write_codebook(path, cells, vocab=7, in_chans=3, **metadata) -> dict[int, np.ndarray]:
    """A k-means file with random centroids."""
    generator = np.random.default_rng(3)
    tables = {c: generator.normal(size=(vocab, in_chans * pooled_side(c) ** 2)).astype(np.float32) for c in cells}
    header = {"format": FORMAT, "in_chans": str(in_chans), **metadata}
    save_file({f"cell_{c}": table for c, table in tables.items()}, path, metadata=header)
    return tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine JPEG files of several shapes, the fifth of them damaged."""
    root = tmp_path_factory.mktemp("images")
    for i, (height, width) in enumerate([(48, 60), (60, 48), (64, 64)] * 3):
        cv2.imwrite(str(root / f"{i}.jpg"), picture(i, height, width))
    (root / "4.jpg").write_bytes(b"no image")
    return root


def fixed_crops(source, size, seed: int, **changes) -> dict[int, np.ndarray]:
    """Sample number to image, of one epoch with the config that stored ids need."""
    ratio = size[1] / size[0]
    config = DataConfig(crop_scale=(1, 1), crop_ratio=(ratio, ratio), hflip=0, max_bad_share=0.2, workers=1)
    for key, value in changes.items():
        setattr(config, key, value)
    images = {}
    for x in TrainPipeline(source, config, size, 3, 1, seed).epoch(seed):
        images[int(x.ids[0])] = x.images[0]
    return images


# --- k-means


@pytest.mark.parametrize("cell, side", [(1, 1), (4, 4), (8, 8), (16, 8), (14, 7), (12, 6), (11, 1), (32, 8)])
def test_pooled_side(cell, side):
    """At most 8 px, and a whole number of pixels is averaged."""
    assert pooled_side(cell) == side


def test_patches_and_nearest(tmp_path):
    """Pooling, order of values, normalisation and the nearest centroid, in float64; cells that come twice."""
    images = batch(2)
    tables = write_codebook(tmp_path / "a.safetensors", (4, 16))
    tokenizer = open_tokenizer([str(tmp_path / "a.safetensors")], (16, 4, 16), 7, 3, SIZE)
    ids = tokenizer(images, np.arange(2))
    assert tokenizer.vocab == 7
    assert [x.shape for x in ids] == [(2, 2, 4), (2, 8, 16), (2, 2, 4)] and {x.dtype for x in ids} == {
        np.dtype("int32")
    }
    np.testing.assert_array_equal(ids[0], ids[2])
    for cell, got in ((16, ids[0]), (4, ids[1])):
        side = pooled_side(cell)
        k = cell // side
        x = images.astype(np.float64).reshape(2, 3, SIZE[0] // k, k, SIZE[1] // k, k).mean(axis=(3, 5))
        x = x.reshape(2, 3, SIZE[0] // cell, side, SIZE[1] // cell, side).transpose(0, 2, 4, 3, 5, 1)
        x = x.reshape(*x.shape[:3], -1)  # [B, hs, ws, d], channel fastest
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).sum(axis=-1, keepdims=True) / (x.shape[-1] - 1) + 1e-6)
        (patches,) = Patches((cell,), 3)(Tensor(images))
        np.testing.assert_allclose(patches.asnumpy(), x, atol=1e-5)
        distance = ((x[..., None, :] - tables[cell]) ** 2).sum(axis=-1)  # [B, hs, ws, V]
        np.testing.assert_array_equal(got, distance.argmin(axis=-1))


def test_clusters_are_found():
    """Planted centres come out, each once, and the same ones for the same seed."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(12, 20)).astype(np.float32) * 3
    patches = centres.repeat(50, axis=0) + generator.normal(size=(600, 20)).astype(np.float32) * 0.1
    found, error = cluster(patches, 12, seed=5)
    nearest = ((found[:, None] - centres) ** 2).mean(axis=-1).argmin(axis=-1)
    assert sorted(nearest) == list(range(12))
    np.testing.assert_allclose(found, centres[nearest], atol=0.1)
    assert error == pytest.approx(20 * 0.1**2, rel=0.1)
    np.testing.assert_array_equal(cluster(patches, 12, seed=5)[0], found)
    with pytest.raises(UserError, match="600 different patches do not make 601 centroids"):
        cluster(patches, 601, seed=5)


def test_brightness_and_contrast_do_not_count(tmp_path):
    """An id tells the pattern; and so does a cell of one channel."""
    for chans in (1, 3):
        write_codebook(tmp_path / f"{chans}.safetensors", (8, 32), in_chans=chans)
        tokenizer = open_tokenizer([str(tmp_path / f"{chans}.safetensors")], (8, 32), 7, chans, SIZE)
        images = batch(4, chans)
        plain = tokenizer(images, np.arange(4))
        assert all(len(np.unique(x)) > 1 for x in plain)
        for changed in (images + 0.9, images * 0.5, images * 1.7 - 0.4):
            for left, right in zip(plain, tokenizer(changed, np.arange(4))):
                np.testing.assert_array_equal(left, right)


def test_flat_patches_are_harmless(tmp_path):
    """A clear sky in grey: no NaN, and all of it has one id, whatever its brightness."""
    tables = write_codebook(tmp_path / "a.safetensors", (4, 16))
    tokenizer = open_tokenizer([str(tmp_path / "a.safetensors")], (4, 16), 7, 3, SIZE)
    images = np.linspace(-2, 2.5, 5, dtype=np.float32)[:, None, None, None] * np.ones((5, 3, *SIZE), np.float32)
    for x in Patches((4, 16), 3)(Tensor(images)):
        assert np.abs(x.asnumpy()).max() < 1e-2
    for cell, ids in zip((4, 16), tokenizer(images, np.arange(5))):
        assert set(ids.flat) == {np.linalg.norm(tables[cell], axis=-1).argmin()}


def test_files_that_are_refused(tmp_path):
    """Each mistake is one line that names the file or the key."""
    write_codebook(tmp_path / "good.safetensors", (4, 8))
    write_codebook(tmp_path / "other.safetensors", (4,), format="x")
    save_file(
        {"cell_4": np.ones((7, 5), np.float32)}, tmp_path / "shape.safetensors", {"format": FORMAT, "in_chans": "3"}
    )
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "text.npz").write_text("no arrays")
    (tmp_path / "text.mindir").write_text("no graph")
    (tmp_path / "text.txt").write_text("")
    for names, cells, vocab, chans, message in [
        ([], (4,), 7, 3, "target.codebook is not set"),
        (["none.safetensors"], (4,), 7, 3, "none.safetensors does not exist"),
        (["text.safetensors"], (4,), 7, 3, "text.safetensors is no codebook, or a damaged one"),
        (["other.safetensors"], (4,), 7, 3, "other.safetensors is no codebook of this project"),
        (["shape.safetensors"], (4,), 7, 3, r"cell_4 is float32 \(7, 5\), expected float32 \(vocab, 48\)"),
        (["good.safetensors"], (4,), 8, 3, "has 7 ids, but target.vocab is 8"),
        (["good.safetensors"], (4,), 1, 3, "target.vocab is 1"),
        (["good.safetensors"], (4, 16), 7, 3, r"has cells of \[4, 8\] px, but none of 16 px"),
        (["good.safetensors"], (4,), 7, 1, "for images of 3 channels, not 1"),
        (["good.safetensors"], (4, 6), 7, 3, "cells of 6 px do not divide an image of 32x64 px"),
        (["good.safetensors", "good.safetensors"], (4, 8), 7, 3, "lists 2 files"),
        (["text.npz"], (4,), 7, 3, "text.npz is no file of stored ids"),
        (["text.mindir"], (4,), 7, 3, "text.mindir is no MINDIR file"),
        (["text.txt"], (4,), 7, 3, "text.txt is no .safetensors, .npz or .mindir file"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            open_tokenizer([str(tmp_path / name) for name in names], cells, vocab, chans, SIZE)
        assert "\n" not in str(caught.value)


# --- MINDIR


class Toy(nn.Cell):
    """Ids by the sign of the three channels' means, 0..7, at two scales: int grids, flat int rows, or logits."""

    def __init__(self, cells, kind="grid"):
        super().__init__()
        self.cell_sizes, self.kind = cells, kind

    def construct(self, images: Tensor):
        outputs = ()
        for cell in self.cell_sizes:
            x = ops.avg_pool2d(images, cell, cell)  # [B, 3, hs, ws]
            bits = (x > 0).astype(ms.int32)
            ids = bits[:, 0] + 2 * bits[:, 1] + 4 * bits[:, 2]
            if self.kind == "rows":
                ids = ids.reshape(ids.shape[0], -1)
            if self.kind == "logits":
                ids = -ops.abs(ids.expand_dims(1).astype(ms.float32) - ops.arange(8).reshape(1, 8, 1, 1))
            outputs = outputs + (ids,)
        return outputs[0] if len(self.cell_sizes) == 1 else outputs


def toy_ids(images: np.ndarray, cell: int) -> np.ndarray:
    B, C, H, W = images.shape
    bits = images.reshape(B, C, H // cell, cell, W // cell, cell).mean(axis=(3, 5)) > 0
    return bits[:, 0] + 2 * bits[:, 1] + 4 * bits[:, 2]


def export(path, network: nn.Cell) -> str:
    ms.export(network, Tensor(shape=[None, 3, *SIZE], dtype=ms.float32), file_name=str(path), file_format="MINDIR")
    return str(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("mindir")
    networks = {
        "both": Toy((8, 16)), "grid8": Toy((8,)), "rows8": Toy((8,), "rows"), "logits16": Toy((16,), "logits")
    }  # fmt: skip
    return {name: export(root / f"{name}.mindir", network) for name, network in networks.items()}


@pytest.mark.parametrize("names", [("both",), ("grid8", "logits16"), ("rows8", "logits16")])
def test_exported_tokenizer(exported, names):
    """One file for all scales or one a scale; ids as grids or rows, or logits."""
    tokenizer = open_tokenizer([exported[name] for name in names], (8, 16), 8, 3, SIZE)
    for seed in (0, 1):
        images = batch(3, seed=seed)
        for cell, got in zip((8, 16), tokenizer(images, np.arange(3))):
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, toy_ids(images, cell))


def test_exported_tokenizers_that_are_refused(exported):
    """Found with the first batch, before the network that trains is compiled."""
    for names, cells, vocab, images, message in [
        (["both"], (8, 16), 5, batch(3), "both.mindir gives ids from 0 to 7, but target.vocab is 5"),
        (["grid8"], (4,), 8, batch(3), r"returns Int32 \(3, 4, 8\), expected ids \(3, 8, 16\)"),
        (["logits16"], (16,), 9, batch(3), r"expected ids \(3, 2, 4\) or logits \(3, 9, 2, 4\)"),
        (["both"], (8,), 8, batch(3), "both.mindir returns 2 outputs, expected 1"),
        (["both", "both"], (8, 16), 8, batch(3), "both.mindir returns 2 outputs, expected 1"),
        (["grid8"], (8, 16), 8, batch(3), "grid8.mindir returns 1 outputs, expected 2"),
        (["grid8"], (8,), 8, batch(3, C=1), r"grid8.mindir refuses images \(3, 1, 32, 64\)"),
    ]:
        tokenizer = open_tokenizer([exported[name] for name in names], cells, vocab, 3, SIZE)
        with pytest.raises(UserError, match=message) as caught:
            tokenizer(images, np.arange(len(images)))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"lists 2 .mindir files, expected 1, or 3"):
        open_tokenizer([exported["grid8"]] * 2, (8, 16, 8), 8, 3, SIZE)


# --- stored ids


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_stored_ids(tmp_path, save):
    """By sample number in any order, mapped or compressed; written by anyone with numpy."""
    generator = np.random.default_rng(0)
    source = ArraySource(list(generator.integers(0, 256, (6, *SIZE, 3), dtype=np.uint8)))
    ids = {
        "cell_8": generator.integers(0, 9, (6, 4, 8)).astype(np.uint16),
        "cell_4": generator.integers(0, 9, (6, 8, 16)),
    }
    file = str(tmp_path / "ids.npz")
    save(file, fingerprint=source.fingerprint(), **ids)
    tokenizer = open_tokenizer([file], (8, 4, 8), 9, 3, SIZE)
    samples = np.array([5, 0, 3], np.int32)
    got = tokenizer(batch(3), samples)
    assert {x.dtype for x in got} == {np.dtype("int32")}
    for name, x in zip(("cell_8", "cell_4", "cell_8"), got):
        np.testing.assert_array_equal(x, ids[name][samples])
    tokenizer.check(source)
    with pytest.raises(UserError, match=r"has ids of 6 images, but data\.dir holds 2"):
        tokenizer.check(ArraySource(source.images[:2]))
    with pytest.raises(UserError, match="another data set"):
        tokenizer.check(ArraySource(source.images[::-1]))
    with pytest.raises(UserError, match=r"gives ids from 0 to 8, but target\.vocab is 8"):
        open_tokenizer([file], (8, 4), 8, 3, SIZE)(batch(6), np.arange(6))
    with pytest.raises(UserError, match="no cell_16"):
        open_tokenizer([file], (16,), 9, 3, SIZE)
    with pytest.raises(UserError, match=r"cell_8 of uint16 \(6, 4, 8\), expected integers \(images, 8, 4\)"):
        open_tokenizer([file], (8,), 9, 3, SIZE[::-1])


@pytest.mark.parametrize("size", [SIZE, (32, 32), (64, 32)])
def test_fixed_crops_are_fixed(folder, size):
    """Two seeds give the same pixels, and they are those of the centre; each of the three keys is needed for that."""
    encoded = open_source(str(folder))
    arrays = ArraySource([picture(i, 48, 60) for i in range(3)])
    for source in (encoded, arrays):
        left, right = (fixed_crops(source, size, seed) for seed in (1, 2))
        assert left.keys() == right.keys() and len(left) == (8 if source is encoded else 3)
        for i, image in left.items():
            np.testing.assert_array_equal(image, right[i])
        for change in ({"crop_scale": (0.1, 0.2)}, {"crop_ratio": (0.5, 2)}, {"hflip": 1}):
            moved = fixed_crops(source, size, 3, **change)
            assert any(np.abs(moved[i] - left[i]).max() > 0.1 for i in left)


def test_fixed_crop_is_the_centre():
    """A bright mark in the middle stays in the middle, and as much is cut off on the left as on the right."""
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 255
    image[18:22, 38:42] = 0
    (crop,) = fixed_crops(ArraySource([image]), (40, 40), 1).values()
    dark = crop[0] < 0
    assert dark.sum() == 16 and dark[18:22, 18:22].all()


def test_fixed_crops_are_required():
    """Stored ids with random crops would be ids of other places, and nothing would show it."""
    ratio = SIZE[1] / SIZE[0]
    require_fixed_crops(DataConfig(crop_scale=[1, 1], crop_ratio=[ratio, ratio], hflip=0), SIZE)
    require_fixed_crops(DataConfig(crop_scale=(1, 1), crop_ratio=(0.857, 0.857), hflip=0), (224, 192))
    message = r"set data.crop_scale: \[1, 1\], data.crop_ratio: \[2, 2\], data.hflip: 0$"
    with pytest.raises(UserError, match=message):
        require_fixed_crops(DataConfig(), SIZE)
    with pytest.raises(UserError, match=r"set data.crop_ratio: \[2, 2\]$"):
        require_fixed_crops(DataConfig(crop_scale=(1, 1), crop_ratio=(1, 1), hflip=0), SIZE)


# --- the command


def run(*words) -> int:
    return cli.run(main, [str(word) for word in words])


def test_commands(folder, tmp_path, capfd):
    """From JPEG files to a codebook to stored ids: those that the codebook gives for the crops of training."""
    common = ["--data-dir", folder, "--image-size", 32, 64, "--max-bad-share", 0.2, "--device", "CPU"]
    books = [tmp_path / "book.safetensors", tmp_path / "again.safetensors"]
    for book in books:
        make = ["build", "--cells", 4, 16, "--vocab", 20, "--patches", 300, "--out", book, *common]
        assert run(*make) == 0, capfd.readouterr().err
    for name, table in load_file(books[0]).items():  # the same command, the same centroids
        np.testing.assert_array_equal(table, load_file(books[1])[name])
        assert np.isfinite(table).all() and len(np.unique(table, axis=0)) == 20
    stored = tmp_path / "ids.npz"
    keep = ["ids", "--codebook", books[0], "--out", stored, "--batch-size", 3, *common]
    assert run(*keep) == 0, capfd.readouterr().err
    assert run(*keep) == 2 and run(*make) == 2  # nothing is overwritten
    assert capfd.readouterr().err.count("exists; give a new name") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "book.safetensors", "ids.npz"]

    source = open_source(str(folder))
    of_file, of_book = (open_tokenizer([str(file)], (4, 16), 20, 3, SIZE) for file in (stored, books[0]))
    of_file.check(source)
    crops = fixed_crops(source, SIZE, seed=1)
    samples = np.array([7, 0, 3], np.int32)
    images = np.stack([crops[i] for i in samples])
    for left, right in zip(of_file(images, samples), of_book(images, samples)):
        np.testing.assert_array_equal(left, right)
        assert len(np.unique(left)) > 5
    with pytest.raises(UserError, match="gives ids from"):  # number 4 cannot be read: training never asks for it
        of_file(images[:1], np.array([4]))


def test_ids_of_an_exported_tokenizer(folder, exported, tmp_path, capfd):
    """A batch that is filled up, files that say neither cells nor vocabulary, and other means than ImageNet's."""
    stored = tmp_path / "ids.npz"
    words = ["ids", "--codebook", exported["grid8"], exported["logits16"], "--data-dir", folder, "--out", stored]
    words += ["--image-size", 32, 64, "--max-bad-share", 0.2, "--device", "CPU", "--batch-size", 5]
    words += ["--mean", 0.5, 0.5, 0.5, "--std", 1, 1, 1]
    assert run(*words) == 2 and "--cells and --vocab are needed" in capfd.readouterr().err
    assert run(*words, "--cells", 8, 16, "--vocab", 8) == 0
    source = open_source(str(folder))
    crops = fixed_crops(source, SIZE, seed=0, mean=[0.5] * 3, std=[1] * 3)
    samples = np.array(sorted(crops))
    images = np.stack([crops[i] for i in samples])
    for cell, got in zip((8, 16), open_tokenizer([str(stored)], (8, 16), 8, 3, SIZE)(images, samples)):
        np.testing.assert_array_equal(got, toy_ids(images, cell))


def test_commands_refuse(folder, tmp_path, capfd):
    """Exit code 2 and one line, before any image is read where that is possible; and no file stays behind."""
    book, out = tmp_path / "book.safetensors", tmp_path / "out.safetensors"
    write_codebook(book, (8,))
    build = ["build", "--data-dir", folder, "--device", "CPU", "--max-bad-share", 0.2]
    ids = ["ids", "--data-dir", folder, "--device", "CPU", "--codebook", book]
    for words, message in [
        ([*build, "--out", tmp_path / "out.npz"], "out.npz does not end in .safetensors"),
        ([*build, "--out", tmp_path / "none" / "out.safetensors"], "none does not exist"),
        ([*build, "--out", out, "--vocab", 1], "--vocab is 1"),
        ([*build, "--out", out, "--patches", 100], "--patches is 100, expected at least --vocab, 512"),
        ([*build, "--out", out, "--image-size", 32, "--cells", 5], "cells of 5 px do not divide"),
        ([*build, "--out", out, "--image-size", 1, 2, 3], "--image-size is [1, 2, 3]"),
        ([*build, "--out", out, "--batch-size", 0], "--batch-size is 0"),
        ([*build, "--out", out, "--mean", 0.5], "data.mean has 1 values"),
        ([*ids, "--out", out], "out.safetensors does not end in .npz"),
        ([*ids, "--out", tmp_path / "out.npz"], "images cannot be read"),
        ([*ids, "--out", tmp_path / "out.npz", "--vocab", 9], "has 7 ids"),
        (["ids", "--codebook", tmp_path / "x.npz", *ids[1:5], "--out", out], "stored ids already"),
        (["ids", "--codebook", tmp_path / "no.safetensors", *ids[1:5], "--out", out], "no.safetensors does not exist"),
    ]:
        assert run(*words) == 2, words
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["book.safetensors"]


def test_too_few_patterns(tmp_path, capfd):
    """Clear skies do not make a codebook; the codebook is not left half written."""
    for i in range(2):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((40, 40, 3), 90 * i, np.uint8))
    out = tmp_path / "out.safetensors"
    words = ["build", "--data-dir", tmp_path, "--out", out, "--image-size", 32, "--patches", 40, "--vocab", 2]
    assert run(*words, "--cells", 8, "--in-chans", 1, "--device", "CPU") == 2
    assert "1 different patches do not make 2 centroids" in capfd.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".*"))

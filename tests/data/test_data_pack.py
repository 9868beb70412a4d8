"""MindRecord shards give the images of the folder they were made from; a set is there as a whole or not at all."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from data_images import draw
from mindspore.mindrecord import FileWriter

from localmim import cli
from localmim.config import DataConfig
from localmim.data import TrainPipeline, eval_batches, open_source, pack
from localmim.data.__main__ import main
from localmim.data.sources import MindRecordSource, UnreadableImage
from localmim.errors import UserError


@pytest.fixture(scope="module")
def packed(tree, tmp_path_factory):
    target = tmp_path_factory.mktemp("packed") / "set"
    assert cli.run(main, ["pack", "--src", str(tree), "--dst", str(target), "--shards", "3"]) == 0
    return target


def test_shards_equal_the_folder(tree, packed):
    """Same numbers, names, labels, bytes, and so the same training batches bit for bit, in any order of reading."""
    folder, shards = open_source(str(tree)), open_source(str(packed))
    assert len(shards) == 40 and shards.class_names == ["cat", "dog"]
    for i in (0, 13, 14, 39):
        assert shards.name(i) == folder.name(i) and shards.label(i) == folder.label(i)
        np.testing.assert_array_equal(shards[i], folder[i])
    config = DataConfig(workers=1)
    for left, right in zip(*(TrainPipeline(s, config, (16, 16), 3, 4, seed=3).epoch(1) for s in (folder, shards))):
        for x, y in zip(left, right):
            np.testing.assert_array_equal(x, y)
    for left, right in zip(*(eval_batches(s, config, (16, 16), 3, 16) for s in (folder, shards))):
        np.testing.assert_array_equal(left.images, right.images)


def test_bad_image_inside_a_shard(tree, packed, tmp_path):
    """Shards of other tools may hold damaged images, and call the column `data`: replaced as in a folder."""
    folder = open_source(str(tree))
    writer = FileWriter(str(tmp_path / "x.mindrecord"), shard_num=2)
    writer.add_schema({"data": {"type": "bytes"}, "label": {"type": "int64"}}, "other")
    writer.write_raw_data([{"data": b"junk" if i == 11 else folder[i].tobytes(), "label": i} for i in range(40)])
    writer.commit()
    source = open_source(str(tmp_path))
    bad = source.labels.tolist().index(11)
    data = TrainPipeline(source, DataConfig(max_bad_share=0.1, workers=1), (16, 16), 3, 4, seed=0)
    batches = list(data.epoch(0))
    assert len(batches) == 10 and data.bad.ids == {bad}
    for batch in batches:
        for image, label in zip(batch.images, batch.labels):
            assert label != 11 and np.isfinite(image).all()
    (tmp_path / "x.mindrecord0").unlink()
    with pytest.raises(UserError, match=r"lacks the MindRecord shard x\.mindrecord0"):
        open_source(str(tmp_path))


def test_ranks_read_their_own_records(packed, monkeypatch):
    """Two ranks read disjoint halves, and together every record once; breaking off and beginning later is quick."""
    asked = []
    read = MindRecordSource._read
    source = open_source(str(packed))
    monkeypatch.setattr(MindRecordSource, "_read", lambda self, i: asked.append(i) or read(self, i))
    halves = []
    for rank in range(2):
        asked.clear()
        data = TrainPipeline(source, DataConfig(workers=1), (16, 16), 3, 4, seed=0, rank=rank, world=2)
        whole = list(data.epoch(0))
        halves.append(sorted(asked))
        assert halves[-1] == sorted(np.concatenate([batch.ids for batch in whole]).tolist())
        asked.clear()
        running = data.epoch(0, start_step=2)
        np.testing.assert_array_equal(next(running).images, whole[2].images)
        running.close()
        assert len(asked) <= 12 and asked[:4] == whole[2].ids.tolist()
    assert sorted(halves[0] + halves[1]) == list(range(40))


def test_records_read_by_minddata(packed, tree, tmp_path):
    """Rows with other bytes beside the image are MindData's to read: the same images, in the same batches."""
    folder = open_source(str(tree))
    writer = FileWriter(str(tmp_path / "x.mindrecord"), shard_num=1)
    writer.add_schema({"image": {"type": "bytes"}, "extra": {"type": "bytes"}, "label": {"type": "int64"}}, "two")
    writer.write_raw_data([{"image": folder[i].tobytes(), "extra": b"12", "label": i} for i in range(40)])
    writer.commit()
    direct, other = open_source(str(packed)), open_source(str(tmp_path))
    assert direct.direct and not other.direct
    assert sorted(other[i].tobytes() for i in range(40)) == sorted(direct[i].tobytes() for i in range(40))
    config = DataConfig(workers=1)
    data = TrainPipeline(other, config, (16, 16), 3, 4, seed=3)
    for batch in data.epoch(1):
        assert len(set(batch.ids.tolist())) == 4
    running = data.epoch(0)
    first = next(running)
    running.close()
    np.testing.assert_array_equal(next(data.epoch(0)).images, first.images)


def test_a_shard_that_is_gone(packed, tmp_path):
    """What cannot be opened any more is an unreadable image with the system's reason."""
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    source = open_source(str(tmp_path))
    (tmp_path / "images-00001-of-00003.mindrecord").unlink()
    assert source[0].size
    with pytest.raises(UnreadableImage, match="No such file"):
        source[20]


def test_half_of_the_records_are_bad(tree, tmp_path):
    """Stand-ins for many images of a small set: MindRecord takes no more numbers than it has records."""
    folder = open_source(str(tree))
    writer = FileWriter(str(tmp_path / "x.mindrecord"), shard_num=1)
    writer.add_schema({"image": {"type": "bytes"}, "label": {"type": "int64"}}, "half")
    writer.write_raw_data([{"image": folder[i].tobytes() if i % 5 == 0 else b"junk", "label": i} for i in range(40)])
    writer.commit()
    data = TrainPipeline(open_source(str(tmp_path)), DataConfig(max_bad_share=1), (16, 16), 3, 10, seed=0)
    batches = list(data.epoch(0))
    assert len(batches) == 4 and len(data.bad.ids) == 32
    assert not any((batch.labels % 5).any() for batch in batches)


def test_incomplete_sets_are_refused(packed, tmp_path):
    """A missing shard or index would otherwise train on part of the data."""
    for name, message in [
        ("images-00001-of-00003.mindrecord", "lacks"),
        ("images-00002-of-00003.mindrecord.db", "index"),
    ]:
        copy = tmp_path / name
        copy.mkdir()
        for file in packed.iterdir():
            if file.name != name:
                (copy / file.name).write_bytes(file.read_bytes())
        with pytest.raises(UserError, match=message) as error:
            open_source(str(copy))
        assert name in str(error.value)


def test_unreadable_files_are_left_out(tmp_path, capsys):
    """Named with their reason; the rest is packed; `verify` finds the same ones and ends with 1."""
    source = tmp_path / "images"
    source.mkdir()
    for k in range(6):
        cv2.imwrite(str(source / f"{k}.jpg"), draw(k, 60, 90))
    (source / "2.jpg").write_text("no image")
    cv2.imwrite(str(source / "6.webp"), draw(6, 20, 30))
    assert cli.run(main, ["verify", "--dir", str(source)]) == 1
    assert "2.jpg: not a known image format" in capsys.readouterr().out
    assert (
        cli.run(
            main, ["pack", "--src", str(source), "--dst", str(tmp_path / "set"), "--short-side", "40", "--shards", "2"]
        )
        == 0
    )
    assert "1 unreadable" in capsys.readouterr().out
    packed = open_source(str(tmp_path / "set"))
    assert [packed.name(i) for i in range(len(packed))] == [f"{k}.jpg" for k in (0, 1, 3, 4, 5)] + ["6.webp"]
    shapes = {cv2.imdecode(packed[i], cv2.IMREAD_COLOR).shape[:2] for i in range(5)}
    assert shapes == {(40, 60)}
    assert bytes(packed[5][:4]) == b"\x89PNG"  # smaller than asked: not enlarged, but in a format MindData knows
    assert cli.run(main, ["verify", "--dir", str(tmp_path / "set")]) == 0


def test_nothing_half_written(tree, tmp_path, monkeypatch):
    """A failure in the middle leaves neither the set nor remains of it."""

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(pack, "_sync", fail)
    with pytest.raises(OSError, match="disk full"):
        pack.pack(str(tree), str(tmp_path / "set"), shards=2)
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(tree, packed, tmp_path, capsys):
    """One line on stderr, exit code 2, and what is there stays."""
    before = {file.name: file.read_bytes() for file in packed.iterdir()}
    for arguments, message in [
        (["--src", str(tree), "--dst", str(packed)], "nothing is overwritten"),
        (["--src", str(tmp_path / "no"), "--dst", str(tmp_path / "x")], "does not exist"),
        (["--src", str(tree), "--dst", str(tmp_path / "no" / "x")], "does not exist"),
        (["--src", str(tree), "--dst", str(tmp_path / "x"), "--shards", "41"], "expected 1 to 40"),
        (["--src", str(tree), "--dst", str(tmp_path / "x"), "--shards", "two"], "shards"),
        (["--src", str(tree), "--dst", str(tmp_path / "x"), "--quality", "0"], "expected 1 to 100"),
        (["--src", str(tree), "--dst", str(tmp_path / "x"), "--shrads", "2"], "--shrads"),
    ]:
        assert cli.run(main, ["pack", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and error.count("\n") == 0
    assert before == {file.name: file.read_bytes() for file in packed.iterdir()}
    assert list(tmp_path.iterdir()) == []

"""PyTorch's files: every form that a state dict has is read bit for bit; nothing in a file is ever run."""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_files import Storage, TorchParameter, TorchTensor, tensors, write_legacy, write_zip

from localmim.convert.torch_file import read_torch
from localmim.errors import UserError

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "a.bias": np.array([1, -2], np.float16),
    "index": np.arange(4, dtype=np.int64),
    "scalar": np.array(3, np.int64),
    "flag": np.array([True, False]),
    "none": np.zeros((0, 3), np.float32),
}


def same(found: dict, expected: dict) -> None:
    """Equal names, types and bits."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_reads_both_formats(tmp_path, write):
    """What torch.save writes now, and what it wrote before 1.6."""
    state = read_torch(write(tmp_path / "a.pth", tensors(ARRAYS)))
    same(state.arrays, ARRAYS)
    assert state.key == "" and state.others == []


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_views_of_one_storage(tmp_path, write):
    """Slices and transposed tensors share their data in the file."""
    values = np.arange(12, dtype=np.float32)
    storage = Storage(values)
    whole = TorchTensor(values, storage=storage)
    turned = TorchTensor(values, (3, 4), (1, 3), storage=storage)
    part = TorchTensor(values, (3,), (2,), offset=5, storage=storage)
    arrays = read_torch(write(tmp_path / "a.pth", {"whole": whole, "turned": turned, "part": part})).arrays
    same(arrays, {"whole": values, "turned": values.reshape(4, 3).T, "part": values[5:11:2]})


def test_bfloat16_is_widened(tmp_path):
    """numpy has no such type; the values stay what they are, infinity and not-a-number too."""
    expected = np.array([1, -2.5, np.inf, np.nan, 2.0**-130], np.float32)
    bits = (expected.view(np.uint32) >> 16).astype(np.uint16)
    same(read_torch(write_zip(tmp_path / "a.pth", {"a": TorchTensor(bits)})).arrays, {"a": expected})


def test_bfloat16_in_safetensors(tmp_path):
    """The library has no numpy type for it either."""
    entries = {"a": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]}}
    entries["b"] = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
    header = json.dumps(entries).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x80\x3f\x20\xc0\0\0\x80\x3f")
    same(read_torch(path).arrays, {"a": np.array([[1, -2.5]], np.float32), "b": np.ones(1, np.float32)})


def test_reads_safetensors(tmp_path):
    """Through its own library."""
    save_file(ARRAYS, tmp_path / "a.safetensors")
    same(read_torch(tmp_path / "a.safetensors").arrays, ARRAYS)


def test_parameters_and_module_prefix(tmp_path):
    """What a data-parallel model saves; a prefix that only some names have stays."""
    path = write_zip(tmp_path / "a.pth", {"module.a": TorchParameter(np.ones(2, np.float32))})
    same(read_torch(path).arrays, {"a": np.ones(2, np.float32)})
    path = write_zip(tmp_path / "b.pth", tensors({"module.a": np.ones(1), "b": np.ones(1)}))
    assert set(read_torch(path).arrays) == {"module.a", "b"}


def test_what_trainers_leave_beside_the_weights(tmp_path):
    """Arguments, paths, numpy values and metadata are skipped, not refused: nearly every published file has them."""
    model = tensors(ARRAYS)
    model._metadata = OrderedDict(version=1)
    args = argparse.Namespace(lr=1e-3, out=Path("x"), betas=(0.9, 0.95), kinds={1, 2})
    content = {"model": model, "args": args, "best": np.float64(3), "curve": np.arange(3), "epoch": 7}
    state = read_torch(write_zip(tmp_path / "a.pth", content))
    same(state.arrays, ARRAYS)
    assert state.key == "model" and state.others == ["args", "best", "curve", "epoch"]


def test_only_the_chosen_weights_are_read(tmp_path):
    """The optimizer's state is twice the model: its data may even be gone."""
    storage = Storage(np.ones(3, np.float32))
    storage.data = b""
    content = {"model": tensors(ARRAYS), "optimizer": {"state": {0: TorchTensor(np.ones(3), storage=storage)}}}
    path = write_zip(tmp_path / "a.pth", content)
    same(read_torch(path).arrays, ARRAYS)
    with pytest.raises(UserError, match="state is no tensor"):
        read_torch(path, "optimizer")


def test_key(tmp_path):
    """The averaged weights are taken when they are asked for; without a known key the keys are told."""
    one, two = {"a": np.ones(1, np.float32)}, {"a": np.full(1, 2, np.float32)}
    path = write_zip(tmp_path / "a.pth", {"model_ema": tensors(two), "model": tensors(one)})
    same(read_torch(path).arrays, one)
    same(read_torch(path, "model_ema").arrays, two)
    with pytest.raises(UserError, match="no weights under the key 'teacher'; it has model_ema, model"):
        read_torch(path, "teacher")
    with pytest.raises(UserError, match=r"no weights are found.* it has student, epoch"):
        read_torch(write_zip(tmp_path / "b.pth", {"student": tensors(one), "epoch": 1}))


class Evil:
    """Calls a function when it is unpickled the usual way."""

    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


class EvilTensor(TorchTensor):
    """A tensor whose storage is a call."""

    def __reduce__(self):
        rebuild, (_, *rest) = super().__reduce__()
        return rebuild, (Evil(os.system, f"touch {self.storage}"), *rest)


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda m: {"model": Evil(os.system, f"touch {m}")}, "posix.system"),
        (lambda m: {"model": tensors(ARRAYS), "args": Evil(eval, f"open({m!r}, 'w')")}, "builtin__.eval"),
        (lambda m: {"a": TorchTensor(np.ones(1)), "b": Evil(exec, f"open({m!r}, 'w')")}, "builtin__.exec"),
        (lambda m: {"a": EvilTensor(np.ones(1), storage=m)}, "posix.system"),
        (lambda m: OrderedDict([(Evil(subprocess.check_output, ["touch", m]), 1)]), "commands.check_output"),
        (lambda m: [Evil(functools.partial, os.mkdir, m)], "functools.partial"),
        (lambda m: Evil(getattr, argparse.Namespace, "__init__"), "builtin__.getattr"),
        (lambda m: Evil(os.mkdir, m), "posix.mkdir"),
    ],
)
def test_calls_are_refused(tmp_path, write, make, named):
    """The file would run a program: it is refused by the function's name, in one line, and nothing is run."""
    mark = tmp_path / "was_run"
    path = write(tmp_path / "a.pth", make(str(mark)))
    with pytest.raises(UserError, match=rf"a.pth: its pickle is refused: it wants to use .*{named}") as caught:
        read_torch(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_the_evil_files_are_evil(tmp_path):
    """Read by an unsafe reader they do run what they hold, or the test above would prove nothing."""
    mark = tmp_path / "was_run"
    path = write_zip(tmp_path / "a.pth", {"model": Evil(os.mkdir, str(mark))})
    with zipfile.ZipFile(path) as archive:
        pickle.loads(archive.read("archive/data.pkl"))
    assert mark.exists()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\x80\x04\x8c\x05torch\x8c\x11storage.os.system\x93.", "torch.storage.os.system"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x04\0\0\0callK\x01s\x86b.", "changes a function"),
        (b"\x80\x02cargparse\nNamespace\nN}X\x08\0\0\0__init__K\x01s\x86b.", "is refused"),
        (b"\x80\x02ctorch\nload\n.", "torch.load"),
        (b"\x80\x02ctorch\n\x1b[2J" + b"x" * 999 + b"\n.", r"torch\.\?\[2Jx{200,300}…$"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "asks for memory at 4294967295"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00ab.", "is refused"),
        (b"\x80\x02\x82\x01.", "is refused"),
        (b"\x80\x02}", "is refused"),
        (b"", "is refused"),
        (b"\x80\x02K\x01.", "no dict of weights"),
        (b"\x80\x02K\x01Q.", "is refused"),
        (
            b"\x80\x02(X\x07\0\0\0storageX\x0c\0\0\0FloatStorageX\x01\0\0\x000X\x03\0\0\0cpuJ\xff\xff\xff\xfftQ.",
            "no sense",
        ),
    ],
)
def test_crafted_pickles_are_refused(tmp_path, raw, said):
    """Dotted names, changes to what may be called, huge numbers, registered extensions, ends that are missing."""
    with pytest.raises(UserError, match=said) as caught:
        read_torch(write_zip(tmp_path / "a.pth", raw=raw))
    assert "\n" not in str(caught.value)


def short(numel: int) -> TorchTensor:
    """A tensor whose storage claims `numel` values and holds two."""
    storage = Storage(np.ones(2, np.float32))
    storage.numel = numel
    return TorchTensor(np.ones(numel, np.float32), storage=storage)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (short(4), "a: its data are 8 bytes, expected 16"),
        (TorchTensor(np.ones(4), shape=(5,)), r"a: its shape \[5\] reaches beyond the 4 values"),
        (TorchTensor(np.ones(4), offset=1), "reaches beyond"),
        (TorchTensor(np.ones(4), strides=(2,)), "reaches beyond"),
        (TorchTensor(np.ones(4), shape=(10**12,), strides=(0,)), "reaches beyond"),
        (TorchTensor(np.ones(0), shape=(), strides=()), "reaches beyond"),
        (TorchTensor(np.ones(4), strides=(-1,)), "makes no sense"),
        (TorchTensor(np.ones(4), shape=(4, 1)), "makes no sense"),
        (TorchTensor(np.ones(4), shape=(True,)), "makes no sense"),
        (TorchTensor(np.ones(4), shape=(1,) * 80, strides=(1,) * 80), "makes no sense"),
        (TorchTensor(np.ones(0), shape=(0, 10**30), strides=(1, 1)), "a: "),
        (3, "no weights are found: expected a key model, .* it has a"),
    ],
)
def test_tensors_that_do_not_fit_their_data(tmp_path, tensor, said):
    """No read outside the file, no array larger than what is stored."""
    with pytest.raises(UserError, match=said):
        read_torch(write_zip(tmp_path / "a.pth", {"a": tensor}))


def test_damaged_zip(tmp_path):
    """Cut off anywhere, a changed byte, an entry compressed (a bomb can be small) or lost, the other byte order."""
    path = write_zip(tmp_path / "a.pth", tensors({"a": np.arange(999, dtype=np.float32)}))
    good = path.read_bytes()
    for size in (3, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(UserError, match="no complete zip"):
            read_torch(path)
    at = good.index(np.float32(500).tobytes())
    path.write_bytes(good[:at] + b"\1" + good[at + 1 :])
    with pytest.raises(UserError, match=r"a: the entry archive/data/0 is damaged"):
        read_torch(path)
    path.write_bytes(good.replace(b"archive/data/0", b"archive/data/1"))
    with pytest.raises(UserError, match="a: its data are missing"):
        read_torch(path)
    with pytest.raises(UserError, match=r"archive/\w+.* is compressed"):
        read_torch(write_zip(path, tensors(ARRAYS), compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="highest byte first"):
        read_torch(write_zip(path, tensors(ARRAYS), byteorder="big"))


def test_damaged_legacy(tmp_path):
    """The same for the older format."""
    path = write_legacy(tmp_path / "a.pth", tensors({"a": np.arange(999, dtype=np.float32)}))
    good = path.read_bytes()
    for size in (1, 30, 100, len(good) - 999 * 4 - 3, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(UserError, match="cannot read"):
            read_torch(path)
    with pytest.raises(UserError, match="holds 2 values of storage 0, expected 4"):
        content = {"a": short(4)}
        path.write_bytes(write_legacy(path, content).read_bytes().replace(b"\4" + b"\0" * 7, b"\2" + b"\0" * 7))
        read_torch(path)
    with pytest.raises(UserError, match="highest byte first"):
        read_torch(write_legacy(path, tensors(ARRAYS), little=False))


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x89HDF\r\n", pickle.dumps(1)])
def test_other_files(tmp_path, content):
    """Not PyTorch's at all."""
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*a\.pth: .+") as caught:
        read_torch(path)
    assert "\n" not in str(caught.value)


def test_names_that_cannot_be_shown(tmp_path):
    """Names go into reports and onto a terminal."""
    for name in ("a\x1b[2J", "a\nb", 3):
        with pytest.raises(UserError, match="no printable text"):
            read_torch(write_zip(tmp_path / "a.pth", {"model": {name: TorchTensor(np.ones(1))}}))


def test_types_that_are_not_read(tmp_path):
    """An eighth of a float is no numpy type; the tensor is named."""
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    with pytest.raises(UserError, match="a is of type F8_E4M3, which is not read here"):
        read_torch(tmp_path / "a.safetensors")


def test_no_file(tmp_path):
    """A missing file, a folder, a broken .safetensors."""
    (tmp_path / "b.safetensors").write_bytes(b"12345")
    for name in ("a.pth", "a.safetensors", "", "b.safetensors"):
        with pytest.raises(UserError, match="cannot read"):
            read_torch(tmp_path / name)

"""Writes files as `torch.save` does, without PyTorch: stand-ins for its classes are pickled under its names."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from unittest import mock

import numpy as np

STORAGES = {"<f4": "Float", "<f8": "Double", "<f2": "Half", "<i8": "Long", "<u2": "BFloat16", "|b1": "Bool"}


class Storage:
    """Raw values; `numel` and `data` can be made to disagree."""

    def __init__(self, array: np.ndarray):
        self.kind = STORAGES[array.dtype.str]
        self.numel, self.data, self.key = array.size, array.tobytes(), ""


class TorchTensor:
    """An array as a tensor; shape, strides and offset, in values, can be made wrong."""

    def __init__(self, array, shape=None, strides=None, offset=0, storage=None):
        array = np.asarray(array)
        self.storage = storage or Storage(np.ascontiguousarray(array))
        self.shape = array.shape if shape is None else shape
        usual = tuple(s // array.itemsize for s in np.ascontiguousarray(array).strides) if array.ndim else ()
        self.strides = usual if strides is None else strides
        self.offset = offset

    def __reduce__(self):
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (self.storage, self.offset, self.shape, self.strides, False, OrderedDict())


class TorchParameter(TorchTensor):
    """The same as a parameter."""

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_parameter, (TorchTensor(0, storage=self.storage, **self.view()),)

    def view(self):
        return {"shape": self.shape, "strides": self.strides, "offset": self.offset}


@contextlib.contextmanager
def torch_names():
    """`torch` and `torch._utils` with what a state dict names, for as long as it takes to pickle one."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for kind in STORAGES.values():
        setattr(torch, f"{kind}Storage", type(f"{kind}Storage", (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda *args: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    with mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        yield


class _Pickler(pickle.Pickler):
    def __init__(self, file, legacy: bool = False):
        super().__init__(file, protocol=2)
        self.legacy, self.storages = legacy, []

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        if value not in self.storages:
            value.key = str(len(self.storages))
            self.storages.append(value)
        kind = getattr(sys.modules["torch"], f"{value.kind}Storage")
        return ("storage", kind, value.key, "cpu", value.numel, *([None] if self.legacy else []))


def write_zip(path, content=None, raw: bytes | None = None, compression=zipfile.ZIP_STORED, byteorder="little"):
    """A file of PyTorch 1.6 or later; `raw` takes the place of the pickle."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    if raw is None:
        with torch_names():
            pickler.dump(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue() if raw is None else raw)
        archive.writestr("archive/byteorder", byteorder)
        for storage in pickler.storages:
            archive.writestr(f"archive/data/{storage.key}", storage.data)
        archive.writestr("archive/version", "3\n")
    return path


def write_legacy(path, content, little=True):
    """A file of an earlier PyTorch."""
    with open(path, "wb") as file, torch_names():
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": little, "type_sizes": {"int": 4}}):
            pickle.dump(value, file, protocol=2)
        pickler = _Pickler(file, legacy=True)
        pickler.dump(content)
        pickle.dump([storage.key for storage in pickler.storages], file, protocol=2)
        for storage in pickler.storages:
            file.write(struct.pack("<q", storage.numel) + storage.data)
    return path


def tensors(arrays: dict[str, np.ndarray]) -> OrderedDict:
    """A state dict of arrays."""
    return OrderedDict((name, TorchTensor(array)) for name, array in arrays.items())

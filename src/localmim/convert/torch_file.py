"""PyTorch's weight files as arrays, without running anything that is in them.

A `.pth` file is a pickle beside raw tensor data, and a pickle may name any function to be called. Here it may name only
what a state dict needs: tensors, dicts, and stand-ins that swallow what trainers leave beside the weights (arguments,
numpy scalars) and hold nothing. Everything else is refused by name. Files of PyTorch 1.6 and later (a zip archive) and
of earlier releases (pickles, then data) are read; `.safetensors` too. Tensor data is mapped, not read: arrays are views
of the file until they are copied.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickle
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open

from localmim.errors import UserError

STATE_KEYS = ("model", "state_dict", "model_state", "model_ema", "state_dict_ema", "module")  # of trainers
BFLOAT16 = "bfloat16"
_TYPES = {
    "Float": "<f4", "Double": "<f8", "Half": "<f2", "BFloat16": BFLOAT16,
    "Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "?",
}  # fmt: skip
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MAX_AXES = 32  # numpy's own limit, which its strided views do not check
_LONGEST = 300  # characters of an error
_BIG_ENDIAN = "its values are stored highest byte first, which is not read here"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature, lengths of the name and of the extra field


class StateDict(NamedTuple):
    """Arrays by name, the key of the file that they stood under (empty: none), and the keys it has besides."""

    arrays: dict[str, np.ndarray]
    key: str
    others: list[str]


def read_torch(path: str | os.PathLike, key: str = "") -> StateDict:
    """The state dict in a `.pth`, `.pt`, `.bin` or `.safetensors` file.

    Args:
        path: The file.
        key: Which of its entries; empty: the whole file if it is a state dict, else the first of `STATE_KEYS` there.

    Returns:
        Read-only arrays, bfloat16 widened to float32. A `module.` in front of all names is taken off.

    Raises:
        UserError: The file cannot be read, is damaged, names something that is not allowed, or holds no state dict.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if path.suffix == ".safetensors":
            content = _read_safetensors(path)
        elif size == 0:
            raise ValueError("it is empty")
        else:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            content = _read_zip(data) if data[:2] == b"PK" else _read_legacy(data)
        return _choose(content, key)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {_one_line(str(error))}") from error


def _one_line(text: str) -> str:
    """Fit to be shown, though a file may have chosen the words: no line breaks, no control characters, not endless."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class _Sealed:
    """Made by a pickle, and closed to it: a pickle may set attributes of what it makes, unless that says no."""

    __slots__ = ()

    def __setstate__(self, state):
        raise pickle.UnpicklingError(f"it changes a {type(self).__name__.strip('_').lower()}")


class _Inert(_Sealed):
    """Stands for a value that is not needed: takes anything, holds nothing."""

    __slots__ = ()

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass

    add = append


class _Dict(dict):
    """An OrderedDict; what PyTorch hangs on a state dict besides its items (`_metadata`) is left out."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


class _Function(_Sealed):
    """What a pickle may call."""

    __slots__ = ("call",)

    def __init__(self, call):
        self.call = call

    def __call__(self, *args):
        return self.call(*args)


class _Storage(_Sealed):
    """A piece of raw data: its key in the file, its type, the values in it, and what finds its bytes."""

    __slots__ = ("dtype", "find", "key", "numel")

    def __init__(self, dtype: str, key: str, numel: int):
        self.dtype, self.key, self.numel = dtype, key, numel

    @property
    def stored(self) -> np.dtype:
        """numpy's type of the values; bfloat16, which it has not, is uint16."""
        return np.dtype("<u2" if self.dtype == BFLOAT16 else self.dtype)

    @property
    def nbytes(self) -> int:
        return self.numel * self.stored.itemsize

    def values(self) -> np.ndarray:
        """[numel], a view of the file.

        Raises:
            ValueError: They are missing, damaged or of another size.
        """
        data = self.find(self.key)
        if len(data) != self.nbytes:
            raise ValueError(f"its data are {len(data)} bytes, expected {self.nbytes}")
        return np.frombuffer(data, self.stored)


class _Tensor(_Sealed):
    """A view of a storage that has not been made yet; all in numbers of values."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage, offset, shape, strides, *_):
        whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
        if not isinstance(storage, _Storage) or not whole or not len(strides) == len(shape) <= _MAX_AXES:
            raise pickle.UnpicklingError("it describes a tensor that makes no sense")
        self.storage, self.offset = storage, offset
        self.shape, self.strides = tuple(shape), tuple(strides)

    def array(self) -> np.ndarray:
        """The values, a view of the file wherever that can be.

        Raises:
            ValueError: The file does not hold them.
        """
        bfloat16 = self.storage.dtype == BFLOAT16
        count = math.prod(self.shape)
        if not count:
            return np.zeros(self.shape, np.float32 if bfloat16 else self.storage.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides))
        if max(last + 1, count) > self.storage.numel:
            raise ValueError(f"its shape {list(self.shape)} reaches beyond the {self.storage.numel} values stored")
        values = self.storage.values()
        strides = [s * values.itemsize if n > 1 else 0 for n, s in zip(self.shape, self.strides)]
        array = np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides, writeable=False)
        if bfloat16:
            return widen(array)
        return array if array.flags.aligned else array.copy()


_ARRAYS = (_Tensor, np.ndarray)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16, given as the uint16 of its bits, to float32: exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _parameter(data, requires_grad=True, hooks=None):
    return data


def _allowed() -> dict[tuple[str, str], object]:
    """What a pickle may name: (module, name) to what it gets, made anew for each file."""
    tensor = _Function(_Tensor)
    known = {
        ("collections", "OrderedDict"): _Dict,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_tensor"): tensor,
        ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
        ("torch", "Size"): _Function(tuple),
    }
    for name in _TYPES:
        known["torch", f"{name}Storage"] = f"{name}Storage"
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"):
        known["torch", name] = name
    for name in (
        "argparse.Namespace", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "torch.device",
        "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "_codecs.encode",
        "collections.defaultdict", "builtins.set", "__builtin__.set", "yacs.config.CfgNode",
    ):  # fmt: skip
        known[tuple(name.rsplit(".", 1))] = _Inert
    return known


class _Unpickler(pickle.Unpickler):
    """Knows what is allowed, and collects the storages that the pickle names."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.allowed, self.storages = _allowed(), {}

    def find_class(self, module: str, name: str):
        found = self.allowed.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(
                f"it wants to use {module}.{name}, which no weights need: such a file can run any program, so it is "
                "not opened"
            )
        return found

    def persistent_load(self, pid):
        kind, storage_type, key, _, numel, *view = pid
        dtype = _TYPES.get(str(storage_type).removesuffix("Storage"))
        if kind != "storage" or dtype is None or type(numel) is not int or numel < 0 or any(view):
            raise pickle.UnpicklingError("it describes a storage that makes no sense")
        storage = self.storages.setdefault(str(key), _Storage(dtype, str(key), numel))
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise pickle.UnpicklingError(f"it describes storage {key} in two ways")
        return storage


def _unpickle(stream) -> tuple[object, dict[str, _Storage]]:
    """The next pickle of a stream, and the storages in it.

    Its operations are walked through first, which runs nothing: they must be complete, and none may name a place in
    the unpickler's memory that is farther than the pickle is long (it would be made, however large).

    Raises:
        ValueError: The pickle is damaged or names something that is not allowed.
    """
    start = stream.tell()
    try:
        for operation, argument, _ in pickletools.genops(stream):
            if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > stream.tell() - start:
                raise ValueError(f"it asks for memory at {argument}")
        end = stream.tell()
        stream.seek(start)
        unpickler = _Unpickler(stream.read(end - start))
        return unpickler.load(), unpickler.storages
    except Exception as error:  # what a damaged pickle raises is not specified
        raise ValueError(f"its pickle is refused: {str(error) or type(error).__name__}") from error


def _read_zip(data: mmap.mmap) -> object:
    """What `torch.save` wrote since PyTorch 1.6. Its entries are never compressed, so no file is larger than it is."""
    try:
        with zipfile.ZipFile(data) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, struct.error) as error:
        raise ValueError(f"it is no complete zip archive ({error})") from error
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("the archive has no data.pkl: PyTorch did not write it")
    folder = pickles[0].removesuffix("data.pkl")
    if folder + "byteorder" in entries and bytes(_entry(data, entries[folder + "byteorder"])) != b"little":
        raise ValueError(_BIG_ENDIAN)
    content, storages = _unpickle(io.BytesIO(_entry(data, entries[pickles[0]])))

    def find(key: str) -> memoryview:
        entry = entries.get(f"{folder}data/{key}")
        if entry is None:
            raise ValueError("its data are missing")
        return _entry(data, entry)

    for storage in storages.values():
        storage.find = find
    return content


def _entry(data: mmap.mmap, entry: zipfile.ZipInfo) -> memoryview:
    """The bytes of a stored entry, checked."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise ValueError(f"the entry {entry.filename} is compressed or encrypted: PyTorch did not write it")
    header = data[entry.header_offset : entry.header_offset + _LOCAL_HEADER.size]
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise ValueError(f"the entry {entry.filename} is not where it should be")
    _, name, extra = _LOCAL_HEADER.unpack(header)
    start = entry.header_offset + _LOCAL_HEADER.size + name + extra
    content = memoryview(data)[start : start + entry.file_size]
    if len(content) != entry.file_size:
        raise ValueError(f"the entry {entry.filename} is cut off")
    if zlib.crc32(content) != entry.CRC:
        raise ValueError(f"the entry {entry.filename} is damaged: its checksum does not match")
    return content


def _read_legacy(data: mmap.mmap) -> object:
    """What `torch.save` wrote before PyTorch 1.6: a magic number, version, machine, content, storage keys, data."""
    if _unpickle(data)[0] != _LEGACY_MAGIC or _unpickle(data)[0] != _LEGACY_PROTOCOL:
        raise ValueError("it is neither of PyTorch's formats")
    machine, _ = _unpickle(data)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError(_BIG_ENDIAN)
    content, storages = _unpickle(data)
    keys, _ = _unpickle(data)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise ValueError("its list of tensor data does not fit its content")
    start, places = data.tell(), {}
    for key in keys:
        if len(data) < start + 8:
            raise ValueError("it is cut off")
        (numel,) = struct.unpack("<q", data[start : start + 8])
        if numel != storages[key].numel:
            raise ValueError(f"it holds {numel} values of storage {key}, expected {storages[key].numel}")
        places[key] = start + 8
        start += 8 + storages[key].nbytes

    def find(key: str) -> memoryview:
        if key not in places:
            raise ValueError("its data are missing")
        return memoryview(data)[places[key] : places[key] + storages[key].nbytes]

    for storage in storages.values():
        storage.find = find
    return content


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    with safe_open(path, framework="np") as file:
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
        for name, kind in types.items():
            if kind != "BF16":
                try:
                    arrays[name] = file.get_tensor(name)
                except (TypeError, AttributeError) as error:  # numpy has no such type, or none by that name
                    raise ValueError(f"{name} is of type {kind}, which is not read here") from error
    if "BF16" in types.values():  # numpy has no such type
        raw = dict(deserialize(path.read_bytes()))
        for name in types.keys() - arrays.keys():
            arrays[name] = widen(np.frombuffer(raw[name]["data"], "<u2").reshape(raw[name]["shape"]))
    return {name: arrays[name] for name in types}


def _choose(content: object, key: str) -> StateDict:
    """The state dict in what a file holds.

    Raises:
        ValueError: There is none, or not under that key.
    """
    if not isinstance(content, dict):
        raise ValueError("it holds no dict of weights")
    names = [name for name in content if isinstance(name, str)]
    if not key and not any(isinstance(value, _ARRAYS) for value in content.values()):
        held = [k for k in STATE_KEYS if isinstance(content.get(k), dict)]
        if not held:
            raise ValueError(f"no weights are found: expected a key {', '.join(STATE_KEYS)}; it has {_few(names)}")
        key = held[0]
    if key and not isinstance(content.get(key), dict):
        raise ValueError(f"there are no weights under the key {key!r}; it has {_few(names)}")
    chosen = content[key] if key else content
    arrays = {}
    for name, value in chosen.items():
        if not isinstance(name, str) or not name.isprintable():
            raise ValueError("it holds a name that is no printable text, so these are not the weights of a model")
        if not isinstance(value, _ARRAYS):
            raise ValueError(f"{name} is no tensor, so these are not the weights of a model")
        try:
            arrays[name] = value if isinstance(value, np.ndarray) else value.array()
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{name}: {error}") from error
    if not arrays:
        raise ValueError("it holds no weights")
    if all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    return StateDict(arrays, key, [name for name in names if key and name != key])


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "no names"

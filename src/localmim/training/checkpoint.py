"""Checkpoints that survive a kill, a full disk and a damaged file: one hashed folder a step, put in place by a rename.

    DIR/step_00001234/weights.safetensors    the model; its header also holds the resolved config
                      average.safetensors    the moving average of the weights, where the recipe keeps one
                      optimizer.safetensors  the moments
                      state.json             step, epoch, loss scaler, counters, position in the data
                      config.yaml            the resolved config
                      manifest.json          size and SHA-256 of the files above, written last
    DIR/LATEST                               the name of the newest folder

A folder is written under a hidden name, synced, and renamed; only then LATEST is replaced. So whatever has a step's
name is complete, and at each moment of a save the checkpoint before it is still there. Hidden names are `.saving_*`
(not complete yet), `.replaced_*` (an older save of the same step, put aside) and `.removing_*` (on its way out); what a
killed run leaves of them is cleared by the next save. One process writes to a directory; any number may read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from localmim.errors import UserError
from localmim.files import file_sha256

FORMAT = "localmim-1"
WEIGHTS, OPTIMIZER, STATE, CONFIG = "weights.safetensors", "optimizer.safetensors", "state.json", "config.yaml"
AVERAGE = "average.safetensors"  # a weights file like the other
FILES = (WEIGHTS, OPTIMIZER, STATE, CONFIG)
MANIFEST = "manifest.json"
LATEST = "LATEST"

_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_SAVING, _REPLACED, _REMOVING = ".saving_", ".replaced_", ".removing_"
_DTYPES = {  # numpy's names to those of the safetensors format
    "bool": "BOOL", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64",
}  # fmt: skip

log = logging.getLogger("localmim.checkpoint")


class Checkpoint:
    """One saved state of a run. Nothing but the header is read before it is asked for.

    `path`: a step folder, or a weights file alone (then there is no `state` and no `optimizer()`).
    Every reading error is a UserError of one line. Get one from `read_checkpoint` or `CheckpointStore.latest`, which
    also check the hashes.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r})"

    @cached_property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self._metadata["step"])

    @cached_property
    def config(self) -> dict:
        """The resolved config of the run, as a plain nested dict."""
        return yaml.safe_load(self._metadata["config"])

    @cached_property
    def state(self) -> dict:
        """What was given to `save` as the state."""
        path = self._part(STATE)
        with _reading(path):
            return json.loads(path.read_text("utf-8"))

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes that a classifier was trained on; empty if there are none."""
        return json.loads(self._metadata.get("classes", "[]"))

    @property
    def has_average(self) -> bool:
        """Whether a moving average of the weights was kept."""
        return self.path.suffix != ".safetensors" and self._part(AVERAGE).exists()

    def weights(self) -> dict[str, np.ndarray]:
        """Name to array, bit for bit as saved; read anew at each call."""
        arrays = self._tensors(WEIGHTS)
        if self.config.get("task") == "linear_probe":  # earlier versions stored the ones and zeros of no affine part
            arrays = {name: array for name, array in arrays.items() if name not in ("norm.gamma", "norm.beta")}
        return arrays

    def average(self) -> dict[str, np.ndarray]:
        """The moving average of the weights, as `weights`."""
        return self._tensors(AVERAGE)

    def optimizer(self) -> dict[str, np.ndarray]:
        """Name to array, bit for bit as saved; read anew at each call."""
        return self._tensors(OPTIMIZER)

    @cached_property
    def _metadata(self) -> dict[str, str]:
        path = self._part(WEIGHTS)
        with _reading(path), safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise UserError(
                f"{path} is no checkpoint of this project: its header says format {metadata.get('format')!r}, "
                f"expected {FORMAT!r}"
            )
        return metadata

    def _tensors(self, name: str) -> dict[str, np.ndarray]:
        path = self._part(name)
        with _reading(path):
            return load_file(path)

    def _part(self, name: str) -> Path:
        if self.path.suffix != ".safetensors":
            return self.path / name
        if name == WEIGHTS:
            return self.path
        raise UserError(f"{self.path} holds weights only: to go on with its run, give the step folder with {name}")


class CheckpointStore:
    """The checkpoints of one run, in `directory` (made by the first save). The newest `keep` good ones stay."""

    def __init__(self, directory: str | os.PathLike, keep: int = 2):
        if keep < 1:
            raise UserError(f"checkpoint.keep is {keep}: expected at least 1")
        self.directory = Path(directory)
        self.keep = keep
        self._damaged: set[int] = set()  # steps whose files did not match their hashes

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.directory / f"step_{step:08d}"

    def save(
        self,
        step: int,
        weights: Mapping[str, np.ndarray],
        optimizer: Mapping[str, np.ndarray],
        state: dict,
        config: dict,
        average: Mapping[str, np.ndarray] | None = None,
        classes: list[str] | None = None,
    ) -> Path:
        """Write the checkpoint of `step`, make it the latest, and remove the oldest; returns its folder.

        `weights`, `optimizer`, `average`: name to array of any shape, of bool, integer, float16/32/64 or complex64.
        `state`: plain values for JSON (its tuples come back as lists). `config`: plain nested dict.
        `classes`: names of a classifier's classes.
        A checkpoint of the same step is replaced. Raises UserError when the disk does not take it; what was saved
        before stays as it was.
        """
        final = self.path(step)
        name = final.name
        temporary, replaced = (self.directory / (prefix + name) for prefix in (_SAVING, _REPLACED))
        metadata = weights_header(step, config, classes)
        contents = {
            WEIGHTS: _tensor_chunks(weights, metadata),
            OPTIMIZER: _tensor_chunks(optimizer, {"format": FORMAT, "step": str(step)}),
            STATE: [_json_bytes(state)],
            CONFIG: [metadata["config"].encode()],
        }
        if average is not None:
            contents[AVERAGE] = _tensor_chunks(average, metadata)
        try:
            _make_folder(self.directory)
            self._clear_leftovers()
            temporary.mkdir()
            files = {file: _write_file(temporary / file, chunks) for file, chunks in contents.items()}
            _write_file(temporary / MANIFEST, [_json_bytes({"format": FORMAT, "step": step, "files": files})])
            _sync_folder(temporary)
            if final.exists():
                os.rename(final, replaced)
            os.rename(temporary, final)
            _sync_folder(self.directory)
            self._point_to(name)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if os.path.exists(replaced) and not os.path.exists(final):
                with contextlib.suppress(OSError):  # read from where it is until a save can move it back
                    os.rename(replaced, final)
            if isinstance(error, OSError):
                raise UserError(
                    f"cannot save the checkpoint of step {step} in {self.directory}: {error.strerror or error}; "
                    "the checkpoints before it are untouched"
                ) from error
            raise
        self._damaged.discard(step)
        self._remove_old(step)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose files match their hashes; None if nothing was ever saved here.

        A damaged one costs one line of warning, and the one before it is used.
        Raises UserError if there are checkpoints and none is good.
        """
        folders = self._folders()
        pointer = self.directory / LATEST
        newest_first = sorted(folders, reverse=True)
        problem = None
        try:
            match = _STEP_FOLDER.fullmatch(pointer.read_bytes().decode(errors="replace").strip())
            if match and int(match[1]) in folders:
                newest_first.remove(int(match[1]))
                newest_first.insert(0, int(match[1]))
            else:
                problem = "does not name a checkpoint that is there"
        except FileNotFoundError:
            if not folders:
                return None
            problem = "is missing"
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        if problem and folders:
            log.warning("%s %s: using the newest good checkpoint beside it", pointer, problem)

        damaged = {}
        for step in newest_first:
            damage = _damage(folders[step])
            if damage is None:
                return Checkpoint(folders[step])
            log.warning("checkpoint %s is damaged (%s): trying the one before it", folders[step], damage)
            damaged[step] = f"{folders[step].name} ({damage})"
            self._damaged.add(step)
        found = ", ".join(damaged.values()) or f"{LATEST} {problem}"
        raise UserError(
            f"no usable checkpoint in {self.directory}: {found}; move that folder away to start from nothing"
        )

    def _folders(self) -> dict[int, Path]:
        """Step to folder. One put aside by a save that was killed before its own rename counts as well."""
        folders = {}
        for prefix in ("", _REPLACED):
            for path in self.directory.glob(prefix + "step_*"):
                match = _STEP_FOLDER.fullmatch(path.name[len(prefix) :])
                if match and path.is_dir():
                    folders.setdefault(int(match[1]), path)
        return folders

    def _clear_leftovers(self) -> None:
        """Undo or finish what a killed run had begun."""
        for path in self.directory.glob(_REPLACED + "step_*"):
            original = path.with_name(path.name[len(_REPLACED) :])
            if not original.exists():
                os.rename(path, original)
        for prefix in (_SAVING, _REPLACED, _REMOVING):
            for path in self.directory.glob(prefix + "step_*"):
                shutil.rmtree(path)

    def _point_to(self, name: str) -> None:
        temporary = self.directory / f".{LATEST}"
        _write_file(temporary, [f"{name}\n".encode()])
        os.replace(temporary, self.directory / LATEST)
        _sync_folder(self.directory)

    def _remove_old(self, saved: int) -> None:
        """Remove what is older than the `keep` newest good checkpoints up to step `saved`.

        What `latest` found damaged does not count as good; of the others only the sizes are checked here. Folders
        without a readable manifest are not this store's, and stay.
        """
        folders = self._folders()
        good = [saved] + [
            step
            for step in sorted(folders, reverse=True)
            if step < saved and step not in self._damaged and _damage(folders[step], hashes=False) is None
        ]
        oldest = good[: self.keep][-1]
        try:
            replaced = self.directory / f"{_REPLACED}step_{saved:08d}"
            if replaced.exists():
                shutil.rmtree(replaced)
            for step, folder in folders.items():
                if step < oldest and _has_manifest(folder):
                    removing = folder.with_name(_REMOVING + folder.name)
                    os.rename(folder, removing)
                    shutil.rmtree(removing)
        except OSError as error:
            log.warning("cannot remove the old checkpoint %s: %s", error.filename, error.strerror)


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """The checkpoint at `path`, its hashes checked.

    `path`: a step folder; a run's folder or its `checkpoints` folder (then the newest good one); or a
    `weights.safetensors` file, wherever it was copied to (there are no hashes to check if it was copied alone).
    Raises UserError if it is none of these, or damaged.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        checkpoint = Checkpoint(path)
        in_place = path.name in (WEIGHTS, AVERAGE) and (path.parent / MANIFEST).exists()
        damage = _damage(path.parent, names=(path.name,)) if in_place else None
    elif path.is_dir() and (_STEP_FOLDER.fullmatch(path.name) or (path / MANIFEST).exists()):
        checkpoint = Checkpoint(path)
        damage = _damage(path)
    elif path.is_dir():
        for directory in (path, path / "checkpoints"):
            newest = CheckpointStore(directory).latest()
            if newest is not None:
                return newest
        raise UserError(f"no checkpoint in {path}: expected a run's folder, a step_* folder or a .safetensors file")
    else:
        problem = "is not a checkpoint" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}: expected a run's folder, a step_* folder or a .safetensors file")
    if damage is not None:
        raise UserError(f"checkpoint {path} is damaged: {damage}")
    _ = checkpoint.step  # its header must be one of ours
    return checkpoint


def write_weights(path: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, str]) -> None:
    """A safetensors file alone, written aside and renamed.

    Raises:
        UserError: The disk does not take it.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_file(aside, _tensor_chunks(arrays, dict(header)))
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)


def weights_header(step: int, config: dict, classes: list[str] | None = None) -> dict[str, str]:
    """What a weights file says about itself."""
    header = {
        "format": FORMAT,
        "step": str(step),
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
    }
    return {**header, "classes": json.dumps(classes, ensure_ascii=False)} if classes else header


def _damage(folder: Path, names: Iterable[str] | None = None, hashes: bool = True) -> str | None:
    """What is wrong with a step folder, or with `names` in it, in a few words; None if all is as the manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["format"] != FORMAT:
            return f"{MANIFEST}: format {manifest['format']!r}, expected {FORMAT!r}"
        match = _STEP_FOLDER.search(folder.name)
        if match and manifest["step"] != int(match[1]):
            return f"{MANIFEST}: step {manifest['step']}, unlike the folder's name"
        for name in dict.fromkeys([*FILES, *manifest["files"]]) if names is None else names:
            expected, size = manifest["files"][name], (folder / name).stat().st_size
            if size != expected["size"]:
                return f"{name}: {size} bytes, expected {expected['size']}"
            if hashes and file_sha256(folder / name) != expected["sha256"]:
                return f"{name}: contents do not match the hash"
    except OSError as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST}: not readable"
    return None


def _has_manifest(folder: Path) -> bool:
    try:
        return json.loads((folder / MANIFEST).read_text("utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _tensor_chunks(tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> Iterator:
    """The bytes of a safetensors file: header length (8 bytes), header (JSON), then the arrays, widest type first.

    Written here so that one pass over the arrays both hashes and stores them, with no copy, and so that a full disk
    is the OSError that it is. The arrays are checked before this returns.
    """
    arrays = {}
    for name, value in tensors.items():
        array = np.asarray(value)
        if array.dtype.name not in _DTYPES:
            raise TypeError(f"cannot save {name}: its type is {array.dtype}, expected one of {', '.join(_DTYPES)}")
        arrays[name] = np.asarray(array, dtype=array.dtype.newbyteorder("<"))
    arrays = dict(sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])))
    header, offset = {"__metadata__": metadata}, 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the arrays start at a multiple of 8 bytes
    # Each in row-major order; one that is not laid out so is copied as its turn comes.
    data = (array.reshape(-1).view(np.uint8).data for array in arrays.values())
    return _chain([struct.pack("<Q", len(text)), text], data)


def _chain(*parts: Iterable) -> Iterator:
    for part in parts:
        yield from part


def _write_file(path: Path, chunks: Iterable) -> dict:
    """Write and sync a file; its entry for the manifest."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "size": size}


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder (new, renamed, gone) outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync_folder(path.parent)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what can go wrong in reading a file into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error

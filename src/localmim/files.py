"""Files on disk: their hash, and text and arrays that are replaced in one move."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from localmim.errors import UserError


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Where to write a file aside, which is then renamed: so `path` is there whole, or as it was.

    Raises:
        UserError: The disk does not take it.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Writes a text file in one move. UserError where the disk does not take it."""
    with replaced(path) as aside:
        aside.write_text(text, encoding="utf-8")


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], compress: bool = True) -> None:
    """Writes an .npz file in one move. UserError where the disk does not take it."""
    with replaced(path) as aside, open(aside, "wb") as file:
        (np.savez_compressed if compress else np.savez)(file, **arrays)

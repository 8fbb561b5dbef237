"""Writing a file so that a kill at any instant leaves either the old one or the new one, whole; and by one alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gpt.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["atomic_write", "check_can_write", "locked", "replace"]


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file beside `path` that takes its place, flushed to disk, when the block ends without an error.

    UserError when it cannot be written, a full disk for instance; what was written is then removed.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"cannot write {path}: it is no ordinary file, and would be replaced by one")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_can_write(path: Path) -> None:
    """UserError where `atomic_write` could not write this file: what is computed for it would be lost."""
    if not path.name or (path.exists() and not path.is_file()):
        raise UserError(f"out: expected the name of a file, got {str(path)!r}")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"out: {path} cannot be written, for {folder} is no folder that can be written to")


def replace(source: Path, target: Path) -> None:
    """Rename source, whose bytes are on disk, to target, and bring the rename itself to disk."""
    os.replace(source, target)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def locked(folder: Path, taken: str) -> int:
    """A descriptor of the folder, made where it is missing, which keeps out others that ask for it until it is closed.

    UserError where it cannot be written, and, saying `taken`, where another has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder if fcntl else os.devnull, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or folder}: {error.strerror or error}") from error
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(taken) from None
    except OSError:  # a file system without locks
        pass
    return descriptor

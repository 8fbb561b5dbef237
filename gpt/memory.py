"""How much memory is free and how much a process has, how a lack of it shows, and what glibc does with what is freed.

On systems without glibc the last functions do nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from gpt.errors import is_installed

__all__ = [
    "free_bytes",
    "free_on_gpu",
    "is_lacking",
    "keep_freed",
    "peak_bytes",
    "return_freed",
    "used_bytes",
]

# Of a container: its limit, what it uses, and how much of that is files in memory, which make room. Versions 2 and 1.
_CGROUPS = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory.stat"),
    (
        "sys/fs/cgroup/memory/memory.limit_in_bytes",
        "sys/fs/cgroup/memory/memory.usage_in_bytes",
        "sys/fs/cgroup/memory/memory.stat",
    ),
)


def free_bytes(root: str | Path = "/") -> int | None:
    """What this machine can still give, or its container where that has less; None where the system does not tell."""
    found = []
    lines = _lines(Path(root, "proc/meminfo"))
    found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for limit, usage, statistics in _CGROUPS:
        allowed, used = ("".join(_lines(Path(root, name))).strip() for name in (limit, usage))
        if allowed.isdigit() and used.isdigit():
            files = [
                int(line.split()[1]) for line in _lines(Path(root, statistics)) if line.startswith("inactive_file")
            ]
            found.append(max(0, int(allowed) - int(used) + sum(files)))
    return min(found, default=None)


def free_on_gpu() -> int | None:
    """What the current GPU can still give; None where PyTorch is not installed or sees none."""
    if not is_installed("torch"):
        return None
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def used_bytes() -> int | None:
    """What this process has now, as the system counts it; None where the system does not tell."""
    return _of_process("VmRSS")


def peak_bytes() -> int | None:
    """The most that it had at any time. (getrusage's figure a process inherits from the one that began it.)"""
    return _of_process("VmHWM")


def together_bytes(peak: bool = False) -> int | None:
    """What this process and those that it began have, or had at most, each; memory that they share counts once."""
    begun = [pid for thread in Path("/proc/self/task").glob("*/children") for pid in thread.read_text().split()]
    counted = [
        (_of_process("VmHWM" if peak else "VmRSS", pid), _of_process("RssShmem", pid)) for pid in ("self", *begun)
    ]
    own = [size - (of_file or 0) for size, of_file in counted if size is not None]
    return sum(own) + sum(_open_memory().values()) if own else None


def _open_memory() -> dict[int, int]:
    """The bytes of the open files that have no place in a file system, as those of gpt/crew.py, by their numbers."""
    found = {}
    for file in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(file).startswith("/memfd:"):
                found[file.stat().st_ino] = 512 * file.stat().st_blocks
        except OSError:  # closed by now
            continue
    return found


def _of_process(name: str, pid: str = "self") -> int | None:
    lines = [line for line in _lines(Path("/proc", pid, "status")) if line.startswith(f"{name}:")]
    return 1024 * int(lines[0].split()[1]) if lines else None


def is_lacking(error: BaseException) -> bool:
    """Whether an error says that there was no memory: NumPy's, PyTorch's of the CPU, or of a GPU."""
    if isinstance(error, MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


@cache
def keep_freed() -> None:
    """Have it keep the memory that is freed, instead of returning it to the system after each array.

    Each training step frees and allocates the same few hundred arrays, and returned memory comes back one page fault
    for each 4 KiB, zeroed each time. Arrays of 16 MiB and more go back all the same: what is kept would have holes of
    their size, and NumPy asks for them in huge pages, which are few. And there is one heap for all threads, because
    heaps of their own would have holes of their own: a quarter of all memory of a model 1,024 wide.
    """
    if mallopt := _function("mallopt"):
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8
        mallopt(arena_max, 1)
        mallopt(mmap_threshold, 16 << 20)
        mallopt(trim_threshold, 2**31 - 1)


def return_freed() -> None:
    """Give the system back what has been freed so far, wherever it lies."""
    if malloc_trim := _function("malloc_trim"):
        malloc_trim(0)


def _function(name: str) -> Any:
    """A function of glibc; None in another C library, or on another system."""
    try:
        return getattr(ctypes.CDLL(None), name) if sys.platform == "linux" else None
    except (OSError, AttributeError):
        return None

"""What a measurement needs beside its figures to be worth keeping: when, where, with what, and every single round.

A result is a JSON file:

    format, kind      2, and the benchmark that wrote it
    date, machine     UTC; processor, cores, memory, system, and a GPU's name, driver and capability where there is one
    python, versions  of Python and of every package that is timed
    environment       the variables, of those that set numbers of threads, that were set
    commit, dirty     of the code, and whether it was changed since (results do not count)
    ceilings          where measured: what the machine can do at most, see ceilings.py
    cases             by name

A case of a kind that `compare` knows has `settings`, what was asked for; `control`, the contestant whose figures
stand for the machine's mood; and `contestants` by name, each with `seconds`: median, quartiles, and `sessions`, the
rounds of each process. `sessions` is null, and `quartiles` may be, in results that were taken when these were not
kept.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from gpt.data.files import atomic_write
from gpt.errors import UserError

FORMAT = 2
HERE = Path(__file__).parent
FOLDER = HERE / "results"
PACKAGES = ("numpy", "torch", "triton", "transformers", "liger-kernel", "pytest-benchmark")
VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TRITON_INTERPRET")


def surroundings() -> dict[str, Any]:
    """Date, machine, versions and commit."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": _memory(),
            "system": platform.platform(),
            **_gpu(),
        },
        "python": platform.python_version(),
        "versions": versions,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **_commit(),
    }


def write(path: Path, kind: str, cases: Any, **more: Any) -> None:
    """Write the figures `cases` of one kind of measurement, with its surroundings and what `more` there is, as JSON."""
    document = {"format": FORMAT, "kind": kind, **surroundings(), **more, "cases": cases}
    with atomic_write(path) as file:
        file.write(as_json(document).encode())


def as_json(document: Any) -> str:
    """With a line for each entry, but one for a whole list of numbers."""

    def on_one_line(numbers: re.Match[str]) -> str:
        return f"[{' '.join(numbers[1].split())}]"

    # A string has no line feed as JSON, so this meets lists alone.
    return re.sub(r"\[\n([-+.\deE,\s]+)\]", on_one_line, json.dumps(document, indent=1)) + "\n"


def read(path: Path) -> dict[str, Any]:
    """A result from its file. UserError for what is none, or has another format."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; expected a result, as `python -m bench cpu --out FILE` writes it"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a result: expected JSON ({_first_line(error)})") from None
    if not isinstance(document, dict) or not {"format", "kind", "cases"} <= document.keys():
        raise UserError(f"{path}: not a result: expected an object with format, kind and cases")
    if document["format"] != FORMAT:
        raise UserError(f"{path}: has format {document['format']!r}, and only format {FORMAT} is read; measure anew")
    for name, missing in (("cases", None), ("machine", None), ("versions", {}), ("environment", {})):
        if not isinstance(document.setdefault(name, missing), dict):
            raise UserError(f"{path}: not a result: expected {name} to be an object")
    if not isinstance(document["machine"].get("memory_bytes") or 0, int):
        raise UserError(f"{path}: not a result: expected its machine's memory_bytes to be a number of bytes")
    return document


def machine(document: Mapping[str, Any]) -> str:
    """Which machine a result is of, in words; two results of one machine have the same."""
    of = document["machine"]
    memory = of.get("memory_bytes")
    size = f", {memory / 2**30:.0f} GiB" if memory else ""
    gpu = f", {of['gpu_name']}" if of.get("gpu_name") else ""
    cores = of.get("cores")
    return f"{of.get('processor')}, {cores} core{'s' * (cores != 1)}{size}{gpu}"


def state(document: Mapping[str, Any]) -> str:
    """Which code: the commit, and whether it was changed since."""
    return f"{document.get('commit') or 'no commit'}{', changed since' if document.get('dirty') else ''}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> int | None:
    """Bytes of the machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpu() -> dict[str, str]:
    """The GPU's name, driver and capability, where a command line tool of its driver tells."""
    fields = ("name", "driver_version", "compute_cap")
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = answer.stdout.splitlines()[0].split(", ") if answer.returncode == 0 and answer.stdout else ()
    return {f"gpu_{key}": value for key, value in zip(fields, values, strict=False)}


def _commit() -> dict[str, Any]:
    """The commit of this checkout, and whether files that it tracks have changed; None where there is no git."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results*", ":!RESULTS*.md")
    return {"commit": commit or None, "dirty": None if commit is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None

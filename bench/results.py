"""What a measurement needs beside its figures to be worth keeping: when, where, and with what."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from gpt.data.files import atomic_write


def surroundings() -> dict[str, Any]:
    """Date, machine, versions and commit."""
    versions = {}
    for package in ("numpy", "torch", "triton", "liger-kernel", "pytest-benchmark"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "system": platform.platform(),
            **_gpu(),
        },
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
    }


def write(path: Path, kind: str, cases: Any) -> None:
    """Write the figures `cases` of one kind of measurement, with its surroundings, as JSON."""
    document = {"format": 1, "kind": kind, **surroundings(), "cases": cases}
    with atomic_write(path) as file:
        file.write(json.dumps(document, indent=1).encode())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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


def _commit() -> str | None:
    here = Path(__file__).parent
    answer = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return answer.stdout.strip() or None

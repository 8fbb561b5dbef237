"""`twingrad doctor`: versions, devices, what is missing, what that costs, and the command that installs it.

Versions are read from the packages' metadata, so that nothing heavy is imported to learn them; PyTorch alone is
imported, and only to ask which devices it can use.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.devices import available_devices
from gpt.options import Parser

__all__ = ["examine", "main", "render"]


@dataclass(frozen=True)
class Package:
    """A distribution that some part of the project uses; `extra` is None where everything needs it."""

    name: str
    extra: str | None
    used_for: str


PACKAGES = [
    Package("numpy", None, "everything"),
    Package("safetensors", None, "reading and writing checkpoints and weights"),
    Package("tiktoken", None, "GPT-2's tokenizer"),
    Package("requests", None, "downloads"),
    Package("rich", None, "tables and progress"),
    Package("matplotlib", None, "plots"),
    Package("PyYAML", None, "configuration files"),
    Package("Jinja2", None, "chat templates"),
    Package("torch", "torch", "the torch engine, and every check against PyTorch"),
    Package("triton", "torch", "the GPU kernels"),
    Package("sentencepiece", "sentencepiece", "SentencePiece models, and training one"),
    Package("tokenizers", "tokenizers", "training byte-pair encodings, and Hugging Face's other tokenizers"),
    Package("wandb", "wandb", "following a run at Weights & Biases"),
    Package("tensorboardX", "tensorboard", "following a run in TensorBoard"),
    Package("tensorflow", "openai", "reading OpenAI's original GPT-2 checkpoints"),
    Package("lm-eval", "harness", "tasks of lm-evaluation-harness"),
    Package("transformers", "bench", "comparison with Hugging Face's models"),
    Package("pytest-benchmark", "bench", "timing single layers"),
    Package("pytest", "dev", "running the tests"),
]


def examine() -> dict[str, Any]:
    """Everything that `render` prints, as plain JSON-able values."""
    versions = {package.name: _version(package.name) for package in PACKAGES}
    torch_report = _ask_torch() if versions["torch"] else {"devices": [], "notes": []}
    return {
        "twingrad": _version("twingrad"),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": versions,
        "blas": _blas() if versions["numpy"] else None,
        "cpu": {"cores": _usable_cores(), "memory_bytes": _memory_bytes()},
        "devices": torch_report["devices"],
        "engine": "torch" if torch_report["devices"] else "numpy",
        "kernels": _where_kernels_run(versions, [device["type"] for device in torch_report["devices"]]),
        "folders": {name: os.environ.get(name) for name in ("TWINGRAD_DATA", "TIKTOKEN_CACHE_DIR")},
        "missing": [_describe_missing(package) for package in PACKAGES if _is_missed(package, versions)],
        "notes": torch_report["notes"],
    }


def render(report: dict[str, Any]) -> str:
    """The report as text, a section a subject."""
    cpu = f"{report['cpu']['cores']} cores"
    if report["cpu"]["memory_bytes"]:
        cpu += f", {report['cpu']['memory_bytes'] / 2**30:.1f} GiB memory"
    versions = {"twingrad": report["twingrad"], "python": report["python"], **report["packages"]}
    devices = {
        "cpu": cpu,
        **{device["type"]: device["name"] for device in report["devices"] if device["type"] != "cpu"},
    }
    devices["torch uses"] = (
        report["devices"][0]["type"] if report["devices"] else "nothing (torch engine not available)"
    )
    devices["kernels"] = report["kernels"]
    if report["blas"]:
        devices["numpy uses"] = f"{report['blas']['library']}, {report['blas']['threads']} threads"
    lines = [f"platform  {report['platform']}"]
    lines += _section("versions", {name: version or "not installed" for name, version in versions.items()})
    lines += _section("devices", devices)
    lines += _section("folders", {name: value or "not set" for name, value in report["folders"].items()})
    lines += ["", "missing" if report["missing"] else "nothing is missing"]
    for gap in report["missing"]:
        lines += [f"  {gap['package']}, used for {gap['used_for']}", f"      {gap['install']}"]
    lines += ["", *(f"note: {note}" for note in report["notes"])] if report["notes"] else []
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the report; the exit status is 1 only where a package that everything needs is missing."""
    parser = Parser(prog="twingrad doctor", description="Versions, devices, and what is missing.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    report = examine()
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    return int(any(gap["extra"] is None for gap in report["missing"]))


def _section(title: str, rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return ["", title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        # TensorFlow's CPU build is a distribution of its own that holds the same module.
        return _version("tensorflow-cpu") if distribution == "tensorflow" else None


def _is_missed(package: Package, versions: dict[str, str | None]) -> bool:
    """Triton exists for Linux only: elsewhere it is not missing."""
    return versions[package.name] is None and (package.name != "triton" or sys.platform == "linux")


def _describe_missing(package: Package) -> dict[str, str | None]:
    target = f"twingrad[{package.extra}]" if package.extra else "twingrad"
    return {
        "package": package.name,
        "extra": package.extra,
        "used_for": package.used_for,
        "install": f"pip install '{target}'",
    }


def _ask_torch() -> dict[str, Any]:
    """PyTorch's devices, best first, and what is odd about them."""
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return {"devices": [], "notes": [f"torch is installed but does not import: {error}"]}
    names = {
        "cuda": lambda: _cuda_name(torch),
        "mps": lambda: "Apple GPU",
        "cpu": lambda: platform.processor() or "CPU",
    }
    devices = [{"type": kind, "name": names[kind]()} for kind in available_devices(torch)]
    notes = []
    if shutil.which("nvidia-smi") and devices[0]["type"] != "cuda":
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        notes.append(f"an NVIDIA driver is here, but torch {torch.__version__} ({build}) finds no GPU")
    return {"devices": devices, "notes": notes}


def _where_kernels_run(versions: dict[str, str | None], devices: list[str]) -> str:
    if not (versions["torch"] and versions["triton"]):
        return "run nowhere (torch or triton is not installed)"
    return "run on the GPU" if "cuda" in devices else "run on the CPU, interpreted, where TRITON_INTERPRET=1 is set"


def _cuda_name(torch: Any) -> str:
    properties = torch.cuda.get_device_properties(0)
    more = f", {torch.cuda.device_count()} of them" if torch.cuda.device_count() > 1 else ""
    return (
        f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB{more}"
    )


def _blas() -> dict[str, Any]:
    """NumPy's matrix product library, and how many threads it was told to use (all usable cores unless told)."""
    config = importlib.import_module("numpy").show_config(mode="dicts")["Build Dependencies"]["blas"]
    told = [os.environ.get(f"{library}_NUM_THREADS") for library in ("OPENBLAS", "MKL", "OMP")]
    threads = next((int(value) for value in told if value and value.isdigit()), _usable_cores())
    return {"library": f"{config['name']} {config['version']}", "threads": threads}


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int | None:
    """Physical memory, or the container's limit where that is smaller; None where the system does not tell."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))

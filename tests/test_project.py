"""The arrows between the folders, and what an import brings with it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"reference", "kernels", "gpt", "bench", "tests"}
# Which of the project's own folders, and of these frameworks, a folder may import.
ARROWS = {
    "reference": set(),
    "kernels": {"torch", "triton"},
    "gpt": {"reference", "kernels", "torch", "triton", "tensorflow"},
    "bench": {"reference", "kernels", "gpt", "torch", "triton", "transformers"},
}


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module if node.level == 0 else path.relative_to(ROOT).parts[0])
    return {name.partition(".")[0] for name in names}


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter in the project's root."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# Stands in front of a program: torch and everything else heavy is as if it were not installed.
BLOCK = """
import sys
for name in ("torch", "triton", "tensorflow", "transformers"):
    sys.modules[name] = None
"""


@pytest.mark.parametrize("folder", ARROWS)
def test_folders_import_only_along_the_arrows(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    if not files:
        pytest.skip(f"{folder}/ does not exist yet")
    watched = FOLDERS | set().union(*ARROWS.values())
    for path in files:
        wrong = imported(path) & watched - ARROWS[folder] - {folder}
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_reference_imports_only_numpy_and_the_standard_library():
    for path in (ROOT / "reference").rglob("*.py"):
        foreign = imported(path) - set(sys.stdlib_module_names) - {"numpy", "reference"}
        assert not foreign, f"{path.relative_to(ROOT)} imports {', '.join(sorted(foreign))}"


def test_the_checker_of_arrows_sees_every_kind_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "reference" / "layer.py"
    path.parent.mkdir()
    path.write_text("import gpt.data\nfrom kernels import x\nfrom . import y\ndef f():\n    import torch.nn as nn\n")
    assert imported(path) == {"gpt", "kernels", "reference", "torch"}


def test_import_reference_loads_no_package_but_numpy():
    """Compared with an interpreter that imports NumPy alone."""
    show = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    bare, ours = (set(python(f"import {names}; {show}").stdout.split()) for names in ("numpy", "numpy, reference"))
    assert "reference" in ours
    assert ours - bare - set(sys.stdlib_module_names) == {"reference"}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["doctor", "--help"]])
def test_help_imports_no_framework(arguments):
    code = (
        "import sys\nfrom gpt.cli import main\n"
        f"try: main({arguments})\nexcept SystemExit: pass\n"
        "print('LOADED', *[name for name in ('torch', 'triton', 'tensorflow', 'matplotlib') if name in sys.modules])"
    )
    done = python(code)
    assert done.stdout.rstrip().endswith("LOADED"), done.stdout + done.stderr


def test_numpy_engine_works_without_torch():
    """The reference alone, then the engine: forward, backward and an optimizer step that lowers the loss."""
    done = python(
        BLOCK
        + """
import numpy as np
from reference import GPT, PRESETS
model = GPT.seeded(PRESETS["bytes-tiny"], seed=1)
assert model(np.arange(8)[None]).shape == (1, 8, 257)

from gpt.engine import Batch, OptimizerConfig, create_engine
engine = create_engine("auto", PRESETS["bytes-tiny"], model.params, OptimizerConfig(lr=1e-2))
assert engine.name == "numpy"
tokens = np.arange(34).reshape(2, 17)
batch = Batch(tokens[:, :-1], tokens[:, 1:])
before = engine.accumulate(batch)
engine.step(1e-2)
assert engine.loss(batch) < before
print("fine")
"""
    )
    assert done.stdout.split() == ["fine"], done.stderr


def test_every_file_imports_without_torch_except_the_torch_engine():
    """A module that needs torch at its top cannot be loaded by the NumPy engine's users."""
    needs_torch = {"cache", "distributed_engine", "model", "ops", "torch_engine", "twins"}
    paths = [
        path.relative_to(ROOT) for folder in ("reference", "gpt") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    names = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in paths
        if path.name != "__main__.py" and not (path.parts[0] == "gpt" and path.stem in needs_torch)
    ]
    done = python(BLOCK + f"import importlib\nfor name in {names}: importlib.import_module(name)\nprint('fine')")
    assert done.stdout.split() == ["fine"], done.stderr


def test_nothing_names_the_machine_it_was_written_on():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    private = ["/" + "work/", "/tmp/" + "venv", ".." + "/shared"]
    for name in listed.stdout.split():
        if name == ".ci/run" or not (ROOT / name).is_file():
            continue
        text = (ROOT / name).read_bytes().decode("utf-8", errors="ignore")
        assert not [path for path in private if path in text], name

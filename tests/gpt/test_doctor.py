"""`twingrad doctor`: what it reports, on machines that differ in what they have."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt import cli, doctor
from gpt.devices import available_devices, pick_device

ROOT = Path(__file__).parents[2]


def torch_with(cuda: bool, mps: bool) -> SimpleNamespace:
    """As much of torch as tells which devices there are."""
    return SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: cuda),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
    )


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly these distributions are installed."""

    def pretend(**versions: str) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


BASE = {package.name: "1.0" for package in doctor.PACKAGES if package.extra is None}


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [
        (True, True, ["cuda", "mps", "cpu"]),
        (True, False, ["cuda", "cpu"]),
        (False, True, ["mps", "cpu"]),
        (False, False, ["cpu"]),
    ],
)
def test_devices_are_picked_in_order(cuda, mps, expected):
    torch = torch_with(cuda, mps)
    assert available_devices(torch) == expected
    assert pick_device(torch) == expected[0]


def test_reports_versions_and_exits_0(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in ("python", "numpy", "torch", "triton", "tiktoken", "tensorflow", "safetensors"):
        assert any(line.split()[:1] == [name] for line in shown.splitlines()), name
    assert importlib.metadata.version("numpy") in shown


def test_json_holds_the_same_report(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert report["cpu"]["cores"] >= 1
    assert report["blas"]["library"]


def test_what_is_missing_is_named_with_its_use_and_its_command(installed, capsys):
    installed(**BASE, twingrad="1.0")
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "torch, used for the torch engine" in shown
    assert "pip install 'twingrad[torch]'" in shown
    assert "tensorflow, used for reading OpenAI's original GPT-2 checkpoints" in shown
    assert "pip install 'twingrad[openai]'" in shown
    assert "torch uses  nothing" in shown


def test_a_missing_base_package_is_a_failure(installed, capsys):
    installed(**{name: version for name, version in BASE.items() if name != "safetensors"})
    assert cli.main(["doctor", "--json"]) == 1
    assert "safetensors" in [gap["package"] for gap in json.loads(capsys.readouterr().out)["missing"]]


def test_tensorflow_s_cpu_build_counts_as_tensorflow(installed):
    installed(**BASE, **{"tensorflow-cpu": "2.21.0"})
    report = doctor.examine()
    assert report["packages"]["tensorflow"] == "2.21.0"
    assert "tensorflow" not in [gap["package"] for gap in report["missing"]]


def test_triton_is_not_missing_where_it_does_not_exist(installed, monkeypatch):
    installed(**BASE)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "triton" not in [gap["package"] for gap in doctor.examine()["missing"]]


def test_a_torch_that_does_not_import_is_a_note_and_no_crash(installed, monkeypatch, capsys):
    installed(**BASE, torch="2.13.0")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["doctor"]) == 0
    assert "note: torch is installed but does not import" in capsys.readouterr().out


def test_extras_that_it_recommends_exist():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package in doctor.PACKAGES:
        if package.extra is not None:
            assert any(package.name in requirement for requirement in extras[package.extra]), package.name


def test_it_never_imports_tensorflow(tmp_path):
    """A tensorflow that explodes when imported stands first on the path."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('imported')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-m", "gpt", "doctor"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

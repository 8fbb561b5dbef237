"""The layers' documentation is what is generated, and says of every layer what it is held against."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpt.parity import ops
from gpt.study import documentation

FILE = Path(documentation.__file__).parents[2] / "reference" / "LAYERS.md"


@pytest.fixture(scope="module")
def text():
    return documentation.document()


def test_the_committed_file_is_what_is_generated(text):
    assert FILE.read_text("utf-8") == text, "run: python -m gpt.study.documentation"


def test_the_command_writes_the_file(tmp_path, text):
    path = tmp_path / "layers.md"
    done = subprocess.run(
        [sys.executable, "-m", "gpt.study.documentation", path], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(path)
    assert path.read_text("utf-8") == text


@pytest.mark.parametrize("layer", sorted({row.layer for row in ops.ROWS.values()}))
def test_every_layer_has_its_section(text, layer):
    section = text.split(f"\n## {layer}\n")[1].split("\n## ")[0]
    rows = [row for row in ops.ROWS.values() if row.layer == layer]
    assert f"`reference/{layer}.py`" in section
    assert "- `forward(" in section
    assert section.count("```") % 2 == 0
    for row in rows:
        assert f"`{row.name}`" in section
    for name in rows[0].gradients:
        assert f"d{name}" in section
    assert ("1e-07" in section) == bool(rows[0].gradients)
    assert ("`kernels/" in section) == rows[0].has_twin("kernels")


def test_latex_closes_what_it_opens(text):
    formulas = text.split("```math\n")[1:]
    assert len(formulas) > 40
    for formula in (part.split("\n```")[0] for part in formulas):
        assert formula.count("{") == formula.count("}")
        assert formula.count(r"\left") - formula.count(r"\left\lfloor") == formula.count(r"\right") - formula.count(
            r"\right\rfloor"
        )
        assert formula.count(r"\begin") == formula.count(r"\end")

"""The notebooks: each runs from top to bottom on its own, and says what it said when it was stored.

Whatever a notebook claims it asserts in its own cells; a run that finishes has proved it. Plots are not compared.
"""

import base64
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "gpt" / "study" / "notebooks"
NAMES = ("layer_norm", "attention", "training")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
each = pytest.mark.parametrize("name", NAMES)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    """All text of a cell, however many messages it came in."""
    outputs = cell.outputs
    return "".join(out.text if out.output_type == "stream" else out.data.get("text/plain", "") for out in outputs)


def plots(cell):
    return sum(out.output_type == "display_data" for out in cell.outputs)


def same(ours, stored):
    """The same words and whole numbers; others to three digits, as other processors round sums in another order."""
    if NUMBER.sub("", ours) != NUMBER.sub("", stored):
        return False
    pairs = zip(NUMBER.findall(ours), NUMBER.findall(stored), strict=True)
    return all(a == b or ("." in b and math.isclose(float(a), float(b), rel_tol=0.01)) for a, b in pairs)


def test_every_notebook_is_among_those_that_are_run():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize(
    ("ours", "stored", "expected"),
    [
        ("loss 1.234, 5 steps", "loss 1.235, 5 steps", True),
        ("loss 1.234, 5 steps", "loss 1.334, 5 steps", False),
        ("loss 1.234, 5 steps", "loss 1.234, 6 steps", False),
        ("norm 1.0e-11", "norm 1.0e-12", False),
        ("norm -1.0", "norm 1.0", False),
        ("loss 1.234", "norm 1.234", False),
        ("loss 1.234", "loss 1.234 1.234", False),
    ],
)
def test_outputs_are_compared_word_by_word_and_numbers_to_three_digits(ours, stored, expected):
    assert same(ours, stored) is expected


@each
def test_a_fresh_kernel_anywhere_prints_what_is_stored_and_needs_no_framework(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # this checkout, whatever else is installed
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nobody's own settings
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # this Python's kernel
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # small matrices: threads would only be in each other's way
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    stored, ran = read(name), read(name)
    for cell in code_cells(ran):
        cell.outputs, cell.execution_count = [], None
    ran.cells.append(nbformat.v4.new_code_cell("import sys\nprint(sorted({'torch', 'tensorflow'} & set(sys.modules)))"))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    nbclient.NotebookClient(ran, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    *cells, last = code_cells(ran)
    assert printed(last).strip() == "[]"
    assert not list(folder.iterdir())
    for ours, theirs in zip(cells, code_cells(stored), strict=True):
        before, now = printed(theirs), printed(ours)
        assert same(now, before), f"{theirs.source}\n\nprints\n{now}\nnot\n{before}"
        assert plots(ours) == plots(theirs), theirs.source


@each
def test_what_is_stored_is_a_whole_run_small_and_without_traces_of_it(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == {"name": "python"}
    assert not any(cell.metadata for cell in notebook.cells)
    assert (FOLDER / f"{name}.ipynb").stat().st_size <= 400 * 1024
    outputs = [out for cell in cells for out in cell.outputs]
    assert {out.output_type for out in outputs} == {"stream", "display_data"}
    images = [base64.b64decode(out.data["image/png"]) for out in outputs if out.output_type == "display_data"]
    assert len(images) >= 3
    assert all(image.startswith(b"\x89PNG") and len(image) <= 40 * 1024 for image in images)


@each
def test_no_text_names_a_machine_s_paths(name):
    notebook = read(name)
    texts = [cell.source for cell in notebook.cells] + [printed(cell) for cell in code_cells(notebook)]
    for text in texts:
        assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|work|Users)/|[A-Z]:\\|site-packages", text), text


@each
def test_links_lead_to_files_of_the_project(name):
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    assert not [link for link in links if not (FOLDER / link).is_file()]


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]])
def test_cells_are_formatted_and_linted_as_all_code_is(arguments):
    pytest.importorskip("ruff")
    paths = [str(FOLDER / f"{name}.ipynb") for name in NAMES]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "--no-cache", *paths], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr

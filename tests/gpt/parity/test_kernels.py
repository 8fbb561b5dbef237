"""The kernels against the table of operators, in Triton's interpreter; and functions that people bring."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import kernels  # noqa: E402
from gpt import cli  # noqa: E402
from gpt.parity import check, gates, model, subjects  # noqa: E402
from gpt.parity.gates import GATES  # noqa: E402
from gpt.parity.ops import ROWS, Case  # noqa: E402

HERE = Path(__file__).parent
OF_KERNELS = [row for row in ROWS.values() if row.has_twin("kernels")]


def test_every_kernel_has_a_row():
    found = {path.stem for path in Path(kernels.__file__).parent.glob("*.py") if "\noperator = " in path.read_text()}
    assert found == {row.layer for row in OF_KERNELS}


def gate_of(gate, row):
    """What the kernels' gate measures of a row, in one thread, and what of it is beyond its bound."""
    row = row.of(subjects.kernels())
    with check.one_thread():
        results = [result for case in GATES[gate].cases(row) for result in GATES[gate].results(row, case)]
    return results, [str(result) for result in results if not result.passed]


def in_pairs(cases):
    """Batches of at most 2. Attention's programs for another example differ in an offset alone, and the interpreter
    runs one after the other."""
    return tuple(Case((min(case.size[0], 2), *case.size[1:]), case.layout, case.scale) for case in cases)


def of_each_kind(row):
    """Of each layout a case, and one larger than a block: how a kernel treats its arguments depends on no more."""
    large = max(row.cases, key=lambda case: sum(n > 64 for n in case.size[:-1]))
    cases = (*{case.layout: case for case in reversed(row.cases)}.values(), large)
    return replace(row, cases=in_pairs(cases) if "attention" in row.layer else cases)


@pytest.mark.parametrize("row", OF_KERNELS, ids=lambda row: row.name)
def test_kernels_compute_what_the_reference_does(row):
    """In float64, at every size."""
    results, bad = gate_of("algebra", replace(row, cases=in_pairs(row.cases)) if row.layer == "attention" else row)
    assert results
    assert not bad


# Their kernels round as those of other rows do, which have a bias, or whose keys are masked otherwise.
VARIANTS = re.compile(r".*-(no-bias|ignored|grouped|past|full)")


@pytest.mark.parametrize(
    "row", [row for row in OF_KERNELS if not VARIANTS.fullmatch(row.name)], ids=lambda row: row.name
)
def test_rounding_is_that_of_pytorch_in_three_types(row, monkeypatch):
    monkeypatch.setattr(gates, "SCALAR_DRAWS", 16)  # of twice as many below, where all is checked
    if "attention" in row.layer:
        row = replace(row, rounding=in_pairs(row.rounding))
    results, bad = gate_of("rounding", row)
    assert results
    assert not bad


@pytest.mark.parametrize("row", OF_KERNELS, ids=lambda row: row.name)
def test_arguments_are_treated_well(row):
    """Never changed, never handed out; and the same bits each time, in the type and shape of what was given."""
    few = of_each_kind(row)
    assert {case.layout for case in few.cases} == {"rows", "transposed", "sliced"}
    results, bad = gate_of("conduct", few)
    assert results
    assert not bad


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["algebra", "rounding", "conduct"])
@pytest.mark.parametrize("row", OF_KERNELS, ids=lambda row: row.name)
def test_kernels_pass_every_gate_at_every_size(row, gate):
    assert not gate_of(gate, row)[1]


def test_rounding_is_measured_in_each_type():
    row = ROWS["gelu"].of(subjects.kernels())
    tensors = {result.tensor for result in GATES["rounding"].results(row, row.rounding[0])}
    assert tensors == {"y", "dx", "y in float16", "dx in float16", "y in bfloat16", "dx in bfloat16"}


def test_the_model_on_the_kernels_goes_in_step_with_numpy_s():
    """Grouped heads, every bias and dropout at all places: tensor by tensor in float64, then training steps."""
    with check.one_thread():
        results = list(model.on_kernels("untied", "cpu", steps=2))
    assert not [str(result) for result in results if not result.passed]
    assert {"blocks.1.attn.heads", "d.blocks.0.shortcut1", "loss"} <= {result.tensor for result in results}
    assert [result.gate for result in results[-2:]] == ["lockstep float64", "lockstep float32"]
    assert {result.operator for result in results} == {"triton model untied"}


def test_the_command_shows_kernels_in_a_table_of_their_own(capsys):
    assert cli.main(["check", "kernels", "dropout"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["operator", "algebra", "rounding", "conduct"]
    assert lines[2].startswith("triton dropout")


# ---------------------------------------------------------------- functions that people bring

NORM = """
import torch, triton
import triton.language as tl

@triton.jit
def kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, C, eps, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < C
    x = tl.load(x_ptr + row * C + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / C
    centred = {centred}
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)
    y = centred * rstd * tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    tl.store(y_ptr + row * C + columns, y, mask=inside)

def norm(x, weight, bias, eps):
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty_like(rows)
    bias = bias if bias is None else bias.contiguous()
    BLOCK = triton.next_power_of_2(rows.shape[1])
    kernel[(len(rows),)](rows, weight.contiguous(), bias, y, rows.shape[1], eps, BLOCK=BLOCK)
    return y.reshape(x.shape)
"""


def brought(tmp_path, source, *arguments, op="layer_norm"):
    path = tmp_path / "mine.py"
    path.write_text(source)
    return cli.main(["check", "--kernel", f"{path}:norm", "--op", op, *arguments])


def test_a_right_kernel_passes_and_what_could_not_be_checked_is_said(tmp_path, capsys):
    assert brought(tmp_path, NORM.format(centred="tl.where(inside, x - mean, 0.0)")) == 0
    shown = capsys.readouterr().out
    assert "norm layer_norm-no-bias" in shown
    assert "left out  gradients of layer_norm: what norm returns cannot be differentiated" in shown


def test_a_wrong_kernel_is_caught_where_it_goes_wrong(tmp_path, capsys):
    """Its padding counts into the variance, which shows wherever a row is no power of 2 wide."""
    assert brought(tmp_path, NORM.format(centred="x - mean"), "--json") == 1
    failed = [result for result in json.loads(capsys.readouterr().out)["results"] if not result["passed"]]
    assert {result["tensor"] for result in failed} == {"y"}
    assert {"37", "1x19", "67x131"} <= {result["case"] for result in failed}
    assert "129x64 10000" not in {result["case"] for result in failed}


DIFFERENTIABLE = """
import torch
def norm(x, weight, bias, eps):
    x = x - x.mean(-1, keepdim=True){detach}
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias
"""


@pytest.mark.parametrize("detach, status", [("", 0), (".detach()", 1)])
def test_gradients_are_checked_where_pytorch_can_follow(tmp_path, capsys, detach, status):
    assert brought(tmp_path, DIFFERENTIABLE.format(detach=detach), "--dtype", "float64") == status
    shown = capsys.readouterr().out
    assert ("layer_norm [37] algebra: dx is off by" in shown) == bool(status)
    assert "left out" not in shown


def test_a_function_that_raises_or_returns_another_shape_has_failed(tmp_path, capsys):
    assert brought(tmp_path, "def norm(x, *rest): raise RuntimeError('no such luck')") == 1
    assert "RuntimeError: no such luck" in capsys.readouterr().out
    assert brought(tmp_path, "def norm(x, *rest): return x[..., :1]") == 1
    assert "norm layer_norm [37] rounding" in capsys.readouterr().out


def test_a_file_that_does_not_import_is_one_line(tmp_path, capsys):
    assert brought(tmp_path, "import nowhere") == 2
    shown = capsys.readouterr().err
    assert re.fullmatch(r"error: kernel: \S+mine.py does not import: ModuleNotFoundError: .*\n", shown)

"""Which operator alone makes two engines part: the one that a fault was planted in."""

import json

import pytest

from gpt.cli import main
from gpt.errors import UserError
from gpt.parity import check, model
from gpt.parity.defects import DEFECTS
from gpt.study.bisect import bisect
from gpt.study.diverge import Side

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with check.one_thread():
        yield


def bisected(name="tied", dtype="float64", engines=("numpy", "torch"), **kernels):
    config = model.CONFIGS[name]
    params = {tensor: value.astype(dtype) for tensor, value in model.parameters(config).items()}
    a, b = engines
    both = Side(a, a, config, params), Side(f"other {b}", b, config, params, kernels)
    return bisect(both, model.batch(config), dtype, model.noise())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", model.CONFIGS)
def test_without_a_fault_no_operator_parts_alone_or_with_the_others(name, dtype):
    found = bisected(name, dtype)
    assert found.culprits == []
    assert not found.together.parts
    assert found.all_but_one == []
    config = model.CONFIGS[name]
    norm, activation = ("rms_norm", "swiglu") if config.norm == "rms_norm" else ("layer_norm", "gelu")
    assert {norm, activation, "attention", "dropout", "cross_entropy", "linear", "embedding"} <= {
        swap.operator for swap in found.alone
    }


REFERENCE = {
    "missing transpose, hidden by a reshape": ("tied", "linear"),
    "bias gradient not summed over one axis": ("tied", "linear"),
    "rows of a repeated id not added up": ("tied", "embedding"),
    "layer norm without its mean term": ("tied", "layer_norm"),
    "mean square over C - 1": ("llama", "rms_norm"),
    "gradient turned on instead of back": ("llama", "rope"),
    "up forgotten in the gate's gradient": ("llama", "swiglu"),
    "inner derivative without its factor 3": ("tied", "gelu"),
    "one head of each group counted": ("untied", "attention"),
    "attention dropout not in dp": ("tied", "attention"),
    "dropout not rescaled": ("tied", "dropout"),
    "target off by one": ("tied", "cross_entropy"),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("defect", REFERENCE)
def test_the_layer_of_the_reference_with_a_fault_is_named_and_no_other(defect, dtype):
    name, layer = REFERENCE[defect]
    (planted,) = (known for known in DEFECTS if known.name == defect)
    with planted.seeded():
        found = bisected(name, dtype)
    assert found.culprits == [layer]
    assert found.verdict() == f"alone enough to part: {layer}"


def test_what_no_operator_does_is_not_laid_on_one():
    (planted,) = (known for known in DEFECTS if known.name == "forgotten residual, forward")
    with planted.seeded():
        found = bisected()
    assert found.culprits == []
    assert "no operator parts" in found.verdict()


def test_of_two_sets_of_operators_the_wrong_ones_are_named():
    def gelu(x, approximate):
        return F.gelu(x, approximate="none" if approximate == "tanh" else "tanh")

    def dropout(x, rate, noise):
        return x

    found = bisected(engines=("torch", "torch"), gelu=gelu, dropout=dropout)
    assert [swap.operator for swap in found.alone] == ["gelu", "dropout"]
    assert found.culprits == ["gelu", "dropout"]
    assert found.alone[0].loss > 1e-8
    assert found.alone[0].gradient > 1e-6
    assert found.alone[0].tensor in model.parameters(model.CONFIGS["tied"])


def test_operators_that_are_wrong_only_together_are_named_together():
    """One lays its result out in another order, the other reads it as if it were in rows."""

    def dropout(x, rate, noise):
        from gpt import ops

        return ops.dropout(x, rate, noise).transpose(0, -1).contiguous().transpose(0, -1)

    def add_layer_norm(x, residual, weight, bias, eps):
        rows = residual.as_strided(residual.shape, torch.empty(residual.shape, device="meta").stride())
        total = x + rows
        return F.layer_norm(total, (x.shape[-1],), weight, bias, eps), total

    found = bisected(engines=("torch", "torch"), dropout=dropout, add_layer_norm=add_layer_norm)
    assert not any(swap.parts for swap in found.alone)
    assert found.together.parts
    assert found.culprits == ["add_layer_norm", "dropout"]
    assert found.verdict() == "no operator parts alone; needed, together with others: add_layer_norm, dropout"


def test_a_gradient_that_is_not_a_number_parts():
    class Nan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * float("nan")

    found = bisected(
        engines=("torch", "torch"), gelu=lambda x, approximate: Nan.apply(F.gelu(x, approximate=approximate))
    )
    assert found.culprits == ["gelu"]
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_loss_that_is_not_a_number_parts():
    found = bisected(engines=("torch", "torch"), gelu=lambda x, approximate: x * float("nan"))
    assert found.culprits == ["gelu"]
    json.dumps(found.to_dict(), allow_nan=False)


def test_two_engines_that_are_one_are_refused():
    with pytest.raises(UserError, match="^bisect: expected two engines that differ, got torch twice"):
        bisected(engines=("torch", "torch"))


def test_two_models_are_refused():
    config = model.CONFIGS["tied"]
    both = tuple(Side(engine, engine, config, model.parameters(config)) for engine in ("numpy", "torch"))
    with pytest.raises(UserError, match="^bisect: swaps operators between two engines of one model"):
        bisect(both, model.batch(config))


def test_the_command_prints_a_table_and_the_verdict(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("import torch.nn.functional as F\ndef gelu(x, approximate):\n    return F.gelu(x)\n")
    assert main(["diverge", "--kernel", f"{file}:gelu", "--op", "gelu", "--bisect"]) == 1
    shown = capsys.readouterr().out
    table = {
        line.split()[0]: line.split()[-1] for line in shown.splitlines() if line.split()[-1:] in (["parts"], ["agrees"])
    }
    assert table.pop("gelu") == "parts"
    assert table.pop("all") == "parts"
    assert set(table.values()) == {"agrees"}
    assert "alone enough to part: gelu" in shown

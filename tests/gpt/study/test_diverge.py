"""Two engines, or two checkpoints, side by side: a planted fault is found, and the right tensor is named."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gpt.cli import main
from gpt.engine import create_engine
from gpt.errors import UserError
from gpt.numpy_engine import NumpyEngine
from gpt.parity import check, model
from gpt.parity.defects import DEFECTS
from gpt.study.diverge import Side, cut, diverge
from gpt.study.diverge_cli import page_data, render
from gpt.tokenizers import ByteTokenizer
from gpt.weights.native import save_model
from reference import GPT, PRESETS

torch = pytest.importorskip("torch")
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with check.one_thread():
        yield


def sides(name="tied", dtype="float64", engines=("numpy", "torch"), **kernels):
    """The small model of this name on two engines, the second with these operators in the place of its own."""
    config = model.CONFIGS[name]
    params = {tensor: value.astype(dtype) for tensor, value in model.parameters(config).items()}
    a, b = engines
    return Side(a, a, config, params), Side(f"other {b}", b, config, params, kernels)


def compared(both, dtype="float64"):
    return diverge(both, model.batch(both[0].config), dtype, model.noise())


def named(found):
    return f"{found.first.pair.kind} {found.first.pair.name}"


# ---------------------------------------------------------------- no fault


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", model.CONFIGS)
def test_engines_without_a_fault_agree_on_every_tensor(name, dtype):
    both = sides(name, dtype)
    found = compared(both, dtype)
    assert found.agree, found.first
    assert found.first is None
    engine = create_engine("numpy", both[0].config, both[0].params)
    kinds = [pair.kind for pair in found.pairs]
    order = {"forward": 0, "backward": 1, "step": 2, "gradient": 3}
    assert sorted(kinds, key=order.get) == kinds
    assert {kind: kinds.count(kind) for kind in ("step", "gradient")} == {"step": 1, "gradient": len(engine.trained)}
    assert kinds.count("forward") > 30
    assert kinds.count("backward") == kinds.count("forward") - 1  # the loss has no gradient of its own
    assert found.not_finite == ("", "")
    assert "they agree" in render(found)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_adapters_that_have_learnt_nothing_are_0_on_both_sides(dtype):
    both = sides("adapted", dtype)
    for name, value in both[0].params.items():
        value *= not name.endswith("lora_b")
    assert compared(both, dtype).agree
    lora = compared((both[0], dataclasses.replace(both[1], kernels={"dropout": off("dropout", 1.01)})), dtype)
    assert named(lora) == "forward emb.dropout"


def test_float32_holds_for_other_weights_batches_and_masks_too():
    """Rounding is chance, and a bound that only some draws pass would be fitted to them."""
    for name, config in model.CONFIGS.items():
        for seed in range(5):
            rng = np.random.default_rng(seed)
            params = {
                tensor: (value * rng.uniform(0.5, 1.5, value.shape)).astype(np.float32)
                for tensor, value in model.parameters(config).items()
            }
            both = Side("numpy", "numpy", config, params), Side("torch", "torch", config, params)
            found = diverge(both, model.batch(config, seed), "float32", model.noise(seed))
            assert found.agree, (name, seed, found.first.pair)


# ---------------------------------------------------------------- a fault in each operator


REFERENCE = {
    "missing transpose, hidden by a reshape": ("untied", "gradient head.weight"),
    "bias left out": ("tied", "forward blocks.0.attn.query"),
    "rows of a repeated id not added up": ("untied", "gradient tok_emb.weight"),
    "layer norm right only at weight 1": ("tied", "backward d.blocks.1.shortcut2"),
    "variance over C - 1": ("tied", "forward blocks.0.norm1"),
    "RMS norm without what it takes away along h": ("llama", "backward d.blocks.1.shortcut2"),
    "RMS norm's eps outside the root": ("llama", "forward blocks.0.norm1"),
    "gradient turned on instead of back": ("llama", "backward d.blocks.1.attn.key"),
    "a reflection instead of a rotation": ("llama", "forward blocks.0.attn.query.rope"),
    "silu's slope without its 1": ("llama", "backward d.blocks.1.mlp.gate"),
    "two digits of GELU's constant swapped": ("tied", "forward blocks.0.mlp.act"),
    "normal density without its 2": ("untied", "backward d.blocks.1.mlp.up"),
    "scores not scaled": ("tied", "forward blocks.0.attn.heads"),
    "softmax backward without its row sum": ("tied", "backward d.blocks.1.attn.key"),
    "dv from weights before dropout": ("tied", "backward d.blocks.1.attn.value"),
    "dropout not rescaled": ("tied", "forward emb.dropout"),
    "loss's mean over all targets": ("tied", "forward loss"),
    "gradient's mean over all targets": ("tied", "backward d.head"),
    "scale missing in A's gradient": ("adapted", "gradient head.lora_a"),
    "forgotten residual, forward": ("tied", "forward blocks.0.shortcut1"),
    "forgotten residual, backward": ("tied", "backward d.blocks.1.shortcut1"),
    "key's share of dx forgotten": ("tied", "backward d.blocks.1.norm1"),
    "position gradient of one example only": ("tied", "backward d.pos_emb"),
}


@pytest.mark.parametrize("defect", REFERENCE)
def test_a_fault_planted_in_the_reference_is_named_at_its_tensor(defect):
    name, tensor = REFERENCE[defect]
    (planted,) = (known for known in DEFECTS if known.name == defect)
    with planted.seeded():
        found = compared(sides(name))
    assert named(found) == tensor
    assert not found.agree
    assert all(pair.passed for pair in found.pairs[: found.first.number])


def test_faults_are_planted_in_every_layer_of_the_reference_that_the_model_uses():
    modules = {known.module for known in DEFECTS if known.name in REFERENCE}
    used = {"linear", "embedding", "layer_norm", "rms_norm", "rope", "swiglu", "gelu", "attention", "dropout"}
    assert modules == used | {"cross_entropy", "lora", "model"}


OPERATORS = {
    "layer_norm": ("tied", "forward blocks.0.norm1"),
    "gelu": ("tied", "forward blocks.0.mlp.act"),
    "attention": ("tied", "forward blocks.0.attn.heads"),
    "dropout": ("tied", "forward emb.dropout"),
    "cross_entropy": ("tied", "forward loss"),
    "rms_norm": ("llama", "forward blocks.0.norm1"),
    "rope": ("llama", "forward blocks.0.attn.query.rope"),
    "swiglu": ("llama", "forward blocks.0.mlp.act"),
    "add_layer_norm": ("tied", "fused blocks.0.norm2"),  # what is fused, a trace takes apart
    "add_rms_norm": ("llama", "fused blocks.0.norm2"),
    "linear_cross_entropy": ("tied", "step loss"),
}


def off(operator, factor, of_gradient=False):
    """PyTorch's operator with its values, or its gradients alone, off by a factor."""
    from gpt import ops

    def wrong(*arguments):
        found = getattr(ops.TORCH, operator)(*arguments)
        first, *rest = found if isinstance(found, tuple) else (found,)
        wrong = first * factor
        wrong = wrong + (first - wrong).detach() if of_gradient else wrong
        return (wrong, *rest) if rest else wrong

    return wrong


def test_faults_are_planted_in_every_operator_of_training():
    from gpt.twins import SWAPPABLE

    assert set(OPERATORS) == set(SWAPPABLE)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_fault_planted_in_an_operator_of_pytorch_is_named_at_its_tensor(operator, dtype):
    name, tensor = OPERATORS[operator]
    found = compared(sides(name, dtype, **{operator: off(operator, 1 + (1e-8 if dtype == "float64" else 1e-2))}), dtype)
    assert named(found) == tensor
    assert found.first.farther() == 1
    assert "other torch is farther from the truth" in render(found)


@pytest.mark.parametrize(
    ("operator", "tensor"),
    [("gelu", "backward d.blocks.1.mlp.up"), ("layer_norm", "backward d.blocks.1.shortcut2")],
)
def test_a_wrong_gradient_of_an_operator_is_named_where_it_goes_to(operator, tensor):
    assert named(compared(sides(**{operator: off(operator, 1.01, of_gradient=True)}))) == tensor


def test_between_two_engines_on_pytorch_the_truth_is_still_the_reference():
    found = compared(sides(engines=("torch", "torch"), gelu=off("gelu", 1.001)))
    assert named(found) == "forward blocks.0.mlp.act"
    assert found.first.farther() == 1
    assert found.first.pair.from_truth[0] < 1e-14


def test_rounding_alone_does_not_part_but_what_is_coarser_than_float32_does():
    from gpt import ops

    def coarse(x, approximate):
        return ops.gelu(x, approximate).to(torch.bfloat16).to(x.dtype)

    assert named(compared(sides(dtype="float32", gelu=coarse), "float32")) == "forward blocks.0.mlp.act"


# ---------------------------------------------------------------- where in the tensor


def test_the_worst_element_is_found_with_both_values_and_the_truth():
    def wrong(x, weight, bias, eps):
        y = torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
        bump = torch.zeros_like(y)
        bump[3, 11, 7] = 0.5
        bump[3, 2, 4] = 0.25
        return y + bump

    found = compared(sides(layer_norm=wrong))
    first = found.first
    assert first.index == (3, 11, 7)
    ours, theirs, true = first.at()
    assert ours == true
    assert theirs == pytest.approx(ours + 0.5, rel=1e-12)
    differences = first.differences()
    assert differences.shape == (13, 20)
    assert [tuple(place) for place in np.argwhere(differences > first.within())] == [(2, 4), (11, 7)]
    told = first.to_dict()
    assert told["around"]["rows"] == [8, 13]
    assert told["around"]["columns"] == [4, 11]
    assert told["around"]["b"][3][3] - told["around"]["a"][3][3] == pytest.approx(0.5)
    shown = render(found)
    assert "worst element [3, 11, 7] of [5, 13, 20]" in shown
    rows = [line.strip().strip("|") for line in shown.splitlines() if line.startswith("  |")]
    assert [(t, c, mark) for t, row in enumerate(rows) for c, mark in enumerate(row) if mark != " "] == [
        (2, 4, "█"),
        (11, 7, "█"),
    ]


@given(arrays(np.float64, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.floats(0, 1e300)), st.data())
def test_a_map_that_is_cut_keeps_the_largest_and_what_is_not_finite(array, data):
    rows, columns = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50))
    assert cut(array, rows, columns).max() == array.max()
    assert cut(array, rows, columns).shape == (min(rows, len(array)), min(columns, array.shape[1]))
    array[data.draw(st.integers(0, len(array) - 1)), 0] = np.nan
    assert np.isnan(cut(array, rows, columns)).any()


# ---------------------------------------------------------------- not finite


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes_and_is_named(value, dtype):
    def wrong(x, approximate):
        return torch.nn.functional.gelu(x, approximate=approximate) + torch.zeros_like(x).index_fill(
            2, torch.tensor([5]), value
        )

    found = compared(sides(dtype=dtype, gelu=wrong), dtype)
    assert named(found) == "forward blocks.0.mlp.act"
    assert found.not_finite == ("", "blocks.0.mlp.act")
    assert found.first.index == (0, 0, 5)
    assert "!" in render(found)
    json.dumps(page_data(found), allow_nan=False)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_two_sides_with_the_same_nan_do_not_agree(dtype):
    both = sides(dtype=dtype)
    both[0].params["blocks.1.mlp.up.bias"][3] = np.nan
    found = compared(both, dtype)
    assert named(found) == "forward blocks.1.mlp.up"
    assert found.not_finite == ("parameter blocks.1.mlp.up.bias",) * 2
    json.dumps(page_data(found), allow_nan=False)
    assert "the first tensor that is not finite is parameter blocks.1.mlp.up.bias" in render(found)


# ---------------------------------------------------------------- two models


def two_models(name, dtype="float64", **changes):
    config = model.CONFIGS[name]
    params = {tensor: value.astype(dtype) for tensor, value in model.parameters(config).items()}
    other = {
        tensor: changes.get(tensor.replace(".", "_"), lambda x: x)(value.copy()) for tensor, value in params.items()
    }
    return Side("X", "numpy", config, params), Side("Y", "numpy", config, other)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_of_two_models_the_first_parameter_that_differs_is_named(dtype):
    both = two_models("tied", dtype, blocks_0_mlp_up_weight=lambda x: x * 1.001, final_norm_bias=lambda x: x + 1)
    found = compared(both, dtype)
    assert named(found) == "parameter blocks.0.mlp.up.weight"
    tensors = [pair.name for pair in found.pairs if not pair.passed and pair.kind != "parameter"]
    assert tensors[0] == "blocks.0.mlp.up"
    assert not found.one_model
    assert "farther" not in render(found)
    assert compared(two_models("tied", dtype), dtype).agree


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_another_bias_of_the_keys_parts_no_models(dtype):
    assert compared(two_models("tied", dtype, blocks_0_attn_key_bias=lambda x: x + 3), dtype).agree
    assert not compared(two_models("tied", dtype, blocks_0_attn_query_bias=lambda x: x + 3), dtype).agree


def test_nor_where_one_model_runs_on_somebody_s_operators():
    a, b = two_models("tied", blocks_1_attn_key_bias=lambda x: x + 3)
    b = dataclasses.replace(b, engine="torch", kernels={"gelu": off("gelu", 1)})
    found = compared((a, b))
    assert found.agree, found.first
    assert "fused" in {pair.kind for pair in found.pairs}


def test_another_bias_of_keys_that_are_turned_does():
    config = model.CONFIGS["llama"].replace(qkv_bias=True)
    params = model.parameters(config)
    other = {name: value + 3 * name.endswith(model.KEY_BIAS) for name, value in params.items()}
    found = compared((Side("X", "numpy", config, params), Side("Y", "numpy", config, other)))
    assert named(found) == "parameter blocks.0.attn.key.bias"


def test_models_of_two_configurations_are_refused_with_the_field_that_differs():
    (a, _), (_, b) = sides("tied"), sides("no-bias")
    with pytest.raises(
        UserError, match="^qkv_bias: the configurations differ, True in numpy and False in other torch;"
    ):
        compared((a, b))


def test_engines_whose_passes_have_other_tensors_part_there(monkeypatch):
    def renamed(self, batch, trace, noise=None):
        sound(self, batch, lambda name, y: trace(name.replace("shortcut1", "shortcut"), y), noise)

    sound = NumpyEngine.trace
    monkeypatch.setattr(NumpyEngine, "trace", renamed)
    found = compared(sides())
    assert named(found) == "forward blocks.0.shortcut"
    assert "the other torch engine has blocks.0.shortcut1 here" in render(found)
    json.dumps(page_data(found), allow_nan=False)


# ---------------------------------------------------------------- the command


KERNELS = """
import torch
import torch.nn.functional as F

def right(x, weight, bias, eps):
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)

def without_gradient(x, weight, bias, eps):
    return right(x, weight, bias, eps).detach()

def wrong(x, weight, bias, eps):
    return right(x, weight, bias, 10 * eps)

def narrow(x, weight, bias, eps):
    return right(x, weight, bias, eps)[0]

def wide(x, weight, bias, eps):
    return right(x, weight, bias, eps).double()

def none(x, weight, bias, eps):
    pass

def raises(x, weight, bias, eps):
    raise ValueError("too\\nlarge")

class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy[:1]

def misshapen_gradient(x, weight, bias, eps):
    return Half.apply(right(x, weight, bias, eps))
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    file = tmp_path_factory.mktemp("kernels") / "mine.py"
    file.write_text(KERNELS)
    return str(file)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files of models: one, one of which a parameter differs, one with a layer less, one without a tokenizer."""
    folder, config = tmp_path_factory.mktemp("models"), PRESETS["bytes-tiny"].replace(n_layers=2, context_length=16)
    params = GPT.seeded(config, seed=1).params
    spec = ByteTokenizer().spec()
    save_model(folder / "a.safetensors", params, config, spec)
    changed = {**params, "blocks.1.attn.out.weight": params["blocks.1.attn.out.weight"] * np.float32(1.01)}
    save_model(folder / "b.safetensors", changed, config, spec)
    shallow = config.replace(n_layers=1)
    save_model(folder / "shallow.safetensors", GPT.seeded(shallow, seed=1).params, shallow, spec)
    save_model(folder / "mute.safetensors", params, config)
    return folder


def run(*arguments):
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "gpt", "diverge", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_says_that_engines_agree():
    done = run("numpy", "torch")
    assert (done.returncode, done.stderr) == (0, "")
    assert "they agree" in done.stdout


def test_two_files_are_compared_without_torch(models):
    code = (
        "import sys\nfor name in ('torch', 'triton'): sys.modules[name] = None\n"
        "from gpt.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    files = ["--model", str(models / "a.safetensors"), "--other", str(models / "b.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", code, "diverge", "numpy", "numpy", *files], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "they part at parameter blocks.1.attn.out.weight" in done.stdout


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_file_reads_a_text_on_both_engines(models, dtype, capsys):
    flags = ["--model", str(models / "a.safetensors"), "--text", "Hello, all!", "--dtype", dtype, "--json"]
    assert main(["diverge", "numpy", "torch", *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["agree"]
    assert told["batch"] == [1, 10]
    assert told["first"] is told["bisection"] is None
    assert [pair["name"] for pair in told["tensors"]][:2] == ["tok_emb", "pos_emb"]


@pytest.mark.parametrize("name", model.CONFIGS)
def test_small_models_read_bytes(name, capsys):
    assert main(["diverge", "--config", name, "--text", "Hello, all of you!"]) == 0
    assert "1 x 17 tokens" in capsys.readouterr().out


def test_a_kernel_of_one_s_own_is_told_right_from_wrong(kernels, capsys):
    for function, status in (("right", 0), ("wrong", 1), ("without_gradient", 0)):
        assert main(["diverge", "--kernel", f"{kernels}:{function}", "--op", "layer_norm"]) == status
        shown = capsys.readouterr().out
        assert ("they part at blocks.0.norm1 (forward)" in shown) == bool(status)
        assert ("its gradient is PyTorch's own" in shown) == (function == "without_gradient")


def test_the_json_of_a_fault_names_it(kernels, capsys):
    flags = ["--kernel", f"{kernels}:wrong", "--op", "layer_norm", "--dtype", "float64", "--bisect", "--json"]
    assert main(["diverge", "numpy", "torch", *flags]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["first"]["tensor"]["name"] == "blocks.0.norm1"
    assert told["first"]["farther"] == 1
    assert told["bisection"]["culprits"] == ["layer_norm"]


def test_the_kernels_agree_with_the_reference_in_triton_s_interpreter(models, capsys):
    """On a small model, for it is slow; that the kernels agree at all their sizes is checked elsewhere."""
    pytest.importorskip("triton")
    text = ["--model", str(models / "a.safetensors"), "--text", "Hello!"]
    assert main(["diverge", "numpy", "triton", *text, "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert not shown.err
    assert "they agree" in shown.out
    assert "the bound is 1e-11" in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "numpy numpy",
            "A and B: expected two engines, or a second model with --other, or a --kernel; got numpy twice",
        ),
        ("numpy tensorflow", "engine: 'tensorflow' is not one of numpy, torch, triton"),
        ("numpy torhc", "engine: 'torhc' is not one of numpy, torch, triton; did you mean torch?"),
        ("--config tide", "config: 'tide' is not one of tied, untied, "),
        (
            "--config tied --model MODELS/a.safetensors",
            "--config names a small model of random weights, --model brings",
        ),
        ("--dtype float16", "argument --dtype: invalid choice: 'float16'"),
        ("--kernel mine.py:f", "--kernel FILE.py:FUNCTION and --op OP go together"),
        ("--op gelu", "--kernel FILE.py:FUNCTION and --op OP go together"),
        ("--kernel FILE:right --op layernorm", "op: 'layernorm' is no operator of the model; did you mean layer_norm?"),
        ("--kernel FILE:right --op linear", "op: 'linear' is no operator of the model; choose from layer_norm, "),
        ("--kernel FILE:nothing --op gelu", "kernel: FILE has no function nothing"),
        ("--kernel absent.py:f --op gelu", "kernel: there is no file absent.py"),
        (
            "--kernel FILE:narrow --op layer_norm",
            "kernel: narrow as layer_norm must return float32 (5, 13, 20), got fl",
        ),
        (
            "--kernel FILE:wide --op layer_norm",
            "kernel: wide as layer_norm must return float32 (5, 13, 20), got float64",
        ),
        (
            "--kernel FILE:none --op layer_norm",
            "kernel: none as layer_norm must return float32 (5, 13, 20), got a None",
        ),
        ("--kernel FILE:raises --op layer_norm", "kernel: raises as layer_norm raised ValueError: too large"),
        ("--kernel FILE:right --op gelu", "kernel: right as gelu raised TypeError: right() missing"),
        ("--kernel FILE:misshapen_gradient --op layer_norm", "kernel: torch with misshapen_gradient: RuntimeError: "),
        ("--kernel FILE:right --op rms_norm --config tied", "op: this model computes no rms_norm; choose a --model or"),
        (
            "numpy numpy --kernel FILE:right --op gelu",
            "--kernel runs in PyTorch's model: expected torch or triton as A",
        ),
        ("--other MODELS/a.safetensors", "--other PATH is compared with a --model PATH, and none was given"),
        ("--model MODELS/a.safetensors --other MODELS/b.safetensors --bisect", "--bisect swaps operators between two"),
        ("numpy numpy --model MODELS/a.safetensors --other MODELS/shallow.safetensors", "n_layers: the configurations"),
        ("--model MODELS/none.safetensors", "MODELS/none.safetensors: no such file or folder"),
        ("--model MODELS/a.safetensors --text ab", "text: expected 3 to 17 tokens, what the model reads and one more"),
        (
            "--model MODELS/a.safetensors --text abcdefghijklmnopqr",
            "text: expected 3 to 17 tokens, what the model reads",
        ),
        ("--model MODELS/mute.safetensors --text abc", "text: MODELS/mute.safetensors holds no tokenizer; without"),
        ("--device tpu", "device: 'tpu' is not available here, choose from "),
        ("numpy torch triton", "twingrad diverge has no argument triton"),
    ],
)
def test_what_cannot_be_compared_is_one_line(arguments, message, kernels, models, capsys):
    given = [word.replace("FILE", kernels).replace("MODELS", str(models)) for word in arguments.split()]
    assert main(["diverge", *given]) == 2
    shown = capsys.readouterr()
    expected = message
    if "FILE.py" not in message:
        expected = message.replace("FILE", kernels).replace("MODELS", str(models))
    assert shown.err.startswith(f"error: {expected}")
    assert shown.err.count("\n") == 1
    assert shown.out == ""

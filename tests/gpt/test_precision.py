"""PyTorch's lower precisions and its compiler, on the CPU: near to the full computation, and files as always."""

import numpy as np
import pytest

from gpt.cli import main
from gpt.engine import Batch, NonFiniteError, OptimizerConfig, create_engine
from gpt.errors import UserError
from gpt.generate import Sampling, generate
from gpt.weights.load import load
from reference import PRESETS, GPTConfig, rope
from reference.init import initialize
from reference.philox import PhiloxNoise
from reference.torch_rng import Generator

torch = pytest.importorskip("torch")

TOKENS = np.random.default_rng(0).integers(0, 257, (4, 33))
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:])


def engine(preset="bytes-tiny", **settings):
    config = PRESETS[preset].replace(context_length=64)
    return create_engine("torch", config, initialize(config, Generator(1), "gpt2"), OptimizerConfig(), **settings)


@pytest.mark.parametrize("preset", ["bytes-tiny", "bytes-llama"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_near_keeps_float32_parameters_and_learns(preset, precision):
    full, lower = engine(preset), engine(preset, precision=precision)
    assert lower.accumulate(BATCH) == pytest.approx(full.accumulate(BATCH), rel=2e-3)
    assert lower.gradient_norm() == pytest.approx(full.gradient_norm(), rel=2e-2)
    theirs = full.gradients()
    for name, gradient in lower.gradients().items():
        assert gradient.dtype == np.float32
        if not name.endswith("key.bias"):  # its gradient is rounding
            difference = np.linalg.norm(gradient - theirs[name]) / np.linalg.norm(theirs[name])
            assert difference < 0.05, name
    before = lower.loss(BATCH)
    norm = lower.step(1e-3, max_norm=1.0)
    assert norm == pytest.approx(full.step(1e-3, max_norm=1.0), rel=2e-2)
    for _ in range(5):
        lower.accumulate(BATCH)
        lower.step(1e-3, max_norm=1.0)
    assert lower.loss(BATCH) < before
    assert all(p.dtype == np.float32 for p in lower.parameters().values())
    assert generate(lower, TOKENS[:2, :5], Sampling(6)).shape == (2, 11)


def test_tf32_is_for_gpus_and_changes_nothing_on_a_cpu(monkeypatch):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        full, tf32 = engine(), engine(precision="tf32")
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert tf32.accumulate(BATCH) == full.accumulate(BATCH)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_float16_gradients_that_overflow_take_no_step_and_lower_the_scale():
    lower = engine(precision="float16")
    before = {name: p.copy() for name, p in lower.parameters().items()}
    lower._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # larger than one begins with, so that it overflows
    lower.accumulate(BATCH)
    scale = lower._scaler.get_scale()
    assert not np.isfinite(lower.step(1e-3, max_norm=1.0))
    for name, p in lower.parameters().items():
        np.testing.assert_array_equal(p, before[name])
    assert lower._scaler.get_scale() < scale
    lower._scaler.update(2.0**10)
    lower.accumulate(BATCH)
    assert np.isfinite(lower.step(1e-3, max_norm=1.0))


def test_float16_gradients_that_overflow_at_a_scale_below_1_stop():
    lower = engine(precision="float16")
    lower._scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    lower.accumulate(BATCH, weight=float("inf"))
    with pytest.raises(NonFiniteError, match=r"^the gradient's norm is (inf|nan), first in tok_emb.weight"):
        lower.step(1e-3)


def test_in_full_precision_a_gradient_that_is_not_finite_stops_as_before():
    full = engine()
    full.accumulate(BATCH, weight=float("inf"))
    with pytest.raises(NonFiniteError):
        full.step(1e-3)


def test_a_compiled_model_takes_the_same_steps_and_is_compiled_once():
    """Loss and optimizer, each in one graph, while the learning rate, the masks and the number of steps change."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    config = GPTConfig(29, 8, 12, 1, 3, emb_dropout=0.1, shortcut_dropout=0.1, attn_dropout=0.1, tie_embeddings=True)
    params = initialize(config, Generator(1), "book")
    eager, compiled = (
        create_engine("torch", config, params, dtype="float64", compile=asked, checkpoint_activations=asked)
        for asked in (False, True)
    )
    batches = [Batch(tokens[:, :-1], tokens[:, 1:]) for tokens in np.split(TOKENS[:, :9] % 29, 2)]
    eager.accumulate(batches[0])
    eager.step(1e-3)  # from where the other one goes on
    compiled.load_parameters(eager.parameters())
    compiled.load_optimizer_state(eager.optimizer_state())
    for step in range(3):
        for i, batch in enumerate(batches):
            losses = [one.accumulate(batch, 0.5, PhiloxNoise(3, step, 2 * i), i == 1) for one in (eager, compiled)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-12)
        norms = [one.step(1e-3 / (step + 1), 1.0) for one in (eager, compiled)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-12)
        assert counters["stats"]["unique_graphs"] == 2
    ours, theirs = ({**one.parameters(), **one.optimizer_state()} for one in (compiled, eager))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=1e-9, err_msg=name)


def test_a_run_that_was_compiled_saves_names_as_always(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a short text that is read again and again. " * 20)
    options = [
        "--data",
        "text.txt",
        "--preset",
        "bytes-tiny",
        "--engine",
        "torch",
        "--model.n_layers",
        "1",
        "--max_length",
        "16",
        "--steps",
        "2",
        "--eval_every",
        "0",
        "--sample_every",
        "0",
    ]
    assert main(["train", *options, "--compile", "--precision", "bfloat16", "--out", "run"]) == 0
    saved = load("run")
    assert list(saved.params) == list(saved.config.parameter_shapes())
    assert {p.kind for p in saved.params.values()} == {"float32"}


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("numpy", {"precision": "bfloat16"}, "precision, compile: the numpy engine"),
        ("numpy", {"compile": True}, "precision, compile: the numpy engine"),
        ("torch", {"precision": "half"}, "precision: 'half' is not one of full, tf32, bfloat16, float16"),
        ("torch", {"precision": "bfloat16", "dtype": "float64"}, "precision: bfloat16 is for float32; with --dtype"),
        ("torch", {"precision": "tf32", "dtype": "float64"}, "precision: tf32 is for float32; with --dtype float64"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(name, settings, message):
    config = PRESETS["bytes-tiny"]
    with pytest.raises(UserError, match=message):
        create_engine(name, config, initialize(config, Generator(1)), **settings)


def test_compiled_angles_are_those_of_float64():
    """In float32 the frequencies would be off by more the further the position."""
    positions = torch.arange(8000, 8192)

    def angles(positions):
        return rope.angles(positions.numpy(), 64, dtype="float64")

    for found, expected in zip(torch.compile(angles, backend="aot_eager")(positions), angles(positions), strict=True):
        np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=1e-11)

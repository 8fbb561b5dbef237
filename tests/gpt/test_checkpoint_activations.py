"""A block's activations computed again in the backward pass: the same gradients, bit for bit, and less that is kept."""

import numpy as np
import pytest

from gpt.cli import main
from gpt.engine import IGNORE, Batch, OptimizerConfig, Preferences, create_engine
from gpt.errors import UserError
from gpt.finetune.adapters import adapt
from gpt.train.checkpoint import load_checkpoint
from reference.config import GPTConfig, LoRA
from reference.init import initialize
from reference.philox import PhiloxNoise
from reference.torch_rng import Generator, StreamNoise

torch = pytest.importorskip("torch")

GPT2 = GPTConfig(29, 8, 12, 3, 3, emb_dropout=0.1, shortcut_dropout=0.1, attn_dropout=0.1, tie_embeddings=True)
LLAMA = GPT2.replace(norm="rms_norm", mlp="swiglu", position="rope", tie_embeddings=False, n_layers=2)
TOKENS = np.random.default_rng(0).integers(0, 29, (4, 9))
BATCH = Batch(TOKENS[:, :-1], np.where(np.arange(8) < [[0], [3], [8], [1]], IGNORE, TOKENS[:, 1:]))
PAIRS = Preferences(TOKENS[:, :-1], TOKENS[:, 1:], "dpo", 0.1, np.array([-30.0, -31, -29, -33]))


@pytest.fixture(autouse=True)
def _one_thread():
    """To which arrays so small cost least."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def engines(config=GPT2, adapters=False, trained=(), name="torch", **settings):
    """Two that differ in whether activations are kept."""
    stream = Generator(1)
    params = initialize(config, stream, "book")
    if adapters:
        params, config = adapt(params, config, stream, lora=LoRA(rank=2, alpha=4.0, dropout=0.2))
    optimizer = OptimizerConfig(lr=1e-2, trained=trained)
    settings = {"device": "cpu", **settings}
    return [
        create_engine(name, config, params, optimizer, checkpoint_activations=again, **settings)
        for again in (False, True)
    ]


def take_steps(engine, batches, steps=2):
    """Losses, gradients of each step, parameters and moments at the end."""
    found = {}
    for step in range(steps):
        first = 0
        for i, batch in enumerate(batches):
            found[f"loss {step} {i}"] = engine.accumulate(batch, 0.5, PhiloxNoise(7, step, first), i == 1)
            first += batch.shape[0]
        found |= {f"{step} d.{name}": array.copy() for name, array in engine.gradients().items()}
        found[f"norm {step}"] = engine.step(1e-2, 0.1)
    return found | engine.parameters() | engine.optimizer_state()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("precision", ["full", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"config": LLAMA, "dtype": "float64"},
        {"config": LLAMA, "adapters": True},
        {"trained": ("blocks.1.*", "final_norm.*")},
    ],
    ids=["gpt2", "llama", "adapters", "frozen"],
)
def test_gradients_and_steps_are_the_same_bits(settings, precision):
    if precision != "full":  # of float32 alone
        settings = {**settings, "dtype": "float32"}
    kept, again = engines(**settings, precision=precision)
    assert_same(take_steps(kept, [BATCH, PAIRS]), take_steps(again, [BATCH, PAIRS]))
    assert again.loss(BATCH) == kept.loss(BATCH)


def test_on_the_kernels_too(interpreted):
    kept, again = engines(LLAMA.replace(n_layers=1), name="triton")
    assert_same(take_steps(kept, [BATCH], 1), take_steps(again, [BATCH], 1))


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels that the CPU runs; skipped where Triton is not installed."""
    pytest.importorskip("triton")
    from kernels.numerics import INTERPRETED

    if not INTERPRETED.value:
        pytest.skip("the kernels were loaded for a GPU")


def test_of_a_block_its_input_alone_is_kept():
    def kept(engine):
        sizes = []

        def note(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            engine.accumulate(BATCH, 1.0, PhiloxNoise(7, 0, 0))
        return sum(sizes)

    few, more = ([kept(e) for e in engines(GPT2.replace(n_layers=layers))] for layers in (1, 4))
    every_block = [(b - a) / 3 for a, b in zip(few, more, strict=True)]
    x = 4 * 8 * 12
    assert every_block[1] <= x
    assert every_block[0] > 20 * x


def test_a_trace_is_as_ever():
    seen = []
    for engine in engines(dtype="float64"):
        seen.append({})
        engine.trace(BATCH, lambda name, tensor: seen[-1].__setitem__(name, tensor.copy()), PhiloxNoise(7, 0, 0))
    assert "d.blocks.1.mlp.act" in seen[0]
    assert_same(*seen)


def test_noise_from_a_stream_is_refused(tmp_path, monkeypatch, capsys):
    _, again = engines()
    with pytest.raises(UserError, match=r"^checkpoint_activations: dropout_source torch .*choose philox$"):
        again.accumulate(BATCH, 1.0, StreamNoise(Generator(1)))
    monkeypatch.setenv("TWINGRAD_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("again and again. " * 40)
    words = ["train", "--data", str(text), "--preset", "bytes-tiny", "--engine", "torch", "--max_length", "16"]
    words += ["--steps", "2", "--sample_every", "0", "--out", str(tmp_path / "run")]
    assert main([*words, "--checkpoint_activations", "--dropout_source", "torch"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: checkpoint_activations: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert main([*words, "--save_every", "1"]) == 0
    assert main([*words, "--checkpoint_activations", "--resume", "--steps", "3"]) == 0
    assert load_checkpoint(tmp_path / "run").state["step"] == 3

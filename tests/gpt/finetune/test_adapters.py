"""Adapters put on, trained, merged, kept in files; class outputs; and losses on preferences, in both engines."""

import hashlib
import importlib
import json
import math
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt.data.windows import WindowLoader
from gpt.engine import (
    IGNORE,
    Batch,
    OptimizerConfig,
    Preferences,
    create_engine,
    optimizer_shapes,
    trained_names,
)
from gpt.errors import UserError
from gpt.finetune.adapters import (
    adapt,
    fingerprint,
    load_adapter,
    merge,
    model_fingerprint,
    save_adapter,
    unmerge,
)
from gpt.parity import check
from gpt.train.checkpoint import load_checkpoint
from gpt.train.config import TrainConfig
from gpt.train.trainer import Trainer
from gpt.weights.huggingface import save_folder
from gpt.weights.native import SavedModel, read_model, save_model
from gpt.weights.tensors import Stored, read_safetensors
from reference import PRESETS
from reference.config import GPTConfig
from reference.init import initialize
from reference.lora import LoRA
from reference.philox import PhiloxNoise
from reference.torch_rng import Generator

DROPOUT = {"emb_dropout": 0.1, "shortcut_dropout": 0.15, "attn_dropout": 0.2}
GPT2 = GPTConfig(37, 16, 20, 2, 3, head_dim=7, mlp_dim=33, qkv_bias=True, tie_embeddings=True)
LLAMA = GPTConfig(
    37, 16, 20, 2, 4, n_kv_heads=2, head_dim=6, mlp_dim=33,
    norm="rms_norm", mlp="swiglu", position="rope", bias=False,
)  # fmt: skip
CLASSES = {"n_outputs": 2, "tie_embeddings": False, "head_bias": True}
CLASSIFIER = GPT2.replace(**CLASSES)
BASES = {"gpt2": GPT2, "llama": LLAMA, "llama-tied": LLAMA.replace(tie_embeddings=True), "classifier": CLASSIFIER}
ALL = LoRA(rank=3, alpha=5.0)
TOKENS = np.random.default_rng(0).integers(0, 37, (4, 12))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with check.one_thread():
        yield


@pytest.fixture(params=["numpy", "torch"])
def engine(request):
    if request.param == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    return request.param


@pytest.fixture(params=BASES)
def config(request):
    return BASES[request.param]


def weights(config, seed=0, dtype="float64"):
    """All parameters, B too, so that activations and logits are of size 1."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in config.parameter_shapes().items():
        size = 1 / np.sqrt(shape[1]) if len(shape) == 2 else 1
        params[name] = (rng.normal(size=shape) * size + (len(shape) == 1)).astype(dtype)
    return params


def is_adapter(name):
    return name.endswith((".lora_a", ".lora_b"))


def without_adapters(params):
    return {name: value for name, value in params.items() if not is_adapter(name)}


def batch_of(config, step=0):
    """Targets at every position, or, for classes, at the last alone."""
    rng = np.random.default_rng([3, step])
    inputs = (rng.integers(37, size=(4, 1)) + 3 * np.arange(12)) % 37
    targets = (inputs + 3) % 37
    if config.n_outputs != config.vocab_size:
        targets = np.full(inputs.shape, IGNORE)
        targets[:, -1] = inputs[:, 0] % config.n_outputs
    return Batch(inputs, targets)


def pairs_of(objective, step=0, reference=None):
    """Three prompts with two answers each, of different lengths, padded at the end."""
    rng = np.random.default_rng([5, step])
    tokens, targets = rng.integers(0, 37, (6, 13)), np.full((6, 12), IGNORE)
    for row, (start, end) in enumerate([(3, 7), (5, 12), (2, 3), (3, 12), (5, 6), (2, 9)]):
        targets[row, start:end] = tokens[row, start + 1 : end + 1]
    return Preferences(tokens[:, :-1], targets, objective, 0.3, reference)


def assert_close(got, true, bound, name=""):
    got, true = np.asarray(got), np.asarray(true)
    assert got.shape == true.shape
    assert np.abs(got - true).max() <= bound * np.abs(true).max(), name


# ---------------------------------------------------------------- adapt


def test_a_new_head_is_the_one_that_pytorch_draws():
    """The first numbers of nn.Linear(768, 2) after torch.manual_seed(123)."""
    config = PRESETS["gpt2-small"].replace(n_layers=1, vocab_size=50, context_length=4)
    params = initialize(config, Generator(1))
    adapted, changed = adapt(params, config, Generator(123), **CLASSES)
    assert (changed.n_outputs, changed.tie_embeddings, changed.head_bias) == (2, False, True)
    assert adapted["head.weight"][:, :4].tolist() == [
        [-0.014714352786540985, 0.0011952797649428248, -0.01792162097990513, 0.013607913628220558],
        [-0.019930647686123848, -0.014098136685788631, -0.014300006441771984, 0.020004386082291603],
    ]
    assert adapted["head.bias"].tolist() == [0.014034774154424667, -0.01820223219692707]


def test_what_is_drawn_is_what_pytorch_draws():
    torch = pytest.importorskip("torch")
    adapted, _ = adapt(weights(GPT2), GPT2, Generator(123), **CLASSES)
    with torch.random.fork_rng():
        torch.manual_seed(123)
        head = torch.nn.Linear(20, 2)
    np.testing.assert_array_equal(adapted["head.weight"], head.weight.detach())
    np.testing.assert_array_equal(adapted["head.bias"], head.bias.detach())


def unreadable(params):
    """The same parameters in files that must not be opened."""

    def read():
        raise AssertionError("read")

    return {name: Stored(value.shape, value.dtype, value.dtype.name, read) for name, value in params.items()}


def test_what_is_kept_is_the_same_object_and_is_not_read(config):
    params = unreadable(weights(config))
    adapted, changed = adapt(params, config, Generator(1), lora=ALL)
    assert changed == config.replace(lora=ALL)
    assert list(adapted) == list(changed.parameter_shapes())
    assert all(adapted[name] is params[name] for name in params)
    for name in adapted.keys() - params.keys():
        assert is_adapter(name)
        assert adapted[name].shape == changed.parameter_shapes()[name]
        assert np.asarray(adapted[name]).any() == name.endswith("lora_a"), "B alone begins with 0"


def test_only_what_the_change_touches_is_drawn():
    params = weights(LLAMA)
    adapted, changed = adapt(params, LLAMA, Generator(1), n_outputs=5, head_bias=True)
    assert [name for name in adapted if adapted[name] is not params.get(name)] == ["head.weight", "head.bias"]
    assert adapted["head.weight"].shape == (5, 20)
    longer, _ = adapt(weights(GPT2), GPT2, Generator(1), context_length=32)
    assert longer["pos_emb.weight"].shape == (32, 20)
    back, plain = adapt(adapted, changed, Generator(1), head_bias=False)
    assert "head.bias" not in back
    assert back["head.weight"] is adapted["head.weight"]
    assert plain == LLAMA.replace(n_outputs=5)


def test_another_number_of_outputs_means_another_head_with_its_adapter():
    adapted, config = adapt(weights(CLASSIFIER), CLASSIFIER, Generator(1), lora=ALL)
    again, _ = adapt(adapted, config, Generator(2), n_outputs=3)
    renewed = [name for name in again if again[name] is not adapted[name]]
    assert renewed == ["head.weight", "head.bias", "head.lora_a", "head.lora_b"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_outputs": 2}, "n_outputs: 2, but a head tied to the token embedding has one for each of the 37 tokens"),
        ({"n_output": 2}, "n_output: no such field of a GPTConfig; did you mean n_outputs?"),
        ({"lora": {"rank": 0, "alpha": 1.0}}, "lora rank: 0 is not a whole number of at least 1"),
        ({"lora": {"rank": 2, "alpha": 1.0, "targets": ["gate"]}}, "lora targets: this model has none of gate"),
        ({"lora": {"rank": 2, "alpha": 1.0, "targets": "gate"}}, "lora targets: this model has none of gate"),
        ({"lora": {"rank": 2}}, "lora: expected alpha too, got rank"),
        ({"lora": {}}, "lora: expected rank and alpha too, got nothing"),
        (
            {"lora": {"rank": 2, "alpha": 1.0, "target": "up"}},
            "lora: no setting target, expected some of rank, alpha, scaling, dropout, targets",
        ),
    ],
)
def test_an_impossible_change_is_named(changes, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        adapt(weights(GPT2), GPT2, Generator(1), **changes)


def test_parameters_of_another_model_are_refused():
    with pytest.raises(UserError, match=r"^parameters do not fit the model: missing pos_emb.weight, "):
        adapt(weights(LLAMA), GPT2, Generator(1), lora=ALL)


# ---------------------------------------------------------------- how many numbers


def trained_numbers(config, patterns=()):
    shapes = config.parameter_shapes()
    return sum(math.prod(shapes[name]) for name in trained_names(config, patterns))


def test_numbers_of_parameters_are_those_of_the_sources():
    spam = PRESETS["gpt2-small"].replace(**CLASSES)
    assert spam.n_parameters == 124_441_346
    adapted = spam.replace(lora=LoRA(rank=16, alpha=16.0))
    assert sum(name.endswith(".lora_a") for name in adapted.parameter_shapes()) == 73
    assert trained_numbers(adapted) == 2_666_528
    assert trained_numbers(spam, ("blocks.11.*", "final_norm.*", "head.*")) == 7_090_946
    wide = GPTConfig(51200, 2048, 2560, 32, 32, lora=LoRA(rank=8, alpha=16.0, targets=("query", "value")))
    assert trained_numbers(wide) == 2_621_440


def test_the_optimizer_remembers_less_than_3_percent_of_what_it_would():
    def size(config):
        return sum(math.prod(shape) for shape in optimizer_shapes(config, trained_names(config)).values())

    base = PRESETS["gpt2-small"].replace(**CLASSES)
    assert size(base.replace(lora=LoRA(rank=16, alpha=16.0))) < 0.03 * size(base)


# ---------------------------------------------------------------- adapters in the engines


def test_a_new_adapter_changes_no_bit_of_the_output(engine, config):
    params = weights(config, dtype="float32")
    adapted, changed = adapt(params, config, Generator(1), lora=ALL)
    before, after = create_engine(engine, config, params), create_engine(engine, changed, adapted)
    np.testing.assert_array_equal(after.logits(TOKENS), before.logits(TOKENS))
    batch = batch_of(config)
    assert after.loss(batch) == before.loss(batch)


@pytest.mark.parametrize("scaling, factor", [("alpha/rank", 5 / 3), ("alpha", 5.0)])
def test_both_scalings(engine, config, scaling, factor):
    """The adapted model is the one whose weights have the scaled product added to them."""
    adapted = config.replace(lora=LoRA(3, 5.0, scaling, targets=("query", "out", "up", "down")))
    params = weights(adapted)
    added = {name: value.copy() for name, value in without_adapters(params).items()}
    for name in params:
        if name.endswith("lora_a"):
            layer = name.removesuffix(".lora_a")
            added[f"{layer}.weight"] += factor * params[f"{layer}.lora_b"] @ params[name]
    ours = create_engine(engine, adapted, params, dtype="float64").logits(TOKENS)
    assert_close(ours, create_engine(engine, config, added, dtype="float64").logits(TOKENS), 1e-12)
    unscaled = create_engine(engine, config, without_adapters(params), dtype="float64").logits(TOKENS)
    assert np.abs(ours - unscaled).max() > 0.01 * np.abs(ours).max(), "the adapter matters"


@pytest.mark.parametrize(
    "patterns, trained",
    [
        ((), is_adapter),
        (("blocks.1.*", "final_norm.*"), lambda name: name.startswith(("blocks.1.", "final_norm."))),
    ],
)
def test_frozen_parameters_keep_every_bit_while_the_others_learn(engine, config, patterns, trained):
    adapted, changed = adapt(weights(config, dtype="float32"), config, Generator(1), lora=ALL)
    model = create_engine(engine, changed, adapted, OptimizerConfig(lr=1e-2, trained=patterns))
    before = {name: value.copy() for name, value in model.parameters().items()}
    for step in range(3):
        model.accumulate(batch_of(config, step), noise=PhiloxNoise(1, step, 0))
        assert {name for name in before if trained(name)} == set(model.gradients())
        model.step(1e-2, max_norm=1.0)
    for name, value in model.parameters().items():
        assert (value != before[name]).any() == bool(trained(name)), name
    learns = [name for name in before if trained(name)]
    state = model.optimizer_state()
    assert list(model.trained) == learns
    assert set(state) == {"step", *(f"{moment}.{name}" for name in learns for moment in "mv")}
    assert {name: value.shape for name, value in state.items()} == optimizer_shapes(changed, learns)


def test_a_pattern_that_no_parameter_has_is_refused(engine):
    with pytest.raises(UserError, match=r"^trained: no parameter is named 'blocks.9.\*'"):
        create_engine(engine, GPT2, weights(GPT2), OptimizerConfig(trained=("tok_emb.*", "blocks.9.*")))


def make_trainer(engine, run_dir, steps):
    """A run of an adapted model, with dropout everywhere, in the adapters too."""
    base = GPT2.replace(**DROPOUT)
    generator = Generator(1)
    lora = LoRA(rank=3, alpha=5.0, dropout=0.2, targets=("query", "value", "mlp", "head"))
    params, config = adapt(weights(base, dtype="float32"), base, generator, lora=lora)
    ids = np.arange(300) * 3 % 37
    loaders = [WindowLoader(ids, 4, 8, 4, True, True, generator) for _ in range(2)]
    settings = TrainConfig(steps=steps, schedule="constant", eval_every=4, eval_batches=1)
    model = create_engine(engine, config, params, OptimizerConfig(lr=1e-2))
    return Trainer(model, settings, *loaders, lr=1e-2, generator=generator, run_dir=run_dir)


def test_a_resumed_run_of_adapters_equals_the_one_left_alone(engine, tmp_path):
    make_trainer(engine, tmp_path / "whole", 11).run()
    make_trainer(engine, tmp_path / "parts", 5).run()
    trainer = make_trainer(engine, tmp_path / "parts", 11)
    trainer.resume()
    assert trainer.run().step == 11
    one, other = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parts")
    assert one.model.config.lora is not None
    assert all(is_adapter(name) for name in one.optimizer if name != "step")
    for mine, theirs in ((one.model.params, other.model.params), (one.optimizer, other.optimizer)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    assert one.state == other.state


# ---------------------------------------------------------------- merge


@pytest.mark.parametrize("dtype, bound", [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("scaling", ["alpha/rank", "alpha"])
def test_a_merged_model_computes_the_same(engine, config, dtype, bound, scaling):
    adapted = config.replace(lora=LoRA(3, 2.0, scaling))
    params = weights(adapted, dtype=dtype)
    merged, plain = merge(params, adapted)
    assert plain.lora is None
    assert plain == config.replace(tie_embeddings=False), "a head with an adapter has its own weight"
    assert {name: tuple(value.shape) for name, value in merged.items()} == plain.parameter_shapes()
    assert all(value.dtype == dtype for value in merged.values())
    ours = create_engine(engine, plain, merged, dtype=dtype).logits(TOKENS)
    assert_close(ours, create_engine(engine, adapted, params, dtype=dtype).logits(TOKENS), bound)


def test_a_tied_head_without_an_adapter_stays_tied():
    adapted = GPT2.replace(lora=LoRA(3, 2.0, targets=("value",)))
    params = weights(adapted)
    merged, plain = merge(params, adapted)
    assert plain == GPT2
    assert [name for name in merged if merged[name] is not params[name]] == [
        "blocks.0.attn.value.weight",
        "blocks.1.attn.value.weight",
    ]


def test_a_merged_weight_is_the_float32_nearest_to_the_true_sum(monkeypatch):
    """Also where a weight has more rows than are added to at a time."""
    monkeypatch.setattr("gpt.finetune.adapters.ROWS", 7)
    config = GPT2.replace(lora=LoRA(16, 3.0, "alpha", targets=("down",)))
    params = weights(config, dtype="float32")
    merged, _ = merge(params, config)
    for layer in ("blocks.0.mlp.down", "blocks.1.mlp.down"):
        a, b, w = (params[f"{layer}.{kind}"].astype(np.longdouble) for kind in ("lora_a", "lora_b", "weight"))
        np.testing.assert_array_equal(merged[f"{layer}.weight"], (w + 3 * b @ a).astype(np.float32))


def test_half_precision_weights_merge_to_float32():
    config = GPT2.replace(lora=ALL)
    params = {name: value if is_adapter(name) else value.astype(np.float16) for name, value in weights(config).items()}
    merged, _ = merge(params, config)
    assert merged["blocks.0.attn.key.weight"].dtype == np.float32
    assert merged["tok_emb.weight"].dtype == np.float16


def test_a_merged_model_is_written_a_layer_at_a_time(tmp_path):
    """Nothing is read before it is asked for, and what is asked for is that layer alone."""
    config, reads = LLAMA.replace(lora=ALL), []
    values = weights(config)

    def counted(name):
        def read():
            reads.append(name)
            return values[name]

        return Stored(values[name].shape, values[name].dtype, "float64", read)

    merged, plain = merge({name: counted(name) for name in values}, config)
    assert reads == []
    np.asarray(merged["blocks.1.mlp.gate.weight"])
    assert set(reads) == {f"blocks.1.mlp.gate.{kind}" for kind in ("weight", "lora_a", "lora_b")}
    save_model(tmp_path / "m.safetensors", merged, plain)
    saved = read_model(tmp_path / "m.safetensors")
    assert saved.config == plain
    for name, value in merged.items():
        np.testing.assert_array_equal(saved.params[name], value)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_unmerging_gives_the_base_back_up_to_rounding(config, dtype):
    adapted = config.replace(lora=ALL)
    params = weights(adapted, dtype=dtype)
    merged, _ = merge(params, adapted)
    base, plain = unmerge(merged, adapted, params)
    assert plain == config
    assert list(base) == list(config.parameter_shapes())
    for name, value in base.items():
        true, summed = params[name], np.asarray(merged[name])
        if name.endswith("weight") and name.replace("weight", "lora_a") in params:
            largest = np.maximum(np.abs(summed), np.abs(true))  # each of two roundings is half a unit of its result
            assert (np.abs(np.asarray(value) - true) <= 4 * np.finfo(dtype).eps * largest.max()).all(), name
            assert not np.array_equal(summed, true)
        else:
            np.testing.assert_array_equal(value, true)


def test_what_cannot_be_merged_or_unmerged_is_named():
    adapted = GPT2.replace(lora=ALL)
    params = weights(adapted)
    with pytest.raises(UserError, match=r"^merge: the model has no adapters$"):
        merge(weights(GPT2), GPT2)
    with pytest.raises(UserError, match=r"^parameters do not fit the model: missing blocks.0.attn.query.lora_a, "):
        merge(weights(GPT2), adapted)
    merged, _ = merge(params, adapted)
    with pytest.raises(UserError, match=r"^parameters do not fit the model: missing head.weight$"):
        unmerge(weights(GPT2), adapted, params)
    with pytest.raises(UserError, match=r"^parameters do not fit the model: missing blocks.0.attn.query.lora_a, "):
        unmerge(merged, adapted, {})
    narrow = {name: value[:2] if name.endswith("lora_a") else value for name, value in params.items()}
    with pytest.raises(UserError, match=r"^blocks.0.attn.query.lora_a: expected shape \(3, 20\), got \(2, 20\)$"):
        unmerge(merged, adapted, narrow)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("base", [*BASES.values(), PRESETS["bytes-llama"]], ids=[*BASES, "bytes-llama"])
def test_an_adapter_s_file_holds_it_alone_and_gives_the_model_back(tmp_path, base):
    lora = LoRA(2, 3.0, "alpha", 0.1, ("query", "mlp", "head"))
    config = base.replace(lora=lora)
    params = weights(config, dtype="float32")
    save_adapter(tmp_path / "new" / "a.safetensors", params, config)
    inside, _ = read_safetensors(tmp_path / "new" / "a.safetensors")
    assert set(inside) == {name for name in params if is_adapter(name)}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.safetensors"]
    loaded, found = load_adapter(tmp_path / "new" / "a.safetensors", without_adapters(params), base)
    assert found == config
    assert list(loaded) == list(config.parameter_shapes())
    for name, value in params.items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)


def test_an_adapter_fits_the_same_weights_wherever_they_lie_and_whatever_their_dropout(tmp_path):
    config = GPT2.replace(lora=ALL)
    params = weights(config, dtype="float32")
    save_adapter(tmp_path / "a.safetensors", params, config)
    save_model(tmp_path / "base.safetensors", without_adapters(params), GPT2)
    stored = read_model(tmp_path / "base.safetensors")
    for base in (stored.params, {name: np.asfortranarray(x) for name, x in without_adapters(params).items()}):
        loaded, found = load_adapter(tmp_path / "a.safetensors", base, GPT2.replace(**DROPOUT))
        assert found == GPT2.replace(lora=ALL, **DROPOUT)
        np.testing.assert_array_equal(loaded["head.lora_b"], params["head.lora_b"])
    doubles = {name: value.astype(np.float64) for name, value in without_adapters(params).items()}
    load_adapter(tmp_path / "a.safetensors", doubles, GPT2)


def test_what_was_learnt_goes_on_from_the_file(engine, tmp_path):
    """Trained, saved, loaded beside the base: the same logits."""
    params = weights(GPT2, dtype="float32")
    adapted, config = adapt(params, GPT2, Generator(1), lora=ALL)
    model = create_engine(engine, config, adapted, OptimizerConfig(lr=1e-2))
    for step in range(2):
        model.accumulate(batch_of(GPT2, step))
        model.step(1e-2)
    save_adapter(tmp_path / "a.safetensors", model.parameters(), config)
    loaded, found = load_adapter(tmp_path / "a.safetensors", params, GPT2)
    again = create_engine(engine, found, loaded).logits(TOKENS)
    np.testing.assert_array_equal(again, model.logits(TOKENS))
    assert (again != create_engine(engine, GPT2, params).logits(TOKENS)).any()


@pytest.fixture
def saved(tmp_path):
    config = GPT2.replace(lora=ALL)
    params = weights(config, dtype="float32")
    save_adapter(tmp_path / "a.safetensors", params, config)
    return tmp_path / "a.safetensors", without_adapters(params)


def assert_one_line(error):
    assert "\n" not in str(error)


def assert_refused(path, params, config, message):
    """One line, which names the file."""
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {message}") as caught:
        load_adapter(path, params, config)
    assert_one_line(caught.value)


def test_an_adapter_of_another_architecture_is_refused(saved):
    path, _ = saved
    assert_refused(path, weights(LLAMA), LLAMA, r"an adapter of another architecture: .*norm layer_norm, not rms_norm")
    longer = GPT2.replace(context_length=20)
    assert_refused(path, weights(longer), longer, r"an adapter of another architecture: context_length 16, not 20$")
    assert_refused(path, weights(CLASSIFIER), CLASSIFIER, r"an adapter of another .*n_outputs 37, not 2$")


@pytest.mark.parametrize("name", ["tok_emb.weight", "blocks.1.mlp.down.weight", "final_norm.bias"])
def test_an_adapter_of_other_weights_is_refused(saved, name):
    path, params = saved
    assert_refused(path, {**params, name: params[name] * 1.001}, GPT2, "an adapter of other weights: ")


def test_a_model_that_has_an_adapter_gets_no_second(saved):
    path, _ = saved
    config = GPT2.replace(lora=ALL)
    assert_refused(path, weights(config), config, "the model has an adapter already; merge it into the weights first$")


def test_a_model_without_adapters_writes_no_file(tmp_path):
    with pytest.raises(UserError, match=r"a.safetensors: not written, the model has no adapters$"):
        save_adapter(tmp_path / "a.safetensors", weights(GPT2), GPT2)
    assert list(tmp_path.iterdir()) == []


def test_files_of_other_kinds_are_refused(saved, tmp_path):
    _, params = saved
    path = tmp_path / "other"
    assert_refused(path, params, GPT2, "could not be read: ")
    save_model(path, params, GPT2)
    assert_refused(path, params, GPT2, "a whole model, expected an adapter, as save_adapter writes it$")
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file({"x": np.zeros(3)}, path)
    assert_refused(path, params, GPT2, "not a file of twingrad's, expected an adapter, as save_adapter writes it$")
    path.write_bytes(b"\x80\x04\x95" + b"." * 20)
    assert_refused(path, params, GPT2, "a pickle, which may run any code")
    path.write_bytes(b"")
    assert_refused(path, params, GPT2, "truncated or not a safetensors file")


def change_header(path, change):
    """Write the file anew with other metadata."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"twingrad_adapter": "2"}, "format 2, written by a newer twingrad; this one reads up to format 1$"),
        ({"twingrad_adapter": "one"}, "not a readable adapter: its header is damaged"),
        ({"lora": "{}"}, "not a readable adapter: its header is damaged"),
        ({"lora": '{"rank": -1, "alpha": 1}'}, "not a readable adapter: its header is damaged"),
        ({"lora": '{"rank": 4, "alpha": 1}'}, r"blocks.0.attn.query.lora_a: expected shape \(4, 20\), got \(3, 20\)"),
        (
            {"lora": '{"rank": 3, "alpha": 1, "targets": ["gate"]}'},
            "lora targets: this model has none of gate",
        ),
        (
            {"lora": '{"rank": 3, "alpha": 1, "targets": ["query"]}'},
            "parameters do not fit the model: unexpected blocks.0.attn.key.lora_a",
        ),
        ({"config": "[]"}, "not a readable adapter: its header is damaged"),
        ({"config": "[" * 100_000}, "not a readable adapter: its header is damaged"),
        ({"base": "00"}, "an adapter of other weights"),
    ],
)
def test_a_damaged_header_is_refused(saved, changed, message):
    path, params = saved
    change_header(path, lambda header: header["__metadata__"].update(changed))
    assert_refused(path, params, GPT2, message)


def test_a_header_that_lacks_something_is_refused(saved):
    path, params = saved
    change_header(path, lambda header: header["__metadata__"].pop("base"))
    assert_refused(path, params, GPT2, "not a readable adapter: its header is damaged")
    change_header(path, lambda header: header.pop("head.lora_b"))
    assert_refused(path, params, GPT2, "truncated or not a safetensors file")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_changed_in_a_file_it_loads_or_one_line_says_why(saved, data):
    path, params = saved
    whole = path.read_bytes()
    raw = bytearray(whole)
    length = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, length + 20))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: len(raw) - data.draw(st.integers(0, 3000) | st.just(0))])
    try:
        load_adapter(path, params, GPT2)
    except UserError as error:
        assert_one_line(error)
    finally:
        path.write_bytes(whole)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    config = GPT2.replace(lora=ALL)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="^cannot write "):
        save_adapter(tmp_path / "file" / "a.safetensors", weights(config), config)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="^cannot write "):
        save_adapter(tmp_path / "folder", weights(config), config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_fingerprint_is_what_it_says():
    """Computed here from its description."""
    config = GPTConfig(29, 8, 64, 1, 4)
    params = weights(config, dtype="float32")
    digest = hashlib.sha256()
    for name, shape in config.parameter_shapes().items():
        size = math.prod(shape)
        distance = next(d for d in range(1, size + 1, 2) if len(range(0, size, d)) <= 1024)
        digest.update(f"{name} {'x'.join(str(n) for n in shape)}\n".encode())
        digest.update(b"".join(np.float32(params[name].flat[i]).tobytes() for i in range(0, size, distance)))
    assert fingerprint(params, config) == digest.hexdigest()
    adapted = config.replace(lora=ALL)
    assert fingerprint({**params, **weights(adapted)} | params, adapted) == digest.hexdigest()
    assert model_fingerprint(params, config) == digest.hexdigest()
    assert model_fingerprint({**weights(adapted), **params}, adapted) != digest.hexdigest()


# ---------------------------------------------------------------- another implementation of adapters

LAYERS = {
    "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


def their_name(layer):
    if layer == "head":
        return "lm_head"
    _, block, _, kind = layer.split(".")
    return f"model.layers.{block}.{LAYERS[kind]}"


def llama_peer(folder, params, config):
    """transformers' Llama with these weights, in float64 throughout: its norms and its rope round to float32."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    save_folder(folder, SavedModel(params, config, None))
    peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")

    class Angles(torch.nn.Module):
        def forward(self, x, position_ids):
            frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).double() / config.head_dim)
            turns = position_ids[..., None] * frequencies
            turns = torch.cat([turns, turns], dim=-1)
            return turns.cos(), turns.sin()

    peer.model.rotary_emb = Angles()
    for name, module in list(peer.named_modules()):
        if name.endswith("norm"):
            exact = torch.nn.RMSNorm(config.emb_dim, config.norm_eps, dtype=torch.float64)
            exact.weight = module.weight
            parent, _, attribute = name.rpartition(".")
            setattr(peer.get_submodule(parent), attribute, exact)
    return peer.eval()


def adapted_by_hand(peer, lora, adapter):
    """y = W x + s B A x, as the paper has it; returns the model, and A and B by our names."""
    torch = importlib.import_module("torch")

    class Adapted(torch.nn.Module):
        def __init__(self, layer, a, b):
            super().__init__()
            self.layer, self.a, self.b = layer, torch.nn.Parameter(a), torch.nn.Parameter(b)

        def forward(self, x):
            return self.layer(x) + lora.alpha / lora.rank * (self.b @ (self.a @ x.mT)).mT

    found = {}
    for name in adapter:
        if name.endswith("lora_a"):
            layer = name.removesuffix(".lora_a")
            parent, _, attribute = their_name(layer).rpartition(".")
            module = peer.get_submodule(parent)
            a, b = (torch.from_numpy(adapter[f"{layer}.lora_{kind}"].copy()) for kind in "ab")
            wrapped = Adapted(getattr(module, attribute), a, b)
            setattr(module, attribute, wrapped)
            found[f"{layer}.lora_a"], found[f"{layer}.lora_b"] = wrapped.a, wrapped.b
    return peer, found


def adapted_by_peft(peer, lora, adapter):
    """The same by the library in common use."""
    peft = pytest.importorskip("peft", reason="peft, or something that it needs, is not installed")
    torch = importlib.import_module("torch")
    targets = [{**LAYERS, "head": "lm_head"}[target].rpartition(".")[2] for target in lora.targets]
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0)
    model = peft.get_peft_model(peer, settings)
    found = {}
    for name, value in adapter.items():
        layer, _, kind = name.rpartition(".lora_")
        parameter = model.get_parameter(f"base_model.model.{their_name(layer)}.lora_{kind.upper()}.default.weight")
        parameter.data = torch.from_numpy(value.copy())
        found[name] = parameter
    return model.eval(), found


@pytest.mark.parametrize("theirs", [adapted_by_hand, adapted_by_peft], ids=["formula", "peft"])
def test_logits_and_gradients_are_those_of_another_implementation(engine, tmp_path, theirs):
    torch = pytest.importorskip("torch")
    lora = LoRA(3, 5.0, targets=("query", "value", "out", "gate", "down", "head"))
    config = LLAMA.replace(lora=lora)
    params = weights(config)
    adapter = {name: value for name, value in params.items() if is_adapter(name)}
    peer, parameters = theirs(llama_peer(tmp_path / "base", without_adapters(params), LLAMA), lora, adapter)
    batch = batch_of(LLAMA)
    logits = peer(torch.from_numpy(batch.inputs)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten())
    loss.backward()
    ours = create_engine(engine, config, params, dtype="float64")
    assert_close(ours.logits(batch.inputs), logits[:, -1].detach(), 1e-10)
    assert ours.accumulate(batch) == pytest.approx(loss.item(), rel=1e-10)
    gradients = ours.gradients()
    assert gradients.keys() == parameters.keys() == adapter.keys()
    for name, parameter in parameters.items():
        assert_close(gradients[name], parameter.grad, 1e-10, name)


# ---------------------------------------------------------------- preferences


def published_loss(model, batch):
    """DPO and ORPO as their papers have them, for autograd: a model of log-probabilities, nothing of ours but that."""
    torch = importlib.import_module("torch")
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    counted = targets != IGNORE
    logps = torch.log_softmax(model(inputs), -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * counted
    logsigmoid = torch.nn.functional.logsigmoid
    if batch.objective == "dpo":
        (pi_c, pi_r), (ref_c, ref_r) = logps.sum(1).chunk(2), torch.from_numpy(batch.reference).chunk(2)
        return -logsigmoid(batch.beta * ((pi_c - pi_r) - (ref_c - ref_r))).mean()
    chosen, rejected = (logps.sum(1) / counted.sum(1)).chunk(2)
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return (-chosen - batch.beta * logsigmoid(log_odds)).mean()


def answer_logps(model, batch):
    return model.token_logps(batch).logps.sum(axis=1)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_losses_on_preferences_are_the_published_ones(engine, objective, base):
    torch = pytest.importorskip("torch")
    from gpt.model import GPT

    config = BASES[base]
    params = weights(config)
    batch = pairs_of(objective)
    if objective == "dpo":  # the reference is another model
        batch = batch._replace(
            reference=answer_logps(create_engine("numpy", config, weights(config, 1), dtype="float64"), batch)
        )
    model = GPT(config).double()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
    loss = published_loss(model, batch)
    loss.backward()
    ours = create_engine(engine, config, params, dtype="float64")
    assert ours.loss(batch) == pytest.approx(loss.item(), rel=1e-10)
    assert ours.accumulate(batch, 0.7) == pytest.approx(loss.item(), rel=1e-10)
    gradients = ours.gradients()
    true = {name: 0.7 * p.grad.numpy() for name, p in model.named_parameters()}
    assert gradients.keys() == true.keys()
    for name, gradient in gradients.items():
        if name.endswith("key.bias"):  # its true gradient is 0
            assert np.abs(gradient).max() <= 1e-10 * np.abs(true[name.replace("bias", "weight")]).max()
        else:
            assert_close(gradient, true[name], 1e-10, name)


@pytest.mark.parametrize("dtype, bound", [("float64", 1e-12), ("float32", 1e-5)])
def test_dpo_begins_with_the_logarithm_of_2(engine, dtype, bound):
    config = GPT2.replace(lora=ALL)
    adapted, _ = adapt(weights(GPT2), GPT2, Generator(1), lora=ALL)
    model = create_engine(engine, config, adapted, dtype=dtype)
    batch = pairs_of("dpo")
    batch = batch._replace(reference=answer_logps(model, batch))
    assert model.loss(batch) == pytest.approx(math.log(2), rel=bound)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_what_is_learnt_is_to_prefer_the_chosen(engine, objective):
    adapted, config = adapt(weights(GPT2), GPT2, Generator(1), lora=ALL)
    model = create_engine(engine, config, adapted, OptimizerConfig(lr=1e-2), dtype="float64")
    before = answer_logps(model, pairs_of("dpo"))
    batch = pairs_of(objective, reference=before)
    losses = []
    for _ in range(15):
        losses.append(model.accumulate(batch))
        model.step(1e-2)
    assert model.loss(batch) < 0.8 * losses[0]
    chosen, rejected = ((answer_logps(model, batch) - before) / batch.lengths).reshape(2, -1)
    assert (chosen > rejected).all()


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_token_logps_of_preferences_are_those_of_each_answer(engine, objective):
    """And a token that does not count is 0, whatever was predicted there."""
    model = create_engine(engine, GPT2, weights(GPT2), dtype="float64")
    batch = pairs_of(objective)
    found = model.token_logps(batch)
    assert found.logps.dtype == np.float64
    assert (found.logps[batch.targets == IGNORE] == 0).all()
    assert not found.best[batch.targets == IGNORE].any()
    for row in range(6):
        mean = model.loss(Batch(batch.inputs[row : row + 1], batch.targets[row : row + 1]))
        assert found.logps[row].sum() == pytest.approx(-mean * batch.lengths[row], rel=1e-12)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reference": None}, "dpo: expected the 6 answers' log-probabilities before training as `reference`"),
        ({"reference": np.zeros(3)}, "dpo: expected the 6 answers' log-probabilities before training as `reference`"),
        ({"objective": "ppo"}, "objective: 'ppo' is not one of dpo, orpo"),
        ({"targets": np.full((6, 12), IGNORE)}, "preferences: an answer has no token"),
    ],
)
def test_preferences_that_are_none_are_refused(engine, change, message):
    model = create_engine(engine, GPT2, weights(GPT2))
    batch = pairs_of("dpo", reference=np.zeros(6))._replace(**change)
    for call in (model.loss, model.accumulate):
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            call(batch)


# ---------------------------------------------------------------- the engines in lockstep


@pytest.mark.parametrize("kind", ["language model", "classification", "dpo", "orpo"])
@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.parametrize("trained", [(), ("*",)], ids=["adapters", "everything"])
def test_both_engines_train_alike(kind, base, trained):
    """20 clipped steps with dropout everywhere, float64: the same losses to 1e-12.

    Rounding grows along the way, where AdamW divides small gradients by their size; a norm shows it before a loss does.
    """
    pytest.importorskip("torch")
    config = BASES[base].replace(**DROPOUT, lora=LoRA(3, 5.0, dropout=0.2))
    if kind == "classification":
        config = config.replace(**CLASSES)
    params = weights(config)
    optimizer = OptimizerConfig(trained=trained)
    both = [create_engine(name, config, params, optimizer, "float64") for name in ("numpy", "torch")]
    preferences = kind in ("dpo", "orpo")
    for step in range(20):
        batch = pairs_of(kind, step) if preferences else batch_of(config, step)
        if kind == "dpo":
            batch = batch._replace(reference=np.linspace(-20.0, -8.0, 6))
        losses = [model.accumulate(batch, 1.0, PhiloxNoise(7, step, 0)) for model in both]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12), step
        norms = [model.step(1e-3, 0.7) for model in both]
        assert step >= 10 or norms[0] == pytest.approx(norms[1], rel=1e-11), step

"""Llama-style models against transformers' LlamaForCausalLM: logits, gradients, generation, and files both ways."""

import json

import numpy as np
import pytest

from gpt.engine import Batch, create_engine
from gpt.errors import UserError
from gpt.generate import Sampling, Writer
from gpt.tokenizers import ByteTokenizer
from gpt.weights.huggingface import save_folder
from gpt.weights.load import load
from gpt.weights.names import FORMATS, from_ours
from gpt.weights.native import SavedModel, save_model
from reference import PRESETS
from reference.config import GPTConfig
from reference.rope import Scaling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(1).integers(0, 97, (3, 40))
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:])
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e4, "factor": 4.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "grouped": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "llama3": {"rope_parameters": LLAMA3},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 10},
}


def make_peer(**settings):
    """transformers' Llama with random weights, every one of them."""
    sizes = {
        "vocab_size": 97, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 44,
        "num_hidden_layers": 2, "num_attention_heads": 4, "attn_implementation": "eager",
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **settings})).eval()
        with torch.no_grad():
            for p in peer.parameters():
                p.copy_((0.3 if p.ndim == 2 else 0.6) * torch.randn(p.shape) + 0.05)
    return peer


def logits_of(peer, tokens):
    with torch.no_grad():
        return peer(torch.from_numpy(tokens)).logits.numpy()


def assert_same_logits(saved, peer, bound=1e-5):
    theirs = logits_of(peer, BATCH.inputs)[:, -1]
    for name in ("numpy", "torch"):
        ours = create_engine(name, saved.config, saved.params).logits(BATCH.inputs)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * np.abs(theirs).max(), err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_are_those_of_transformers(tmp_path, variant):
    peer = make_peer(**VARIANTS[variant])
    peer.save_pretrained(tmp_path)
    saved = load(tmp_path)
    assert_same_logits(saved, peer)
    logits = peer(torch.from_numpy(BATCH.inputs)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(BATCH.targets).flatten())
    loss.backward()
    theirs = {name: p.grad.numpy() for name, p in peer.named_parameters()}
    for engine in ("numpy", "torch"):
        ours = create_engine(engine, saved.config, saved.params)
        assert ours.accumulate(BATCH) == pytest.approx(loss.item(), rel=1e-5)
        gradients = from_ours(FORMATS["huggingface-llama"], saved.config, ours.gradients())
        assert gradients.keys() == theirs.keys()
        for name, gradient in gradients.items():
            error = np.abs(np.asarray(gradient) - theirs[name]).max()
            assert error <= 1e-5 * np.abs(theirs[name]).max(), (engine, name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_written_transformers_reads_with_the_same_logits(tmp_path, variant, interleaved):
    """Also a model whose rope turns interleaved pairs: queries and keys are put into the other order."""
    make_peer(**VARIANTS[variant]).save_pretrained(tmp_path / "theirs")
    config = load(tmp_path / "theirs").config.replace(rope_interleaved=interleaved)
    rng = np.random.default_rng(2)
    params = {name: rng.normal(0.05, 0.3, shape) for name, shape in config.parameter_shapes().items()}
    saved = SavedModel(params, config, ByteTokenizer().spec())
    save_folder(tmp_path / "out", saved, shard_size=20_000)
    peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_same_logits(saved, peer.float())
    again = load(tmp_path / "out")
    assert again.config == config.replace(rope_interleaved=False)
    assert_same_logits(again, peer)


def test_older_files_say_theta_and_scaling_elsewhere(tmp_path):
    peer = make_peer(rope_parameters=LLAMA3)
    peer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    old = settings.pop("rope_parameters")
    settings["rope_theta"] = old.pop("rope_theta")
    settings["rope_scaling"] = old
    (tmp_path / "config.json").write_text(json.dumps(settings))
    saved = load(tmp_path)
    assert saved.config.rope_scaling == Scaling(4.0, 1.0, 4.0, 16)
    assert saved.config.rope_theta == 5e4
    assert_same_logits(saved, peer)


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("variant", ["grouped", "llama3"])
def test_with_and_without_a_cache_texts_are_the_same_also_beyond_the_context(tmp_path, engine, variant):
    make_peer(**{**VARIANTS[variant], "max_position_embeddings": 32}).save_pretrained(tmp_path)
    saved = load(tmp_path)
    model = create_engine(engine, saved.config, saved.params)
    prompts, texts = [TOKENS[0, :3], TOKENS[1, :17], TOKENS[2]], []
    for cached in (True, False):
        writer = Writer(model, prompts, Sampling(25, temperature=1.0, top_k=30), cached=cached)
        while writer.running:
            writer.step()
        texts.append(writer.texts)
    assert texts[0] == texts[1]


def test_our_own_file_keeps_everything(tmp_path):
    config = GPTConfig(
        31, 16, 24, 2, 4, n_kv_heads=2, mlp_dim=20, norm="rms_norm", mlp="swiglu", position="rope", rope_theta=5e4,
        rope_interleaved=True, rope_scaling=Scaling(8.0, 1.0, 4.0, 8), bias=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in config.parameter_shapes().items()}
    save_model(tmp_path / "m.safetensors", params, config)
    saved = load(tmp_path / "m.safetensors")
    assert saved.config == config
    for name, array in params.items():
        np.testing.assert_array_equal(saved.params[name], array)


@pytest.mark.parametrize(
    "preset, parameters",
    [
        ("course-llama", 138_431_232),
        ("llama2-7b", 6_738_415_616),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3.2-1b", 1_235_814_400),
    ],
)
def test_presets_have_the_sizes_that_are_published(preset, parameters):
    assert PRESETS[preset].n_parameters == parameters


def test_the_course_s_model_at_its_size_has_transformers_logits(tmp_path):
    config = PRESETS["course-llama"].replace(n_layers=2)
    rng = np.random.default_rng(0)
    params = {
        name: (0.04 * rng.standard_normal(shape, np.float32) if len(shape) == 2 else np.ones(shape, np.float32))
        for name, shape in config.parameter_shapes().items()
    }
    saved = SavedModel(params, config, None)
    save_folder(tmp_path / "out", saved)
    peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = rng.integers(0, 16384, (1, 50))
    theirs = logits_of(peer, tokens)[:, -1]
    for name in ("numpy", "torch"):
        ours = create_engine(name, config, params).logits(tokens)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=name)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not one of silu"),
        ({"attention_bias": True}, "attention_bias and mlp_bias: expected both or neither"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not one of default, llama3"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "expected a number as low_freq_factor"),
        ({"num_key_value_heads": 3}, "n_kv_heads: 3 does not divide n_heads 4"),
        ({"head_dim": 7}, "head_dim: 7 is odd, and rope turns pairs"),
        ({"intermediate_size": 45}, r"mlp.gate_proj.weight .*has shape \(44, 32\), where the config says \(45, 32\)"),
        ({"model_type": "mistral"}, "model_type 'mistral', expected one of gpt2, llama"),
    ],
)
def test_what_no_model_here_is_is_refused(tmp_path, changes, message):
    make_peer().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(UserError, match=message):
        load(tmp_path)


# Checkpoints of training code, with pickled settings.


class ModelArgs:
    """The settings object of a training script, which is pickled by its name."""

    def __init__(self, **settings):
        self.__dict__.update(settings)


class Evil:
    def __reduce__(self):
        return pytest.fail, ("the pickle was run",)


def training_checkpoint(config, params, **others):
    theirs = from_ours(FORMATS["llama2.c"], config, params)
    state = {f"_orig_mod.{name}": torch.from_numpy(np.array(tensor)) for name, tensor in theirs.items()}
    state["_orig_mod.freqs_cos"] = torch.zeros(3)
    settings = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "norm_eps": 1e-3}
    return {"model": state, "model_args": settings, "iter_num": 7, "best_val_loss": torch.tensor(1.5), **others}


@pytest.fixture
def course():
    config = GPTConfig(
        97, 64, 24, 2, 4, n_kv_heads=2, mlp_dim=20, norm="rms_norm", norm_eps=1e-3, mlp="swiglu", position="rope",
        rope_interleaved=True, bias=False,
    )  # fmt: skip
    rng = np.random.default_rng(5)
    shapes = config.parameter_shapes()
    return config, {name: rng.normal(0.1, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("settings", ["mapping", "object"])
def test_a_training_checkpoint_is_read_and_has_transformers_logits_in_its_format(tmp_path, course, settings):
    config, params = course
    content = training_checkpoint(config, params)
    if settings == "object":
        content["config"] = ModelArgs(**content.pop("model_args"))
    torch.save(content, tmp_path / "best.pt")
    saved = load(tmp_path / "best.pt")
    assert saved.config == config
    for name, array in params.items():
        np.testing.assert_array_equal(saved.params[name], array, err_msg=name)
    save_folder(tmp_path / "out", saved)
    assert_same_logits(saved, transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval())


def test_a_tied_head_is_known_by_its_numbers(tmp_path, course):
    config, params = course
    content = training_checkpoint(config, {**params, "head.weight": params["tok_emb.weight"]})
    torch.save(content, tmp_path / "best.pt")
    assert load(tmp_path / "best.pt").config == config.replace(tie_embeddings=True)


def test_a_malicious_or_foreign_object_is_refused(tmp_path, course):
    content = training_checkpoint(*course)
    for name, other in (("evil", Evil()), ("foreign", Scaling(2.0))):
        torch.save({**content, "config": other}, tmp_path / f"{name}.pt")
        with pytest.raises(
            UserError, match=rf"{name}.pt: refused, for it is broken or a pickle that asks for more than tensors"
        ):
            load(tmp_path / f"{name}.pt")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_args": {}}, "lacks 'n_heads'"),
        ({"model_args": {"n_heads": 0}}, "division"),
        ({"model_args": {"n_heads": 4, "n_layers": 3, "max_seq_len": 8}}, "lacks layers.2.attention_norm.weight"),
        ({"model_args": None, "model": 3}, "not a model of its own"),
        ({"model": {}}, "lacks 'tok_embeddings.weight'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, course, changes, message):
    torch.save({**training_checkpoint(*course), **changes}, tmp_path / "best.pt")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "best.pt")

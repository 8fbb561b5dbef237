"""Weights in and out, against those whose formats they are: TensorFlow's Saver, transformers, torch.save."""

import json
import shutil

import numpy as np
import pytest

from gpt.cli import main
from gpt.engine import Batch, create_engine
from gpt.errors import UserError
from gpt.tokenizers import BPETokenizer, ByteTokenizer, huggingface_files
from gpt.weights.huggingface import save_folder
from gpt.weights.load import load, tensors
from gpt.weights.native import SavedModel, save_model
from reference.config import PRESETS, GPTConfig
from reference.init import initialize
from reference.lora import TARGETS, LoRA
from reference.torch_rng import Generator
from tests.gpt.weights.conftest import CONFIG, HPARAMS, make_peer, save_with_tensorflow

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(1).integers(0, 101, (3, 24))
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:])


def peer_logits(peer, tokens=TOKENS[:, :-1]):
    with torch.no_grad():
        return peer(torch.from_numpy(tokens)).logits[:, -1].numpy()


def assert_same_logits(saved, peer, rtol=1e-10):
    """Both engines against transformers, in float64, relative to the largest logit."""
    theirs = peer_logits(peer.double())
    for name in ("numpy", "torch"):
        ours = create_engine(name, saved.config, saved.params, dtype="float64").logits(BATCH.inputs)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max(), err_msg=name)


def assert_same_gradients(saved, peer, dtype, bound, batch=BATCH):
    """Loss and every gradient, under transformers' names, relative to its largest entry."""
    from gpt.weights.names import FORMATS, from_ours

    logits = peer(torch.from_numpy(batch.inputs)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten())
    peer.zero_grad()
    loss.backward()
    theirs = {name.removeprefix("transformer."): p.grad.numpy() for name, p in peer.named_parameters()}
    for engine in ("numpy", "torch"):
        ours = create_engine(engine, saved.config, saved.params, dtype=dtype)
        assert ours.accumulate(batch) == pytest.approx(loss.item(), rel=bound)
        gradients = from_ours(FORMATS["huggingface-gpt2"], saved.config, ours.gradients())
        assert gradients.keys() == theirs.keys()
        for name, gradient in gradients.items():
            error = np.abs(np.asarray(gradient) - theirs[name])
            if name.endswith(
                "c_attn.bias"
            ):  # the key's third of it has a true gradient of 0: what is there is rounding
                error = np.delete(error, np.s_[len(error) // 3 : 2 * len(error) // 3])
            assert error.max() <= bound * np.abs(theirs[name]).max(), (engine, name)


def test_transformers_folder_gives_transformers_logits_and_gradients(hub_folder):
    folder, peer = hub_folder
    saved = load(folder)
    assert saved.config == CONFIG
    assert_same_logits(saved, peer)
    assert_same_gradients(saved, peer.double(), "float64", 1e-10)
    peer.float()


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_function": "gelu"},
        {"n_inner": 50},
        {"tie_word_embeddings": False},
        {"layer_norm_epsilon": 1e-3, "n_head": 4},
    ],
)
def test_settings_of_a_config_are_followed(settings, tmp_path):
    peer = make_peer(**settings)
    peer.save_pretrained(tmp_path)
    assert_same_logits(load(tmp_path), peer)


def test_names_without_the_prefix_and_with_old_masks_are_read(hub_folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder, peer = hub_folder
    shutil.copy(folder / "config.json", tmp_path)
    arrays = load_file(folder / "model.safetensors")
    arrays = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    arrays["h.0.attn.bias"] = np.tril(np.ones((1, 1, 23, 23), np.float32))
    arrays["h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    arrays["lm_head.weight"] = arrays["wte.weight"]
    save_file(arrays, tmp_path / "model.safetensors")
    assert_same_logits(load(tmp_path), peer)
    assert_same_logits(load(tmp_path / "model.safetensors"), peer)
    peer.float()


def test_shards_with_an_index_are_read(hub_folder, tmp_path):
    _, peer = hub_folder
    peer.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(load(tmp_path), peer)
    peer.float()


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_s_own_files_are_read(hub_folder, tmp_path, sharded):
    folder, peer = hub_folder
    shutil.copy(folder / "config.json", tmp_path)
    state = {name: tensor for name, tensor in peer.state_dict().items() if name != "lm_head.weight"}
    if sharded:
        where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
        for file in set(where.values()):
            torch.save({name: state[name] for name in state if where[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_logits(load(tmp_path), peer)
    peer.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(tmp_path, dtype):
    peer = make_peer().to(dtype)
    peer.save_pretrained(tmp_path)
    assert_same_logits(load(tmp_path), peer)
    kinds = {tensor.kind for tensor in tensors(tmp_path).values()}
    assert kinds == {str(dtype).removeprefix("torch.")}


def test_openai_s_checkpoint_is_read_bit_for_bit_and_has_transformers_logits(openai_folder, capsys):
    """The variables of TensorFlow's file, without its optimizer's; and put into transformers' model as that has them:
    without a leading axis. In one test, for TensorFlow takes seconds to start."""
    folder, everything = openai_folder
    found = tensors(folder)
    variables = {name: value for name, value in everything.items() if "Adam" not in name and name.startswith("model/")}
    assert len(variables) == len(everything) - 3
    assert found.keys() == variables.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, variables[name])
    saved = load(folder)
    np.testing.assert_array_equal(
        saved.params["blocks.1.attn.key.weight"], variables["model/h1/attn/c_attn/w"][0, :, 36:72].T
    )
    assert saved.config == CONFIG
    peer = make_peer()
    names = {
        "model/wte": "wte.weight",
        "model/wpe": "wpe.weight",
        "model/ln_f/g": "ln_f.weight",
        "model/ln_f/b": "ln_f.bias",
    }
    state = {}
    for name, value in variables.items():
        layer = name.removeprefix("model/h").replace("/", ".")
        kind = {"g": "weight", "w": "weight", "b": "bias"}.get(layer.rpartition(".")[2])
        theirs = names.get(name) or f"h.{layer.rpartition('.')[0]}.{kind}"
        state[f"transformer.{theirs}"] = torch.from_numpy(value[0] if value.ndim == 3 else value)
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    assert_same_logits(saved, peer)
    assert len(variables) == 28
    assert main(["weights", "show", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "model/h1/attn/c_attn/w  float32   1 x 36 x 108" in out
    assert out.splitlines()[-1] == f"28 tensors, {CONFIG.n_parameters:,} numbers"


def test_the_tokenizer_in_openai_s_folder_is_read(tmp_path):
    tokenizer = BPETokenizer({bytes((value,)): value for value in range(256)} | {b"ab": 256}, {"<|endoftext|>": 257})
    save_with_tensorflow(tmp_path, hparams={**HPARAMS, "n_vocab": 258})
    assert load(tmp_path).tokenizer is None
    files = huggingface_files(tokenizer.spec(), 23)
    (tmp_path / "encoder.json").write_text(files["vocab.json"], encoding="utf-8")
    (tmp_path / "vocab.bpe").write_text(files["merges.txt"], encoding="utf-8")
    assert load(tmp_path).tokenizer == tokenizer.spec()


def test_the_four_sizes_of_openai_are_the_presets():
    from gpt.weights.openai import _config

    for name, n_embd, n_layer, n_head in (
        ("gpt2-small", 768, 12, 12),
        ("gpt2-medium", 1024, 24, 16),
        ("gpt2-large", 1280, 36, 20),
        ("gpt2-xl", 1600, 48, 25),
    ):
        hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
        assert _config_of(hparams, _config) == PRESETS[name]


def _config_of(hparams, read):
    from pathlib import Path
    from unittest.mock import patch

    with patch.object(Path, "read_text", lambda self, encoding: json.dumps(hparams)):
        return read(Path("hparams.json"))


# Out.


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        CONFIG.replace(tie_embeddings=False),
        CONFIG.replace(qkv_bias=False, bias=False, mlp="gelu", mlp_dim=50),
        CONFIG.replace(norm_eps=1e-3, attn_dropout=0.2, emb_dropout=0.1),
    ],
)
@pytest.mark.parametrize("shard_size", [10**9, 30_000])
def test_what_is_written_transformers_reads_with_the_same_logits(tmp_path, config, shard_size):
    rng = np.random.default_rng(2)
    params = {name: rng.normal(0.05, 0.3, shape) for name, shape in config.parameter_shapes().items()}
    save_folder(tmp_path / "out", SavedModel(params, config, ByteTokenizer().spec()), shard_size)
    assert ((tmp_path / "out" / "model.safetensors.index.json").exists()) == (shard_size < 10**9)
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert_same_logits(SavedModel(params, config, None), peer)
    again = load(tmp_path / "out")
    assert again.tokenizer == {"name": "bytes"}
    assert_same_logits(again, peer)
    assert {name: again.config.to_dict()[name] for name in ("attn_dropout", "emb_dropout")} == {
        name: config.to_dict()[name] for name in ("attn_dropout", "emb_dropout")
    }


@pytest.mark.parametrize("targets", [("query", "up"), TARGETS])
def test_adapters_are_merged_into_what_is_written(tmp_path, targets):
    config = CONFIG.replace(lora=LoRA(rank=2, alpha=3.0, targets=targets))
    rng = np.random.default_rng(2)
    params = {name: rng.normal(0.05, 0.3, shape) for name, shape in config.parameter_shapes().items()}
    save_model(tmp_path / "m.safetensors", params, config)
    assert main(["weights", "convert", str(tmp_path / "m.safetensors"), str(tmp_path / "out")]) == 0
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert_same_logits(SavedModel(params, config, None), peer)


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("special", [{"<|endoftext|>": 256}, {}])
def test_what_ends_a_text_is_the_tokenizer_s_not_the_last_of_a_padded_vocabulary(tmp_path, position, special):
    config = CONFIG.replace(vocab_size=300, n_outputs=300)
    if position == "rope":
        config = config.replace(position=position, norm="rms_norm", mlp="swiglu")
    tokenizer = BPETokenizer({bytes((value,)): value for value in range(256)}, special)
    save_folder(tmp_path / "out", SavedModel(initialize(config, Generator(1), "gpt2"), config, tokenizer.spec()))
    settings = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (settings.bos_token_id, settings.eos_token_id) == (tokenizer.eot, tokenizer.eot)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == tokenizer.eot


def test_a_tied_embedding_is_written_once(tmp_path):
    params = initialize(CONFIG, Generator(1), "gpt2")
    save_folder(tmp_path / "out", SavedModel(params, CONFIG, None))
    names = list(tensors(tmp_path / "out"))
    assert [name for name in names if "wte" in name or "lm_head" in name] == ["transformer.wte.weight"]


def test_a_model_that_was_trained_here_goes_out_and_comes_back(tmp_path):
    params = initialize(CONFIG, Generator(1), "gpt2")
    engine = create_engine("numpy", CONFIG, params)
    for _ in range(3):
        engine.accumulate(BATCH)
        engine.step(1e-2)
    save_model(tmp_path / "m.safetensors", engine.parameters(), CONFIG)
    assert main(["weights", "convert", str(tmp_path / "m.safetensors"), str(tmp_path / "hub")]) == 0
    assert main(["weights", "convert", str(tmp_path / "hub"), str(tmp_path / "again.safetensors")]) == 0
    again = load(tmp_path / "again.safetensors")
    for name, array in engine.parameters().items():
        np.testing.assert_array_equal(again.params[name], array, err_msg=name)
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hub").eval()
    theirs = peer_logits(peer)
    np.testing.assert_allclose(engine.logits(BATCH.inputs), theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head_dim": 11}, "head_dim: 11, but Hugging Face's GPT-2 has 12"),
        ({"n_kv_heads": 1}, "n_kv_heads: 1, but Hugging Face's GPT-2 has 3"),
        ({"head_bias": True, "tie_embeddings": False}, "head_bias: True"),
        ({"n_outputs": 2, "tie_embeddings": False}, "n_outputs: 2, but Hugging Face's GPT-2 has 101"),
    ],
)
def test_a_model_that_is_no_gpt2_to_transformers_is_not_written(tmp_path, changes, message):
    config = CONFIG.replace(**changes)
    params = initialize(config, Generator(1), "gpt2")
    with pytest.raises(UserError, match=message):
        save_folder(tmp_path / "out", SavedModel(params, config, None))
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path):
    saved = SavedModel(initialize(CONFIG, Generator(1), "gpt2"), CONFIG, None)
    (tmp_path / "out").mkdir()
    save_folder(tmp_path / "out", saved)
    with pytest.raises(UserError, match="out: exists, and is not an empty folder; nothing was written"):
        save_folder(tmp_path / "out", saved)
    save_model(tmp_path / "m.safetensors", saved.params, CONFIG)
    with pytest.raises(UserError, match=r"m.safetensors: exists, and is not"):
        save_folder(tmp_path / "m.safetensors", saved)
    assert not list(tmp_path.glob(".*"))


def test_the_folder_that_one_is_in_is_filled(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    save_folder(".", SavedModel(initialize(CONFIG, Generator(1), "gpt2"), CONFIG, None))
    assert load(".").config.emb_dim == CONFIG.emb_dim
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_gpt2_at_its_true_size(tmp_path):
    """124 million random parameters from transformers: logits in float32, and every gradient of a short text."""
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0)
    ).eval()
    peer.save_pretrained(tmp_path)
    saved = load(tmp_path)
    assert saved.config == PRESETS["gpt2-small"]
    assert saved.tokenizer == {"name": "gpt2"}
    tokens = np.random.default_rng(0).integers(0, 50257, (1, 17))
    theirs = peer_logits(peer, tokens)
    for name in ("numpy", "torch"):
        ours = create_engine(name, saved.config, saved.params).logits(tokens)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    assert_same_gradients(saved, peer, "float32", 1e-5, Batch(tokens[:, :-1], tokens[:, 1:]))


# What `twingrad weights show` prints.


def test_show_prints_name_shape_type_and_a_fingerprint_that_no_format_changes(hub_folder, tmp_path, capsys):
    folder, peer = hub_folder
    assert main(["weights", "show", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:5] == ["transformer.wte.weight", "float32", "101", "x", "36"] for line in lines)
    assert lines[-1] == f"28 tensors, {CONFIG.n_parameters:,} numbers"
    torch.save(peer.state_dict(), tmp_path / "state.pt")
    assert main(["weights", "show", str(tmp_path / "state.pt")]) == 0
    prints = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    for line in lines[:-1]:
        assert prints[line.split()[0]] == line.split()[-1]


def test_a_damaged_tensor_file_of_tensorflow_is_noticed(openai_folder, tmp_path):
    """Of a copy, whose file `checkpoint` names the folder that it was written to, where all is well."""
    shutil.copytree(openai_folder[0], tmp_path / "copy")
    data = tmp_path / "copy" / "model.ckpt.data-00000-of-00001"
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    data.write_bytes(raw)
    with pytest.raises(UserError, match="not a readable TensorFlow checkpoint: .*[Cc]hecksum"):
        load(tmp_path / "copy")
    data.write_bytes(raw[:100])
    with pytest.raises(UserError, match="not a readable TensorFlow checkpoint: "):
        load(tmp_path / "copy")


def test_a_config_of_another_family_is_refused(hub_folder, tmp_path):
    folder, _ = hub_folder
    settings = json.loads((folder / "config.json").read_text())
    shutil.copy(folder / "model.safetensors", tmp_path)
    for changes, message in (
        ({"model_type": "bert"}, "model_type 'bert', expected one of gpt2, llama"),
        ({"activation_function": "relu"}, "activation_function 'relu' is not one of"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_head": 5}, "n_heads: 5 does not divide"),
        ({"n_embd": "many"}, "emb_dim"),
        ({"vocab_size": 103}, r"model.safetensors: wte.weight \(tok_emb.weight\) has shape \(101, 36\).* \(103, 36\)"),
        ({"n_layer": 1}, "has unexpected h.1.attn.c_attn.bias, .*h.1.ln_1.weight"),
        ({"n_layer": 3}, "lacks h.2.ln_1.weight, h.2.attn.c_attn.weight"),
        ({"n_inner": 17}, r"h.0.mlp.c_fc.weight .*has shape \(36, 144\), where the config says \(36, 17\)"),
        ({"tie_word_embeddings": False}, "lacks lm_head.weight"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**settings, **changes}))
        with pytest.raises(UserError, match=message):
            load(tmp_path)


def test_a_nan_is_warned_of_by_name(tmp_path):
    params = initialize(CONFIG, Generator(1), "gpt2")
    params["blocks.1.mlp.up.weight"][3, 4] = np.nan
    save_model(tmp_path / "m.safetensors", params, CONFIG)
    with pytest.warns(UserWarning, match="m.safetensors: blocks.1.mlp.up.weight holds NaN"):
        create_engine("numpy", *reversed(load(tmp_path / "m.safetensors")[:2]))


def test_both_engines_read_the_same_file(tmp_path):
    config = GPTConfig(31, 16, 24, 2, 4, n_kv_heads=2)
    save_model(tmp_path / "m.safetensors", initialize(config, Generator(1)), config)
    saved = load(tmp_path / "m.safetensors")
    ours, theirs = (create_engine(name, config, saved.params).logits(np.arange(7)[None]) for name in ("numpy", "torch"))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())

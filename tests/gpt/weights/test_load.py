"""Weights by name: downloaded from a local server, converted once, loaded; and the commands on them."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt import LLM
from gpt.cli import main
from gpt.engine import create_engine
from gpt.errors import UserError
from gpt.tokenizers import ByteTokenizer
from gpt.train.log import read_log
from gpt.weights import load, registry
from gpt.weights.huggingface import save_folder
from gpt.weights.native import SavedModel, save_model
from gpt.weights.registry import Entry, File
from reference import GPT, PRESETS
from reference.init import initialize
from reference.torch_rng import Generator
from tests.gpt.weights.conftest import make_peer, save_with_tensorflow, serving

ROOT = Path(__file__).parents[3]
TINY = {"n_vocab": 50257, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 1}
FILES = ["checkpoint", "hparams.json", "model.ckpt.data-00000-of-00001", "model.ckpt.index", "model.ckpt.meta"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model with GPT-2's vocabulary, as OpenAI publishes its own: file name -> contents."""
    folder = tmp_path_factory.mktemp("published")
    save_with_tensorflow(folder, hparams=TINY)
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture
def published(checkpoint, tmp_path, monkeypatch):
    """The registry knows one entry, whose second address has it; the cache is empty."""
    monkeypatch.setenv("TWINGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TWINGRAD_DATA", raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving() as server:
        server.contents = {f"/good/{name}": content for name, content in checkpoint.items()}
        files = tuple(File(name, len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in checkpoint.items())
        urls = (f"{server.address}/gone/", f"{server.address}/good/")
        monkeypatch.setattr(
            registry, "ENTRIES", {"gpt2-small": Entry("gpt2-small", "124M", "tiny", "MIT", files, urls)}
        )
        yield server


@pytest.fixture
def vocabulary():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR, where GPT-2's vocabulary is, is not set")


def test_a_name_is_downloaded_converted_once_and_then_needs_neither_network_nor_tensorflow(
    published, vocabulary, capsys
):
    text = LLM.load("gpt2-small", engine="numpy").generate("Hello", 8)
    assert published.asked.count("/good/model.ckpt.index") == 1
    asked = len(published.asked)
    assert LLM.load("gpt2-small", engine="torch").generate("Hello", 8) == text
    code = (
        "import sys\nfor name in ('tensorflow', 'torch', 'requests'): sys.modules[name] = None\n"
        "from gpt import LLM\nprint(LLM.load('gpt2-small').generate('Hello', 8).encode())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == repr(text.encode()), done.stderr
    assert main(["generate", "--model", "gpt2-small", "--prompt", "Hello", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("Hello")
    assert main(["weights", "show", "gpt2-small"]) == 0
    assert "blocks.0.attn.query.weight" in capsys.readouterr().out
    assert main(["weights", "list"]) == 0
    assert "gpt2-small" in capsys.readouterr().out
    assert len(published.asked) == asked


def test_without_tensorflow_the_command_that_installs_it_is_named(published):
    """Where TensorFlow is not, its files are still downloaded."""
    code = (
        "import sys; sys.modules['tensorflow'] = None\nfrom gpt.weights import registry\n"
        f"from gpt.weights.registry import Entry, File\nregistry.ENTRIES = {registry.ENTRIES!r}\n"
        "from gpt.cli import main\nsys.exit(main(['weights', 'get', 'gpt2-small']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: this needs tensorflow, which is not installed: pip install 'twingrad[openai]'"
    )


def test_no_network_and_nothing_cached_says_so_in_one_line(published, capsys):
    published.contents = {}
    assert main(["weights", "get", "gpt2-small"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: gpt2-small: checkpoint")
    assert shown.count("\n") == 1


def test_a_repository_of_hugging_face_is_downloaded_and_loaded(tmp_path, monkeypatch, published):
    peer = make_peer()
    peer.save_pretrained(tmp_path / "hub" / "owner" / "tiny")
    monkeypatch.setenv("HF_ENDPOINT", str(tmp_path / "hub"))
    saved = load.load("owner/tiny")
    assert saved.config.emb_dim == 36
    assert np.isfinite(create_engine("numpy", saved.config, saved.params).logits(np.arange(5)[None])).all()
    with pytest.raises(UserError, match="owner/none"):
        load.load("owner/none")


def test_a_repository_that_was_written_here_has_its_tokenizer(tmp_path, monkeypatch):
    config = PRESETS["bytes-tiny"]
    saved = SavedModel(GPT.seeded(config, 1).params, config, ByteTokenizer().spec())
    save_folder(tmp_path / "hub" / "owner" / "ours", saved)
    monkeypatch.setenv("HF_ENDPOINT", str(tmp_path / "hub"))
    assert load.load("owner/ours").tokenizer == {"name": "bytes"}


@pytest.mark.parametrize(
    "source, message",
    [
        ("gpt2-smal", "no such file or folder, and no name of the registry"),
        ("no/such/place", "no such file or folder"),
        ("", "expected"),
    ],
)
def test_a_name_that_means_nothing_is_refused(source, message):
    with pytest.raises(UserError, match=message):
        load.load(source)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no model: no model.safetensors, no config.json, no hparams.json"):
        load.load(tmp_path)


def test_list_is_sorted_by_size_needs_no_network_and_says_licence_and_size():
    environment = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "gpt", "weights", "list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    assert all("MIT" in line and "GB" in line for line in lines[:4])
    assert "0.50 GB" in lines[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["convert", "nowhere", "x.safetensors"], "nowhere: no such file"),
        (["convert", "{m}", "x", "--to", "twingrad"], "expected a name that ends in .safetensors for twingrad"),
        (["convert", "{m}", "x.bin"], "x.bin: expected a folder, or a name that ends in .safetensors"),
        (["convert", "{m}", "x.safetensors", "--to", "huggingface"], "expected a folder for huggingface"),
        (["convert", "{m}", "{m}"], "exists; nothing was written"),
        (["convert", "{m}", "x", "--shard_size", "0"], "shard_size: expected a positive number"),
        (["show", "nowhere"], "nowhere: no such file"),
        (["get", "gpt2-smal"], "no such file or folder"),
        (["gett"], "has no command gett; did you mean get?"),
    ],
)
def test_commands_say_in_one_line_what_is_wrong(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "m.safetensors", GPT.seeded(PRESETS["bytes-tiny"], 1).params, PRESETS["bytes-tiny"])
    filled = [word.format(m=tmp_path / "m.safetensors") for word in arguments]
    assert main(["weights", *filled]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_nan_is_one_line_of_warning_on_the_command_line(tmp_path, capsys):
    params = GPT.seeded(PRESETS["bytes-tiny"], 1).params
    params["pos_emb.weight"][40, 0] = np.nan
    path = tmp_path / "m.safetensors"
    save_model(path, params, PRESETS["bytes-tiny"], ByteTokenizer().spec())
    options = ["--prompt", "a", "--max_new_tokens", "2", "--engine", "numpy"]
    assert main(["generate", "--model", str(path), *options]) == 0
    assert capsys.readouterr().err == f"warning: {path}: pos_emb.weight holds NaN\n"
    assert main(["weights", "show", str(path)]) == 0
    assert any(
        line.startswith("pos_emb.weight") and line.endswith("1 NaN") for line in capsys.readouterr().out.splitlines()
    )


def test_get_prints_where_it_is_and_what_is_converted_carries_its_tokenizer(published, vocabulary, tmp_path, capsys):
    assert main(["weights", "get", "gpt2-small"]) == 0
    place = Path(capsys.readouterr().out.strip())
    assert place == registry.folder("gpt2-small") / "twingrad.safetensors"
    assert place.exists()
    assert main(["weights", "convert", "gpt2-small", str(tmp_path / "hub")]) == 0
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    text = "Every effort moves you: naïve, 東京, 🎉\n\n  x = 1<|endoftext|>"
    ours = LLM.load(tmp_path / "hub", engine="numpy")
    assert tokenizer(text)["input_ids"] == ours.encode(text)
    assert tokenizer.decode(ours.encode(text)) == text
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["n_positions"] == 16


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_training_begins_with_loaded_weights_and_what_it_saves_goes_out_again(tmp_path, monkeypatch, engine):
    monkeypatch.chdir(tmp_path)
    config = PRESETS["bytes-tiny"].replace(context_length=16)
    params = initialize(config, Generator(3), "gpt2")
    save_folder(tmp_path / "hub", SavedModel(params, config, ByteTokenizer().spec()))
    (tmp_path / "text.txt").write_text("a short text that is read again and again. " * 20)
    options = ["--weights", "hub", "--data", "text.txt", "--engine", engine, "--weight_decay", "0"]
    assert main(["train", *options, "--steps", "1", "--lr", "1e-12", "--out", "still"]) == 0
    saved = load.load("still")
    assert (saved.config, saved.tokenizer) == (config, {"name": "bytes"})
    for name, array in params.items():
        np.testing.assert_allclose(saved.params[name], array, atol=1e-9, err_msg=name)
    assert main(["train", *options, "--steps", "8", "--lr", "1e-2", "--out", "run"]) == 0
    losses = read_log(tmp_path / "run" / "log.csv")["train_loss"]
    assert losses[~np.isnan(losses)][0] < 5  # beginning at ln 257 = 5.5, of 257 equally probable bytes
    assert main(["weights", "convert", "run", "out"]) == 0
    assert LLM.load("out", engine="numpy").generate("a short", 5) == LLM.load("run", engine="numpy").generate(
        "a short", 5
    )


def test_a_model_that_the_weights_do_not_fit_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = PRESETS["bytes-tiny"]
    save_model(tmp_path / "m.safetensors", initialize(config, Generator(3)), config, ByteTokenizer().spec())
    (tmp_path / "text.txt").write_text("a short text that is read again and again. " * 20)
    options = ["--weights", "m.safetensors", "--data", "text.txt", "--engine", "numpy"]
    assert main(["train", *options, "--model.vocab_size", "300"]) == 2
    shown = capsys.readouterr().err
    assert "tok_emb.weight: expected shape (300, 48), got (257, 48) (model: fields that change" in shown
    assert main(["train", *options, "--tokenizer", "gpt2"]) == 2
    assert "the tokenizer has 50257 tokens, and the model only 257" in capsys.readouterr().err

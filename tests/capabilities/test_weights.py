"""Published weights of all sizes find their places, and loaded ones know a text as well as transformers says."""

import os

import numpy as np
import pytest

from gpt.data import WindowLoader, load_text
from gpt.engine import create_engine
from gpt.tokenizers import GPT2Tokenizer
from gpt.train.trainer import evaluate
from gpt.weights.load import load
from gpt.weights.names import FORMATS, from_ours, to_ours
from gpt.weights.native import save_model
from reference.config import PRESETS, GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator


class Nowhere:
    """Stands for a parameter whose numbers nobody asks for."""

    dtype = np.dtype("float32")


@pytest.mark.parametrize(
    "preset, size", [("gpt2-small", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)]
)
@pytest.mark.parametrize("format", ["huggingface-gpt2", "openai-gpt2"])
def test_every_size_of_gpt2_has_a_place_for_every_tensor_and_none_left(preset, size, format):
    config = PRESETS[preset]
    assert round(config.n_parameters / 1e6) == size
    assert (config.context_length, config.qkv_bias, config.tie_embeddings) == (1024, True, True)
    theirs = from_ours(FORMATS[format], config, dict.fromkeys(config.parameter_shapes(), Nowhere()))
    assert len(theirs) == 4 + 12 * config.n_layers
    ours = to_ours(FORMATS[format], config, theirs, "its file")
    assert {name: tensor.shape for name, tensor in ours.items()} == config.parameter_shapes()


def test_loaded_weights_lose_on_a_story_what_transformers_says(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    if not {"TWINGRAD_DATA", "TIKTOKEN_CACHE_DIR"} <= os.environ.keys():
        pytest.skip("TWINGRAD_DATA and TIKTOKEN_CACHE_DIR say where The Verdict and GPT-2's vocabulary are")
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    peer.save_pretrained(tmp_path)
    ids = np.array(GPT2Tokenizer().encode(load_text("the-verdict")))
    loader = WindowLoader(ids, 2, 64, 64, shuffle=False, drop_last=True)
    with torch.no_grad():
        theirs = [peer(torch.from_numpy(batch.inputs), labels=None).logits.flatten(0, 1).double() for batch in loader]
        losses = [
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.targets).flatten()).item()
            for logits, batch in zip(theirs, loader, strict=True)
        ]
    saved = load(tmp_path)
    for name in ("numpy", "torch"):
        ours = evaluate(create_engine(name, saved.config, saved.params), loader)
        assert ours == pytest.approx(np.mean(losses), rel=1e-6)


def test_one_checkpoint_has_the_same_logits_in_both_engines(tmp_path):
    pytest.importorskip("torch")
    config = GPTConfig(31, 16, 24, 2, 4, n_kv_heads=2, head_dim=5, head_bias=True)
    save_model(tmp_path / "m.safetensors", initialize(config, Generator(1)), config)
    saved = load(tmp_path / "m.safetensors")
    tokens = np.arange(14).reshape(2, 7)
    ours, theirs = (
        create_engine(name, config, saved.params, dtype="float64").logits(tokens) for name in ("numpy", "torch")
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)

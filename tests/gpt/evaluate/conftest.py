"""A model to evaluate: a tiny GPT-2 in transformers and in both engines."""

import pytest

from gpt.engine import create_engine
from gpt.llm import LLM
from gpt.tokenizers import ByteTokenizer
from gpt.weights.load import load

CONTEXT = 24


@pytest.fixture(scope="session")
def peer(tmp_path_factory):
    """A random GPT2LMHeadModel of bytes, float64, and the folder that it is saved in."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 257, "n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**sizes, bos_token_id=256, eos_token_id=256)
        ).eval()
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)  # an opinion on every token
    folder = tmp_path_factory.mktemp("peer")
    model.save_pretrained(folder)
    return model.double(), folder


@pytest.fixture(scope="session", params=["numpy", "torch"])
def llm(request, peer):
    """The same model in an engine, float64."""
    saved = load(peer[1])
    return LLM(create_engine(request.param, saved.config, saved.params, dtype="float64", device="cpu"), ByteTokenizer())


@pytest.fixture(scope="session")
def peer_logps(peer):
    """ids (T,) -> log-probabilities (T, V) of the next token after each, from transformers."""
    import torch

    def logps(ids):
        with torch.no_grad():
            return torch.log_softmax(peer[0](torch.tensor([list(ids)])).logits[0], dim=-1).numpy()

    return logps

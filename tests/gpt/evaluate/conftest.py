"""A server to ask and entries to be judged; and a model to evaluate, in transformers and in both engines."""

import threading

import pytest

from gpt.engine import create_engine
from gpt.llm import LLM
from gpt.tokenizers import ByteTokenizer
from gpt.weights.load import load
from tests.gpt.evaluate.fake_server import Server

CONTEXT = 24


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody's: what is on this machine needs no proxy
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def entries():
    return [
        {
            "instruction": f"Name the number {number}.",
            "input": "",
            "output": f"It is {number}.",
            "model_response": f"Number {number}!",
            "other_response": f"The number is {number}.",
        }
        for number in range(1, 7)
    ]


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

"""Checkpoints in other people's formats, made by their own libraries; and a local server to fetch weights from."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from reference.config import GPTConfig

CONFIG = GPTConfig(101, 23, 36, n_layers=2, n_heads=3, qkv_bias=True, tie_embeddings=True)

# A TensorFlow 1 Saver, with the names and shapes of OpenAI's code, in a process of its own: TensorFlow is large.
SAVER = """
import json, os, sys
import numpy as np
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf
v1 = tf.compat.v1
v1.disable_eager_execution()
folder, hparams, extra = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
V, T, C, L = (hparams[name] for name in ("n_vocab", "n_ctx", "n_embd", "n_layer"))
shapes = {"wte": [V, C], "wpe": [T, C], "ln_f/g": [C], "ln_f/b": [C]}
for i in range(L):
    shapes |= {f"h{i}/{norm}/{part}": [C] for norm in ("ln_1", "ln_2") for part in "gb"}
    matrices = (("attn/c_attn", C, 3 * C), ("attn/c_proj", C, C), ("mlp/c_fc", C, 4 * C), ("mlp/c_proj", 4 * C, C))
    for name, n, m in matrices:
        shapes |= {f"h{i}/{name}/w": [1, n, m], f"h{i}/{name}/b": [m]}
rng = np.random.default_rng(0)
values = {f"model/{name}": rng.normal(0.05, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
values |= {name: np.full(shape, 7, np.float32) for name, shape in extra.items()}
variables = [v1.get_variable(name, initializer=tf.constant(value)) for name, value in values.items()]
with v1.Session() as session:
    session.run(v1.global_variables_initializer())
    v1.train.Saver(variables).save(session, os.path.join(folder, "model.ckpt"))
json.dump(hparams, open(os.path.join(folder, "hparams.json"), "w"))
np.savez(os.path.join(folder, "values.npz"), **{name.replace("/", "|"): value for name, value in values.items()})
"""
HPARAMS = {"n_vocab": 101, "n_ctx": 23, "n_embd": 36, "n_head": 3, "n_layer": 2}


def save_with_tensorflow(folder, extra=None, hparams=None):
    """Write such a checkpoint; returns the variables by name. Skips without TensorFlow."""
    if importlib.util.find_spec("tensorflow") is None:  # imported here, beside PyTorch, it may crash the process
        pytest.skip("TensorFlow, which writes these checkpoints, is not installed")
    folder.mkdir(exist_ok=True)
    arguments = [str(folder), json.dumps(hparams or HPARAMS), json.dumps(extra or {})]
    done = subprocess.run([sys.executable, "-c", SAVER, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = np.load(folder / "values.npz")
    return {name.replace("|", "/"): values[name] for name in values}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing of these tests is kept in the user's cache."""
    monkeypatch.setenv("TWINGRAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def openai_folder(tmp_path_factory):
    """A tiny checkpoint as OpenAI's, with what an optimizer leaves there, and its variables."""
    folder = tmp_path_factory.mktemp("openai")
    return folder, save_with_tensorflow(folder, {"model/wte/Adam": [101, 36], "beta1_power": [], "global_step": []})


def make_peer(**settings):
    """transformers' GPT-2 of CONFIG's size with random weights, every one of them, and no dropout."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"vocab_size": 101, "n_positions": 23, "n_embd": 36, "n_layer": 2, "n_head": 3}
    off = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **off, **settings})).eval()
        with torch.no_grad():
            for p in peer.parameters():
                p.copy_(0.3 * torch.randn(p.shape) + 0.05)
    return peer


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory):
    """A tiny model as transformers saves it, and that model."""
    folder, peer = tmp_path_factory.mktemp("hub"), make_peer()
    peer.save_pretrained(folder)
    return folder, peer


class Server(ThreadingHTTPServer):
    """Serves `contents` by path, byte ranges too; `asked` are the paths that came, `headers` what came with each."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents: dict[str, bytes] = {}
        self.links: dict[str, str] = {}  # paths to the next page
        self.redirects: dict[str, str] = {}
        self.refused: dict[str, int] = {}  # paths, or their beginnings, to the status
        self.asked: list[str] = []
        self.headers: list[dict] = []
        self.cut = False  # the next answer breaks off after 100,000 bytes, those after it at once

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server, path = self.server, self.path
        server.asked.append(path)
        server.headers.append(dict(self.headers))
        refused = [status for start, status in server.refused.items() if path.startswith(start)]
        if refused or (path not in server.contents and path not in server.redirects):
            return self.send_error(refused[0] if refused else 404)
        if path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[path])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.answer(server.contents[path])

    def answer(self, content):
        asked = self.headers["Range"]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if self.path in self.server.links:
            self.send_header("Link", f'<{self.server.links[self.path]}>; rel="next"')
        self.end_headers()
        content = content[start:]
        if self.server.cut:
            content = b"" if start else content[:100_000]
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content)


@contextlib.contextmanager
def serving():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server():
    with serving() as server:
        yield server

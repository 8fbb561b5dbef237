"""A server to ask, and entries to be judged."""

import threading

import pytest

from tests.gpt.evaluate.fake_server import Server


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

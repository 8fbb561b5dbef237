"""Servers as functions of a prompt, against a real one that streams, hangs, fails, and talks nonsense."""

import socket
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from gpt.errors import UserError
from gpt.evaluate import servers as module
from gpt.evaluate.servers import Ollama, OpenAI, ServerConfig, ServerError, UnavailableError, connect
from gpt.tokenizers import ByteTokenizer
from gpt.weights.native import save_model
from reference.config import PRESETS
from reference.init import initialize
from reference.torch_rng import Generator
from tests.gpt.evaluate import fake_server as fake
from tests.gpt.evaluate.fake_server import KEY


def ollama(server, **settings):
    waits = []
    return Ollama(url=server.url, sleep=waits.append, **settings), waits


def openai(server, **settings):
    return OpenAI("gpt", f"{server.url}/v1", sleep=lambda seconds: None, **settings)


def test_ollama_joins_the_stream_and_sends_its_options(server):
    server.plan = [fake.streams("Grüße, 85 ✓")]
    ask, waits = ollama(server, seed=7, temperature=0.5, num_ctx=512)
    assert ask("How good?") == "Grüße, 85 ✓"
    path, _, body = server.requests[0]
    assert path == "/api/chat"
    assert body == {
        "model": "llama3",
        "messages": [{"role": "user", "content": "How good?"}],
        "options": {"seed": 7, "temperature": 0.5, "num_ctx": 512},
    }
    assert waits == []


def test_an_answer_may_be_one_object_and_may_be_empty(server):
    server.plan = [fake.says({"message": {"content": "85"}, "done": True}), fake.streams("")]
    ask, _ = ollama(server)
    assert [ask("x"), ask("x")] == ["85", ""]


def test_openai_sends_the_key_and_its_settings(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")  # as from a file
    server.plan = [fake.completes("85")]
    assert openai(server, seed=7)("How good?") == "85"
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    message = {"role": "user", "content": "How good?"}
    assert body == {"model": "gpt", "messages": [message], "seed": 7, "temperature": 0.0}


def test_a_netrc_does_not_take_the_place_of_the_key(server, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(module, "_is_loopback", lambda url: False)  # as if it were elsewhere
    server.plan = [fake.completes("85"), fake.streams("85"), fake.completes("85")]
    ollama_, _ = ollama(server)
    OpenAI("gpt", server.url)("x")
    ollama_("x")
    assert not [headers for _, headers, _ in server.requests if "Authorization" in headers]
    monkeypatch.setenv("OPENAI_API_KEY", "local-key")
    OpenAI("gpt", server.url)("x")
    assert server.requests[-1][1]["Authorization"] == "Bearer local-key"


@pytest.mark.parametrize("broken", [fake.says("oops", 500), fake.says("", 503), fake.cut, fake.closes])
def test_what_passes_is_tried_again_and_waits_grow(server, broken):
    server.plan = [broken, broken, broken, fake.streams("85")]
    ask, waits = ollama(server)
    assert ask("x") == "85"
    assert waits == [1, 2, 4]


@pytest.mark.parametrize("broken", [fake.streams("8", done=False), fake.cut_line])
def test_an_answer_without_its_end_is_tried_again(server, broken):
    server.plan = [broken, fake.streams("85")]
    ask, waits = ollama(server)
    assert ask("x") == "85"
    assert waits == [1]


@pytest.mark.parametrize("retries", [0, 2])
def test_tries_end(server, retries):
    server.plan = [fake.says({"error": "no room"}, 500)]
    ask, waits = ollama(server, retries=retries)
    with pytest.raises(ServerError, match="status 500 .*: no room") as caught:
        ask("x")
    assert not isinstance(caught.value, UnavailableError)
    assert len(server.requests) == retries + 1 == len(waits) + 1


def test_a_stream_that_hangs_times_out_and_is_tried_again(server):
    server.plan = [fake.hangs, fake.streams("85")]
    ask, waits = ollama(server, timeout=0.2)
    assert ask("x") == "85"
    assert waits == [1]
    server.plan = [fake.hangs]
    ask, _ = ollama(server, timeout=0.2, retries=0)
    with pytest.raises(ServerError, match=r"silent for 0.2 s"):
        ask("x")


def test_a_server_that_says_nothing_at_all_times_out(server):
    server.plan = [lambda handler, prompt: handler.server.released.wait(20)]
    with pytest.raises(ServerError, match=r"silent for 0.2 s"):
        ollama(server, timeout=0.2, retries=0)[0]("x")


def test_retry_after_is_honoured(server):
    server.plan = [fake.says("slow down", 429, Retry_After="7"), fake.says("", 503, Retry_After="0"), fake.streams("1")]
    ask, waits = ollama(server)
    assert ask("x") == "1"
    assert waits == [7, 0]


def test_retry_after_may_be_a_date_and_nonsense_is_ignored(server):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    server.plan = [
        fake.says("", 429, Retry_After=date),
        fake.says("", 429, Retry_After="soon"),
        fake.says("", 429, Retry_After="Mon, 01 Jan 2001 00:00:00 GMT"),
        fake.streams("1"),
    ]
    ask, waits = ollama(server)
    assert ask("x") == "1"
    assert 0 < waits[0] <= 90
    assert waits[1:] == [2, 0]


def test_a_server_that_asks_for_an_hour_is_not_waited_for(server):
    server.plan = [fake.says("quota", 429, Retry_After="3600")]
    ask, waits = ollama(server)
    with pytest.raises(UnavailableError, match="come again in 3600 s"):
        ask("x")
    assert waits == []


@pytest.mark.parametrize("status, kind", [(400, ServerError), (401, UnavailableError), (404, UnavailableError)])
def test_other_errors_are_not_tried_again(server, status, kind):
    server.plan = [fake.says({"error": {"message": "it is\nso"}}, status)]
    with pytest.raises(ServerError, match=f"status {status} .*: it is so$") as caught:
        openai(server)("x")
    assert type(caught.value) is kind
    assert len(server.requests) == 1


def test_a_redirect_is_not_followed(server):
    server.plan = [fake.says("", 307, Location="http://elsewhere.example/api/chat")]
    with pytest.raises(UnavailableError, match="status 307 .*--url"):
        ollama(server)[0]("x")


def test_an_error_in_the_stream_is_an_error(server):
    server.plan = [fake.says('{"message": {"content": "8"}, "done": false}\n{"error": "out of memory"}\n')]
    with pytest.raises(ServerError, match="the server says: out of memory"):
        ollama(server)[0]("x")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "nonsense",
    ["<html>hello</html>", "[1, 2]", '"85"', "{}", '{"message": 5}', "\x00", "[" * 100_000, '{"choices": []}'],
)
@pytest.mark.parametrize("create", [lambda server: ollama(server)[0], openai])
def test_nonsense_is_one_clear_line(server, create, nonsense):
    server.plan = [fake.says(nonsense)]
    with pytest.raises(ServerError, match=r"^http://127\.0\.0\.1:.* expected .*, got ") as caught:
        create(server)("x")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert len(server.requests) == 1


def test_an_answer_that_does_not_end_is_refused(server, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_ANSWER", 1 << 20)
    server.plan = [fake.says("x" * (1 << 21))]
    for ask in (ollama(server)[0], openai(server)):
        with pytest.raises(ServerError, match="more than 1 MiB"):
            ask("x")


def test_no_server_is_one_clear_line(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    waits = []
    with pytest.raises(UnavailableError, match=r"no connection; is the server running\? \(4 tries\)"):
        Ollama(url=url, sleep=waits.append)("x")
    assert waits == [1, 2, 4]
    with pytest.raises(UnavailableError, match="start it with: ollama serve"):
        connect(ServerConfig(url=url))


def test_check_names_the_command_that_gets_the_model(server):
    ollama(server)[0].check()
    Ollama("phi3:mini", server.url).check()
    with pytest.raises(UnavailableError, match="ollama pull phi3$|ollama pull phi3;"):
        Ollama("phi3", server.url).check()
    assert connect(ServerConfig(url=server.url)) == Ollama(url=server.url)


@pytest.mark.parametrize("status", [200, 400, 401, 429, 500])
def test_a_key_that_comes_back_is_taken_out(server, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    echo = f"wrong key {KEY}" + "x" * 300
    bodies = [echo, {"error": {"message": echo}}, {"error": echo}, f"{'y' * 190}{KEY}"]
    for body in bodies:
        server.plan = [fake.says(body, status, reason=f"Key {KEY}")]
        ask = openai(server, retries=1)
        with pytest.raises(ServerError) as caught:
            ask("x")
        shown = repr(ask) + "".join(traceback.format_exception(caught.value)) + str(vars(caught.value))
        assert "sk-" not in shown
        assert "[key]" in shown
    assert server.requests[-1][1]["Authorization"] == f"Bearer {KEY}"


def test_a_key_is_taken_out_whatever_it_looks_like(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "pa$$.word+*")
    server.plan = [fake.completes("your key is pa$$.word+*")]
    ask = openai(server)
    assert ask("x") == "your key is [key]"
    assert "pa$$" not in repr(ask) + str(ask.settings)


def test_a_key_that_is_no_key_is_refused_without_being_shown(monkeypatch):
    for key in ("sk-secret\nmore", "sk-secret ü"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="^OPENAI_API_KEY in the environment: expected") as caught:
            OpenAI("gpt")
        assert "secret" not in str(caught.value)


def test_a_server_elsewhere_wants_a_key_and_https(monkeypatch):
    with pytest.raises(UserError, match="set OPENAI_API_KEY in the environment"):
        OpenAI("gpt")
    for url in (
        "http://localhost:8000/v1",
        "http://[::1]:8000",
        "http://192.168.1.5/v1",
        "http://box.local",
        "http://box",
    ):
        OpenAI("gpt", url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    OpenAI("gpt")
    with pytest.raises(UserError, match="expected https"):
        OpenAI("gpt", "http://api.example.com/v1")


@pytest.mark.parametrize("url", ["http://me:secret@host", "secret@host", "http://host/?key=secret", "http://h/#secret"])
def test_a_url_with_a_secret_is_refused_without_being_shown(url):
    with pytest.raises(UserError, match="without user, password") as caught:
        Ollama(url=url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "localhost:11434", "ftp://host", "http://", "http://h:99999", "http://a b", "http://["]
)
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(UserError, match="^url: expected one like"):
        Ollama(url=url)


def test_a_slash_at_the_end_of_a_url_changes_nothing():
    assert Ollama(url="http://localhost:11434/") == Ollama()


@pytest.mark.parametrize(
    "settings", [{"model": ""}, {"temperature": -1.0}, {"timeout": 0.0}, {"retries": -1}, {"num_ctx": 0}]
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(UserError, match=f"^{next(iter(settings))}: expected"):
        Ollama(**settings)


def test_a_model_of_ones_own_answers(tmp_path):
    config = PRESETS["bytes-tiny"]
    path = tmp_path / "model.safetensors"
    save_model(path, initialize(config, Generator(1), "gpt2"), config, ByteTokenizer().spec())
    ask = connect(ServerConfig("model", str(path), engine="numpy", max_new_tokens=5))
    assert isinstance(ask("x"), str)
    assert ask("x") == ask("x")
    assert ask.settings["model"] == str(path)
    with pytest.raises(UserError, match="url: means nothing"):
        ServerConfig("model", url="http://localhost")
    with pytest.raises(UserError, match="model: expected the name"):
        ServerConfig("openai")

"""Language models behind HTTP, as functions of a prompt: ``Ollama("llama3")("Why is the sky blue?") -> str``.

    Ollama    POST URL/api/chat             answers with a JSON object a line, a piece of the text in each
    OpenAI    POST URL/chat/completions     answers with one JSON object; vLLM, llama.cpp and others speak it too

What may pass, a connection cut, silence, status 429 or 5xx, is tried again after 1, 2, 4, ... seconds or when the
server says. The key of OpenAI's face comes from the environment, is read when it is sent, and is taken out of every
text that comes back.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from gpt.errors import UserError
from gpt.options import did_you_mean

if TYPE_CHECKING:
    import requests

__all__ = ["Ask", "JudgeModel", "Ollama", "OpenAI", "ServerConfig", "ServerError", "UnavailableError", "connect"]

Ask = Callable[[str], str]  # a prompt -> the answer

KEY = "OPENAI_API_KEY"
LONGEST_ANSWER = 1 << 23  # bytes; a server that never ends is not listened to for ever
LONGEST_WAIT = 120.0  # seconds that a server may ask for
SHOWN = 200  # characters of what a server says about its error


class ServerError(UserError):
    """A prompt that the server did not answer; another one it may."""


class UnavailableError(ServerError):
    """A server that will answer no prompt now: it is not there, refuses the key, does not have the model."""


class _PassingError(Exception):
    """What may be gone at the next try. `wait`: seconds that the server asks for; `kind`: the error if it stays."""

    def __init__(self, reason: str, kind: type[ServerError] = ServerError, wait: float | None = None) -> None:
        super().__init__(reason)
        self.kind, self.wait = kind, wait


@dataclass(frozen=True)
class _Server:
    """What both kinds share: settings, checked, and requests that are tried again."""

    model: str
    url: str
    _: KW_ONLY
    seed: int = 123
    temperature: float = 0.0
    timeout: float = 60.0
    retries: int = 3
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("model: expected the name of a model that the server has, got none")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature: expected a number of at least 0, got {self.temperature}")
        if not 0 < self.timeout < math.inf:
            raise UserError(f"timeout: expected seconds above 0, got {self.timeout}")
        if self.retries < 0:
            raise UserError(f"retries: expected at least 0, got {self.retries}")
        object.__setattr__(self, "url", _checked_url(self.url))

    def _key(self) -> str | None:
        """What is sent as a bearer token."""
        return None

    def _request(self, method: str, path: str, body: Any, read: Callable[[requests.Response], str]) -> str:
        """What `read` makes of the answer. ServerError or UnavailableError, without the key in its text."""
        tries = 0
        while True:
            tries += 1
            try:
                return self._once(method, path, body, read)
            except _PassingError as error:
                if tries <= self.retries:
                    self.sleep(min(2.0 ** (tries - 1), LONGEST_WAIT) if error.wait is None else error.wait)
                    continue
                again = f" ({tries} tries)" if tries > 1 else ""
                failure = error.kind(f"{self.url}: {error}{again}")
            except ServerError as error:
                failure = type(error)(f"{self.url}: {error}")
            # Outside of the handlers, so that the new error carries neither the old one nor its unredacted text.
            raise type(failure)(_redact(str(failure)))

    def _once(self, method: str, path: str, body: Any, read: Callable[[requests.Response], str]) -> str:
        import requests
        import urllib3

        key = self._key()

        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            """Instead of what a .netrc may hold."""
            if key:
                request.headers["Authorization"] = f"Bearer {key}"
            return request

        try:
            with requests.Session() as session:
                session.trust_env = not _is_loopback(self.url)  # a proxy would look for the model on its own machine
                with session.request(
                    method,
                    self.url + path,
                    json=body,
                    auth=authorize,
                    stream=True,
                    timeout=self.timeout,
                    allow_redirects=False,  # a prompt that is sent on becomes a GET, or goes where nobody meant it to
                ) as response:
                    _check_status(response)
                    return read(response)
        except requests.exceptions.SSLError as error:
            raise UnavailableError(f"no secure connection: {error}") from None
        except requests.ConnectTimeout:
            raise _PassingError(f"no connection in {self.timeout:g} s", UnavailableError) from None
        except requests.Timeout:
            raise _PassingError(f"silent for {self.timeout:g} s") from None
        except requests.exceptions.ChunkedEncodingError:
            raise _PassingError("the connection was cut within an answer") from None
        except requests.ConnectionError as error:
            if "timed out" in str(error):  # as requests says it of a body that stops coming
                raise _PassingError(f"silent for {self.timeout:g} s") from None
            if "Connection aborted" in str(error):
                raise _PassingError("the connection was cut before an answer") from None
            raise _PassingError("no connection; is the server running?", UnavailableError) from None
        except (requests.RequestException, urllib3.exceptions.HTTPError, UnicodeError) as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from None


@dataclass(frozen=True)
class Ollama(_Server):
    """A model of an Ollama server. `num_ctx`: tokens that it sees; a longer prompt is cut by Ollama, silently."""

    model: str = "llama3"
    url: str = "http://localhost:11434"
    num_ctx: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_ctx < 1:
            raise UserError(f"num_ctx: expected at least 1, got {self.num_ctx}")

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers depend on."""
        return {"server": "ollama", "model": self.model} | self._options()

    def _options(self) -> dict[str, Any]:
        return {"seed": self.seed, "temperature": self.temperature, "num_ctx": self.num_ctx}

    def __call__(self, prompt: str) -> str:
        """The model's answer. ServerError if this prompt got none, UnavailableError if no prompt would."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "options": self._options()}
        return self._request("POST", "/api/chat", body, _read_stream)

    def check(self) -> None:
        """UnavailableError, with the command that helps, unless the server runs and has the model."""
        found: list[str] = []

        def read(response: requests.Response) -> str:
            models = _parse(b"".join(_blocks(response))).get("models")
            for model in models if isinstance(models, list) else []:
                if isinstance(model, dict) and isinstance(model.get("name"), str):
                    found.append(model["name"])
            return ""

        try:
            self._once("GET", "/api/tags", None, read)
        except (_PassingError, ServerError) as error:
            reason = _redact(str(error))
            raise UnavailableError(
                f"no Ollama server answers at {self.url} ({reason}); start it with: ollama serve"
            ) from None
        if self.model not in found and f"{self.model}:latest" not in found:
            close = did_you_mean(self.model, found)
            raise UnavailableError(
                f"the Ollama server at {self.url} does not have the model {self.model!r}; "
                f"get it with: ollama pull {self.model}{close}"
            )


@dataclass(frozen=True)
class OpenAI(_Server):
    """A model of OpenAI's, or of any server that speaks the same; the key is the environment's OPENAI_API_KEY.

    A server on this machine or in a private network needs no key, and none is sent over plain http to any other.
    """

    model: str
    url: str = "https://api.openai.com/v1"

    def __post_init__(self) -> None:
        super().__post_init__()
        key = self._key()  # one that cannot be sent shows now
        if _is_private(self.url):
            return
        if key is None:
            raise UserError(f"{self.url} wants a key: set {KEY} in the environment")
        if urlsplit(self.url).scheme != "https":
            raise UserError(f"url: expected https for a key to be sent, got {self.url}")

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers depend on."""
        chosen = {"model": self.model, "url": self.url, "seed": self.seed, "temperature": self.temperature}
        return {"server": "openai"} | chosen

    def __call__(self, prompt: str) -> str:
        """The model's answer. ServerError if this prompt got none, UnavailableError if no prompt would."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "seed": self.seed,
            "temperature": self.temperature,
        }
        return _redact(self._request("POST", "/chat/completions", body, _read_completion))

    def _key(self) -> str | None:
        """Read at each use and kept nowhere, so that nothing that shows this object shows it."""
        key = _key_in_environment()
        if not re.fullmatch(r"[!-~]*", key):
            raise UserError(f"{KEY} in the environment: expected printable ASCII characters without spaces")
        return key or None


class JudgeModel:
    """A model of this project, or loaded by it, behind the same face; greedy at temperature 0."""

    def __init__(
        self, model: str, engine: str = "auto", seed: int = 123, temperature: float = 0.0, max_new_tokens: int = 50
    ) -> None:
        from gpt.finetune.adapters import model_fingerprint
        from gpt.llm import LLM

        self._llm = LLM.load(model, engine)
        self._sampling: dict[str, Any] = {"seed": seed, "temperature": temperature, "max_new_tokens": max_new_tokens}
        self.model = model
        self._weights = model_fingerprint(self._llm.engine.parameters(), self._llm.engine.config)
        self._llm.generate("a", **{**self._sampling, "max_new_tokens": 0})  # wrong settings show now

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers depend on; not the engine, since both write the same."""
        return {"server": "model", "model": self.model, "weights": self._weights} | self._sampling

    def __call__(self, prompt: str) -> str:
        """The model's continuation of the prompt."""
        return self._llm.generate(prompt, **self._sampling)


@dataclass(frozen=True)
class ServerConfig:
    """Which model judges."""

    server: Literal["ollama", "openai", "model"] = "ollama"
    """ollama; openai: that, or what speaks like it (--url), the key in OPENAI_API_KEY; model: one loaded here."""
    model: str | None = None
    """ollama: a model that the server has, llama3 if none; openai: its name; model: as for generate, or runs/latest."""
    url: str | None = None
    """Where the server is; none: http://localhost:11434 for ollama, https://api.openai.com/v1 for openai."""
    seed: int = 123
    """Of the judge's draws."""
    temperature: float = 0.0
    """0: always the most probable token."""
    max_new_tokens: int = 50
    """Tokens of an answer at most, for --server model; the others end theirs."""
    engine: Literal["auto", "numpy", "torch", "triton"] = "auto"
    """For --server model."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature: expected a number of at least 0, got {self.temperature}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
        if self.server == "openai" and not self.model:
            raise UserError("model: expected the name of a model for --server openai, got none")
        if self.server == "model" and self.url is not None:
            raise UserError("url: means nothing to --server model, which is loaded here")


def connect(config: ServerConfig) -> Ollama | OpenAI | JudgeModel:
    """The judge of these settings, ready to be asked. UserError says what is missing, and which command helps."""
    if config.server == "model":
        return JudgeModel(
            config.model or "runs/latest", config.engine, config.seed, config.temperature, config.max_new_tokens
        )
    chosen: dict[str, Any] = {"seed": config.seed, "temperature": config.temperature}
    if config.url is not None:
        chosen["url"] = config.url
    if config.server == "openai":
        return OpenAI(config.model or "", **chosen)
    server = Ollama(config.model or "llama3", **chosen)
    server.check()
    return server


def _checked_url(url: str) -> str:
    """The address without a slash at its end. UserError, without what may be secret in it, if it is none."""
    if set(url) & set("@?#"):
        raise UserError("url: expected an address without user, password, query or fragment; a key belongs in " + KEY)
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises for what is no port)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        valid = False
    if not valid or not re.fullmatch(r"[!-~]+", url) or "\\" in url:
        raise UserError(f"url: expected one like http://localhost:11434, got {url!r}")
    return url.rstrip("/")


def _address(url: str) -> tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address | None]:
    host = urlsplit(url).hostname or ""
    try:
        return host, ipaddress.ip_address(host)
    except ValueError:
        return host, None


def _is_loopback(url: str) -> bool:
    host, address = _address(url)
    return address.is_loopback if address else host == "localhost" or host.endswith(".localhost")


def _is_private(url: str) -> bool:
    """Whether the address is of this machine or of a private network, as far as the name tells."""
    host, address = _address(url)
    named_here = "." not in host or host.endswith((".local", ".internal"))
    return _is_loopback(url) or (address.is_private if address else named_here)


def _key_in_environment() -> str:
    return os.environ.get(KEY, "").strip()


def _redact(text: str) -> str:
    """The text without the key, nor anything else that looks like one of OpenAI's."""
    key = _key_in_environment()
    if len(key) >= 8:  # "none" and "EMPTY", which local servers are given, are words, not secrets
        text = text.replace(key, "[key]")
    return re.sub(r"\bsk-[A-Za-z0-9_-]{16,}", "[key]", text)


def _check_status(response: requests.Response) -> None:
    """Raise what a status other than success stands for."""
    status = response.status_code
    if 200 <= status < 300:
        return
    said = _said(response)
    problem = " ".join(filter(None, (f"status {status}", response.reason))) + (f": {said}" if said else "")
    if 300 <= status < 400:
        raise UnavailableError(f"{problem}; the server is elsewhere, give its address with --url")
    if status == 429 or status >= 500:
        kind = UnavailableError if status == 429 else ServerError
        wait = _retry_after(response.headers.get("Retry-After", ""))
        if wait is not None and wait > LONGEST_WAIT:
            raise UnavailableError(f"{problem}; the server asks to come again in {wait:.0f} s")
        raise _PassingError(problem, kind, wait)
    raise (UnavailableError if status in (401, 403, 404) else ServerError)(problem)


def _said(response: requests.Response) -> str:
    """What the body of an error says, on one line."""
    import requests

    try:
        body = next(response.iter_content(1 << 16), b"")
    except requests.RequestException:
        return ""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body.decode("utf-8", errors="replace")
    return _short(text)


def _retry_after(text: str) -> float | None:
    """Seconds of a Retry-After header, a number or a date; None if it is neither."""
    if re.fullmatch(r"\s*[0-9]{1,9}(\.[0-9]*)?\s*", text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError):
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _blocks(response: requests.Response) -> Iterator[bytes]:
    length = 0
    for block in response.iter_content(1 << 14):
        length += len(block)
        if length > LONGEST_ANSWER:
            raise ServerError(f"an answer of more than {LONGEST_ANSWER >> 20} MiB")
        yield block


def _parse(line: bytes) -> Mapping[str, Any]:
    """A JSON object. ServerError for anything else, and for an error that it tells."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        shown = _short(line.decode("utf-8", errors="replace"))
        raise ServerError(f"expected a JSON object, got {shown!r}; is --url that of the server?")
    if error := value.get("error"):
        message = error.get("message", error) if isinstance(error, dict) else error
        raise ServerError(f"the server says: {_short(message)}")
    return value


def _short(value: object) -> str:
    """The beginning of what a server said, on one line; the key is out before the cut, which could leave half of it."""
    text = _redact(" ".join(str(value).split()))
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _read_stream(response: requests.Response) -> str:
    """Ollama's answer: the pieces of all lines up to the one that says it is done."""
    pieces: list[str] = []
    rest = b""

    def take(line: bytes) -> bool:
        value = _parse(line)
        message = value.get("message")
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            pieces.append(content)
        elif content is not None or "done" not in value:
            raise ServerError(f"expected a message with a text, got {_short(dict(value))!r}")
        return value.get("done") is True

    for block in _blocks(response):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line.strip() and take(line):
                return "".join(pieces)
    if rest.strip():
        try:
            if take(rest):
                return "".join(pieces)
        except ServerError:
            if not pieces:
                raise
    raise _PassingError("the answer broke off before its end")


def _read_completion(response: requests.Response) -> str:
    """OpenAI's answer: the text of its first choice."""
    value = _parse(b"".join(_blocks(response)))
    try:
        content = value["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise ServerError(f"expected choices with a message with a text, got {_short(dict(value))!r}")
    return content

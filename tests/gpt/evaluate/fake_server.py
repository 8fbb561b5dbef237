"""A real server on this machine that answers as each test says."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-0123456789abcdefghij"


class Server(ThreadingHTTPServer):
    """Answers each POST by the next of `plan`, the last one again and again; `requests` are (path, headers, body)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        self.plan = []
        self.models = ["llama3:latest", "phi3:mini"]
        self.released = threading.Event()  # ends all that hang

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def prompts(self):
        return [body["messages"][0]["content"] for _, _, body in self.requests]

    def handle_error(self, request, client_address):
        pass  # a client that has gone


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        assert self.path == "/api/tags"
        send(self, {"models": [{"name": name} for name in self.server.models]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        plan = self.server.plan
        answer = plan.pop(0) if len(plan) > 1 else plan[0]
        with contextlib.suppress(ConnectionError):
            answer(self, body["messages"][0]["content"])


def send(handler, content, status=200, reason=None, **headers):
    """The whole of an answer: an object as JSON, or text."""
    data = (content if isinstance(content, str) else json.dumps(content)).encode()
    handler.send_response(status, reason)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def chunk(handler, data):
    handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
    handler.wfile.flush()


def begin(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()


def line(content, done=False):
    return json.dumps({"message": {"role": "assistant", "content": content}, "done": done}).encode() + b"\n"


def streams(text, done=True):
    """Ollama's answer, a character a line, in chunks that end anywhere; without `done` it just stops."""

    def answer(handler, prompt):
        whole = b"".join(map(line, text(prompt) if callable(text) else text)) + (line("", True) if done else b"")
        begin(handler)
        for start in range(0, len(whole), 37):
            chunk(handler, whole[start : start + 37])
        chunk(handler, b"")

    return answer


def completes(text):
    """OpenAI's answer."""

    def answer(handler, prompt):
        content = text(prompt) if callable(text) else text
        send(handler, {"choices": [{"message": {"role": "assistant", "content": content}}]})

    return answer


def says(content, status=200, reason=None, **headers):
    return lambda handler, prompt: send(handler, content, status, reason, **headers)


def hangs(handler, prompt):
    """Begins an answer and falls silent."""
    begin(handler)
    chunk(handler, line("8"))
    handler.server.released.wait(20)


def cut(handler, prompt):
    """Closes the connection within a chunk."""
    begin(handler)
    handler.wfile.write(b"ff\r\n" + line("8")[:20])
    handler.close_connection = True


def cut_line(handler, prompt):
    """Closes the connection within a line of an answer that ends where the connection does."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(line("8") + line("5")[:20])
    handler.close_connection = True


def closes(handler, prompt):
    """Closes the connection without a word."""
    handler.close_connection = True

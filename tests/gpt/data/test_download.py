"""Downloads against a local server that cuts, ignores ranges, sends something else or has nothing."""

import contextlib
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gpt.data import download as module
from gpt.data.download import DownloadError, download, fetch
from gpt.errors import UserError

CONTENT = bytes(range(256)) * 1000
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
GIT_SHA1 = "ed99543dba99b885850a5e5a6bf95545aaa9754c"  # as git hash-object gives it


class Server(ThreadingHTTPServer):
    """Serves CONTENT under /whole and what the other paths say; `ranges` are the Range headers that came."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[tuple[str, str | None]] = []
        self.headers: list[str | None] = []  # X-Own of each
        self.cuts = 0  # how many more answers break off after 100,000 bytes

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        asked = self.headers["Range"]
        self.server.ranges.append((self.path, asked))
        self.server.headers.append(self.headers["X-Own"])
        if self.path == "/absent":
            return self.send_error(404)
        content = {"/empty": b"", "/other": b"x" * SIZE, "/long": CONTENT + b"more", "/short": CONTENT[:-1]}.get(
            self.path, CONTENT
        )
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.path != "/no-ranges" else 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if self.path == "/first":
            self.send_header("Link", '<https://host/second>; rel="next"')
        self.end_headers()
        content = content[start:]
        if self.server.cuts:
            self.server.cuts -= 1
            content = content[:100_000]
        with contextlib.suppress(ConnectionError):  # a client that has seen enough
            self.wfile.write(content)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "file"


def holds_only(target, *names):
    return sorted(path.name for path in target.parent.iterdir()) == sorted(names)


def test_whole(server, target):
    download([server.url("whole")], target, SIZE, SHA256)
    assert target.read_bytes() == CONTENT
    assert holds_only(target, "file")


def test_size_and_digest_may_be_unknown(server, target):
    download([server.url("whole")], target)
    assert target.read_bytes() == CONTENT


def test_a_cut_connection_is_taken_up_where_it_broke(server, target):
    server.cuts = 2
    download([server.url("whole")], target, SIZE, SHA256)
    assert target.read_bytes() == CONTENT
    starts = [int(asked[6:-1]) for _, asked in server.ranges[1:]]
    assert server.ranges[0] == ("/whole", None)
    assert 100_000 - module.BLOCK < starts[0] < starts[1] - 80_000  # a block that was under way comes again
    assert len(starts) == 2


def test_a_later_call_takes_up_what_an_earlier_one_left(server, target):
    target.parent.mkdir()
    target.with_name("file.part").write_bytes(CONTENT[:1234])
    download([server.url("whole")], target, SIZE, SHA256)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [("/whole", "bytes=1234-")]
    assert holds_only(target, "file")


@pytest.mark.parametrize("known", [True, False])
def test_a_whole_part_is_used(server, target, known):
    target.parent.mkdir()
    target.with_name("file.part").write_bytes(CONTENT)
    download([server.url("whole")], target, SIZE if known else None, SHA256)
    assert target.read_bytes() == CONTENT
    assert len(server.ranges) == (0 if known else 1)  # where the size is unknown the server says that nothing follows


@pytest.mark.parametrize("left", [b"y" * 1234, b"y" * SIZE, b"y" * (SIZE + 5)])
def test_a_part_of_another_file_is_thrown_away(server, target, left):
    target.parent.mkdir()
    target.with_name("file.part").write_bytes(left)
    download([server.url("whole")], target, SIZE, SHA256)
    assert target.read_bytes() == CONTENT
    assert server.ranges[-1] == ("/whole", None)


def test_a_server_that_ignores_ranges_starts_over(server, target):
    target.parent.mkdir()
    target.with_name("file.part").write_bytes(CONTENT[:1234])
    download([server.url("no-ranges")], target, SIZE, SHA256)
    assert target.read_bytes() == CONTENT
    assert len(server.ranges) == 1


def test_the_second_address_is_tried(server, target):
    download([server.url("absent"), server.url("other"), server.url("whole")], target, SIZE, SHA256)
    assert target.read_bytes() == CONTENT
    assert [path for path, _ in server.ranges] == ["/absent", "/other", "/whole"]


@pytest.mark.parametrize(
    "path, reason",
    [
        ("absent", "404 Not Found"),
        ("other", "SHA-256 [0-9a-f]{16}... instead of " + SHA256[:16]),
        ("long", f"[0-9]+ bytes instead of {SIZE}"),
        ("short", f"{SIZE - 1} bytes instead of {SIZE}"),
    ],
)
def test_what_is_not_the_file_never_gets_its_name(server, target, path, reason):
    with pytest.raises(DownloadError, match=rf"cannot download file \(127.0.0.1:[0-9]+: {reason}"):
        download([server.url(path)], target, SIZE, SHA256)
    assert holds_only(target)


def test_offline_is_one_line_and_keeps_the_part(server, target):
    target.parent.mkdir()
    target.with_name("file.part").write_bytes(CONTENT[:10])
    urls = ["http://127.0.0.1:9/file", "http://[::1]:9/file"]  # the discard port: nobody listens
    with pytest.raises(DownloadError, match=r"127.0.0.1:9: no connection; \[::1\]:9: no connection") as caught:
        download(urls, target, SIZE, SHA256)
    assert "\n" not in str(caught.value)
    assert target.with_name("file.part").read_bytes() == CONTENT[:10]


def test_a_connection_that_is_always_cut_ends(server, target, monkeypatch):
    monkeypatch.setattr(
        Handler, "do_GET", lambda self: self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\nabc")
    )
    with pytest.raises(DownloadError, match="connection cut"):
        download([server.url("whole")], target, 9)
    assert not target.exists()


def test_a_silent_server_times_out(server, target, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    released = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda self: released.wait(10))
    with pytest.raises(DownloadError, match="timed out"):
        download([server.url("whole")], target, SIZE, SHA256)
    released.set()


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"cannot write .*cache/file.part"):
        download([server.url("whole")], tmp_path / "cache" / "file", SIZE, SHA256)


def test_gits_name_of_the_content_is_verified(server, target):
    download([server.url("other"), server.url("whole")], target, git_sha1=GIT_SHA1)
    assert target.read_bytes() == CONTENT
    assert len(server.ranges) == 2
    reason = f"git's SHA-1 [0-9a-f]{{16}}... instead of {GIT_SHA1[:16]}"
    with pytest.raises(DownloadError, match=reason):
        download([server.url("other")], target.with_name("second"), git_sha1=GIT_SHA1)


@pytest.mark.parametrize("size", [0, None])
def test_an_empty_file(server, target, size):
    download([server.url("empty")], target, size, git_sha1="e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")
    assert target.read_bytes() == b""
    assert holds_only(target, "file")


def test_headers_go_with_each_request(server, target):
    server.cuts = 1
    download([server.url("absent"), server.url("whole")], target, SIZE, SHA256, headers={"X-Own": "1"})
    assert target.read_bytes() == CONTENT
    assert server.headers == ["1"] * 3


def test_an_error_has_the_statuses_and_no_password(server, target):
    urls = [server.url("absent").replace("//", "//me:secret@"), "http://127.0.0.1:9/file"]
    with pytest.raises(DownloadError, match=r"\(127.0.0.1:[0-9]+: 404 Not Found; 127.0.0.1:9: no connection") as caught:
        download(urls, target)
    assert caught.value.statuses == (404,)


def test_fetch(server):
    assert fetch(server.url("whole"), {"X-Own": "1"}) == (CONTENT, None)
    assert fetch(server.url("first")) == (CONTENT, "https://host/second")
    assert server.headers == ["1", None]
    with pytest.raises(DownloadError, match=r"^127.0.0.1:[0-9]+: 404 Not Found$") as caught:
        fetch(server.url("absent"))
    assert caught.value.statuses == (404,)
    with pytest.raises(DownloadError, match=r"^127.0.0.1:9: no connection$") as caught:
        fetch("http://127.0.0.1:9/file")
    assert caught.value.statuses == ()

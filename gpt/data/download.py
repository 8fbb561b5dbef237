"""Downloads that resume, are verified before they get their name, and try several addresses in turn."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from gpt.data.files import replace
from gpt.errors import UserError

__all__ = ["DownloadError", "download", "fetch", "mismatch"]

TIMEOUT = 30.0  # seconds without a connection, or without a byte
BLOCK = 1 << 14  # bytes; a connection that breaks loses less than this

_Expected = tuple[int | None, str | None, str | None]  # size, SHA-256 and git's SHA-1, as `mismatch` takes them


class DownloadError(UserError):
    """A file that no address gave; says why for each. `statuses` are those of the answers that were HTTP errors."""

    def __init__(self, message: str, statuses: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.statuses = tuple(statuses)


def download(
    urls: Sequence[str],
    target: Path,
    size: int | None = None,
    sha256: str | None = None,
    git_sha1: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Fetch the file that all of `urls` name into `target`, from the first that has it with this size and hashes.

    Bytes collect in target's name + ".part", where an interrupted download goes on, in this call or a later one.
    `headers` go with each request; of a redirect to another host, an Authorization does not (requests takes it out).
    """
    part = target.with_name(target.name + ".part")
    problems: list[str] = []
    statuses: list[int] = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for url in urls:
            try:
                _fetch_verified(url, part, (size, sha256, git_sha1), headers or {})
            except DownloadError as error:
                problems.append(f"{_host(url)}: {error}")
                statuses += error.statuses
                continue
            replace(part, target)
            return
    except OSError as error:
        raise UserError(f"cannot write {part}: {error.strerror or error}") from error
    raise DownloadError(f"cannot download {target.name} ({'; '.join(problems)})", statuses)


def fetch(url: str, headers: Mapping[str, str] | None = None) -> tuple[bytes, str | None]:
    """What an address answers, and the address of the next page that its Link header names, if it names one.

    For what is small enough for memory. DownloadError, with the host and the reason, if there is no answer or an error.
    """
    import requests

    try:
        with requests.get(url, headers=dict(headers or {}), timeout=TIMEOUT) as response:
            response.raise_for_status()
            return response.content, response.links.get("next", {}).get("url")
    except requests.RequestException as error:
        raise DownloadError(f"{_host(url)}: {_reason(error)}", _statuses(error)) from error


def mismatch(path: Path, size: int | None, sha256: str | None, git_sha1: str | None = None) -> str | None:
    """How the file differs from what is expected, in words; None if it does not. None as expectation fits anything.

    `git_sha1` is the name that git gives the content as a blob: the SHA-1 of "blob LENGTH", a zero byte, the content.
    """
    length = path.stat().st_size
    if size is not None and length != size:
        return f"{length} bytes instead of {size}"
    if sha256 is not None:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            return f"SHA-256 {digest[:16]}... instead of {sha256[:16]}..."
    if git_sha1 is not None:
        blob = hashlib.sha1(b"blob %d\0" % length, usedforsecurity=False)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: blob).hexdigest()
        if digest != git_sha1:
            return f"git's SHA-1 {digest[:16]}... instead of {git_sha1[:16]}..."
    return None


def _fetch_verified(url: str, part: Path, expected: _Expected, headers: Mapping[str, str]) -> None:
    resumed = part.exists()
    _fetch(url, part, expected[0], headers)
    problem = mismatch(part, *expected)
    if problem and resumed:  # what was there may have been of another file
        part.unlink()
        _fetch(url, part, expected[0], headers)
        problem = mismatch(part, *expected)
    if problem:
        part.unlink()
        raise DownloadError(problem)


def _fetch(url: str, part: Path, size: int | None, headers: Mapping[str, str]) -> None:
    """Bring `part` to its end, beginning where it ends, and again after each cut that came with new bytes."""
    import requests  # 0.1 s, so only when something is to be fetched

    while True:
        start = _length(part)
        try:
            return _stream(url, part, start, size, headers)
        except requests.RequestException as error:
            if _length(part) <= start:
                raise DownloadError(_reason(error), _statuses(error)) from error


def _stream(url: str, part: Path, start: int, size: int | None, headers: Mapping[str, str]) -> None:
    import requests

    if size is not None and start >= max(size, 1):  # an empty file still has to be made
        return
    headers = {**headers, "Accept-Encoding": "identity"}  # ranges count the file's own bytes, not compressed ones
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if start and response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # nothing follows; whether that is the whole file, the verification tells
        response.raise_for_status()
        start = start if response.status_code == requests.codes.partial_content else 0
        coming = response.headers.get("Content-Length")
        total = size if size is not None else start + int(coming) if coming else None
        progress = _progress()
        with open(part, "ab" if start else "wb") as file, progress:
            task = progress.add_task(urlsplit(url).path.rpartition("/")[2], total=total, completed=start)
            for data in response.iter_content(BLOCK):
                file.write(data)
                progress.advance(task, len(data))
                if size is not None and file.tell() > size:
                    break  # the verification says so
            file.flush()
            os.fsync(file.fileno())


def _progress():
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"{error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return "timed out"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "connection cut"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return f"{type(error).__name__}: {error}"


def _statuses(error: Exception) -> tuple[int, ...]:
    import requests

    return (error.response.status_code,) if isinstance(error, requests.HTTPError) and error.response is not None else ()


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]  # without a password


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

"""Published weights: OpenAI's GPT-2 by name, and repositories of Hugging Face as owner/repository.

`get` looks in the folder of that name in the one that TWINGRAD_DATA names, then in the cache (`folder`), and then
downloads, or copies where HF_ENDPOINT names a folder of repositories. Every file that arrives is verified by size and
hash. Later uses compare sizes, because to hash gigabytes each time takes long; with verify=True they hash as well.

OpenAI publishes no hashes. Where the registry knows none either, the SHA-256 of the first complete download is written
into `hashes.json` in the model's folder: {"model.ckpt.meta": {"size": 926519, "sha256": "..."}, ...}. Later uses are
verified against it, so damage on the disk is noticed, but what the first download brought is taken on trust.
(TensorFlow verifies a checksum of each tensor as it reads.)

What a repository was found to have is written into `files.json` once all of it is there, so later uses need no network:
{"repository": "owner/name", "revision": "main", "files": [{"name": "config.json", "size": 665, "sha256": null,
"git_sha1": "..."}, ...]}. A cached branch stays as it was that day: delete its folder to have it anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

from gpt.data.catalogue import cache_folder
from gpt.data.download import DownloadError, download, fetch, mismatch
from gpt.data.files import atomic_write
from gpt.errors import UserError
from gpt.options import did_you_mean

__all__ = ["ENTRIES", "Entry", "File", "entries", "find", "folder", "get"]

HUGGING_FACE = "https://huggingface.co"
_OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/models/"
_BACKUP = "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2/"
_HASHES, _FILES = "hashes.json", "files.json"
_WEIGHTS = "weights (*.safetensors or pytorch_model*.bin)"
_BLOCK = 1 << 20  # bytes
_BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "twingrad.json",
    "chat_template.jinja",
)
_PART = re.compile("[A-Za-z0-9_][A-Za-z0-9._-]*")  # of a repository's name or revision, and the name of a file


@dataclass(frozen=True)
class File:
    """A file in a folder of weights. None where size (bytes) or hash are not known; `git_sha1` as in `mismatch`."""

    name: str
    size: int | None
    sha256: str | None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Entry:
    """Weights with a name of their own. Each of `urls` is an address that a file's name is appended to."""

    name: str
    size: str  # as their publisher calls it
    description: str
    licence: str
    files: tuple[File, ...]
    urls: tuple[str, ...]


def _gpt2(name: str, size: str, description: str, own: Sequence[File]) -> Entry:
    """An entry of OpenAI's: `own` are the files that differ from size to size."""
    return Entry(
        name=name,
        size=size,
        description=description,
        licence="MIT (modified)",
        files=(
            *own,
            File("encoder.json", 1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
            File("vocab.bpe", 456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
        ),
        urls=(f"{_OPENAI}{size}/", f"{_BACKUP}{size}/"),
    )


ENTRIES = {
    entry.name: entry
    for entry in (
        _gpt2(
            "gpt2-small",
            "124M",
            "OpenAI's GPT-2 (2019), 124 million parameters",
            (
                File("checkpoint", 77, "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb"),
                File("hparams.json", 90, "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318"),
                File(
                    "model.ckpt.data-00000-of-00001",
                    497_759_232,
                    "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
                ),
                File("model.ckpt.index", 5_215, "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687"),
                File("model.ckpt.meta", 471_155, "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b"),
            ),
        ),
        _gpt2(
            "gpt2-medium",
            "355M",
            "OpenAI's GPT-2 (2019), 355 million parameters",
            (
                File("checkpoint", 77, None),
                File("hparams.json", 91, None),
                File("model.ckpt.data-00000-of-00001", 1_419_292_672, None),
                File("model.ckpt.index", 10_399, None),
                File("model.ckpt.meta", 926_519, None),
            ),
        ),
        _gpt2(
            "gpt2-large",
            "774M",
            "OpenAI's GPT-2 (2019), 774 million parameters",
            (
                File("checkpoint", 77, None),
                File("hparams.json", None, None),
                File("model.ckpt.data-00000-of-00001", 4 * 774_030_080, None),  # float32 parameters
                File("model.ckpt.index", None, None),
                File("model.ckpt.meta", None, None),
            ),
        ),
        _gpt2(
            "gpt2-xl",
            "1558M",
            "OpenAI's GPT-2 (2019), 1,558 million parameters",
            (
                File("checkpoint", 77, None),
                File("hparams.json", None, None),
                File("model.ckpt.data-00000-of-00001", 4 * 1_557_611_200, None),
                File("model.ckpt.index", None, None),
                File("model.ckpt.meta", None, None),
            ),
        ),
    )
}


def entries() -> tuple[Entry, ...]:
    """All entries, smallest model first."""
    return tuple(ENTRIES.values())


def folder(name: str, revision: str = "main") -> Path:
    """Where the cache keeps the files of an entry or repository, whether or not they are there.

    UserError for an unknown name, or one that is not that of a repository.
    """
    return cache_folder() / "weights" / _relative(name, revision)


def find(name: str, revision: str = "main") -> Path | None:
    """The folder, in TWINGRAD_DATA or the cache, that has all files in their sizes; None if there is none. Offline."""
    own = _data_folder(name, revision)
    if own is not None and not _own_problem(name, own, hashed=False):
        return own
    cached = folder(name, revision)
    files = _known(name, cached)
    return cached if files and not _problem(cached, files, hashed=False) else None


def get(name: str, revision: str = "main", verify: bool = False) -> Path:
    """The folder with all files of an entry, or of a repository at that revision, downloaded if need be.

    A file that is there in its size is not fetched again, unless with `verify` its hash is not the one known.
    UserError for an unknown name, a folder in TWINGRAD_DATA that is not whole, or a failed download; then what has
    come stays, and the next call goes on from there.
    """
    own = _data_folder(name, revision)
    if own is not None:
        if problem := _own_problem(name, own, hashed=verify):
            raise UserError(f"{own} is not {name} as it should be: {problem}")
        return own
    target = folder(name, revision)
    if name in ENTRIES:
        _get_entry(ENTRIES[name], target, verify)
    else:
        _get_repository(name, revision, target, verify)
    return target


def _get_entry(entry: Entry, target: Path, verify: bool) -> None:
    for file in _known(entry.name, target):
        if problem := _damage(target, file, hashed=verify):
            try:
                download([url + file.name for url in entry.urls], target / file.name, file.size, file.sha256)
            except DownloadError as error:
                places = f"{target}, or into {entry.name} in the folder that TWINGRAD_DATA names"
                raise UserError(f"{entry.name}: {problem}: {error}; or put its files into {places}") from error
        if file.sha256 is None:
            _record(target, file.name)


def _get_repository(name: str, revision: str, target: Path, verify: bool) -> None:
    """Fetch what is missing. Since `files.json` is there only with all files, what an interruption left is hashed."""
    known = {file.name: file for file in _known(name, target)}
    damages = {file.name: _damage(target, file, hashed=verify) for file in known.values()}
    if known and not any(damages.values()):
        return
    try:
        source = _source(name, revision)
        files = source.files()
        _remove(target / _FILES)
        for file in files:
            trusted = known.get(file.name) == file and not damages[file.name]
            if not trusted and _damage(target, file, hashed=True):
                source.fetch(file, target / file.name)
    except DownloadError as error:
        problem = next(filter(None, damages.values()), "not all files are in the cache")
        place = f"{_relative(name, revision)} in the folder that TWINGRAD_DATA names"
        raise UserError(f"{name}: {problem}: {error}; or put a copy of the repository into {place}") from error
    for gone in known.keys() - {file.name for file in files}:  # of the branch as it was
        _remove(target / gone)
    found = {"repository": name, "revision": revision, "files": [asdict(file) for file in files]}
    _write_json(target / _FILES, found)


def _relative(name: str, revision: str) -> str:
    """The path of a model's folder below that of all weights."""
    if name in ENTRIES:
        if revision != "main":
            raise UserError(f"{name} has no revisions, only repositories of Hugging Face have: got {revision!r}")
        return name
    if "/" not in name:
        expected = f"expected {', '.join(ENTRIES)}, or owner/repository for one of Hugging Face"
        raise UserError(f"there are no weights {name!r}: {expected}{did_you_mean(name.lower(), ENTRIES)}")
    if name.count("/") != 1 or not all(map(_is_part, name.split("/"))):
        raise UserError(f"expected owner/repository, of letters, digits, '.', '_' and '-', got {name!r}")
    if not all(map(_is_part, revision.split("/"))):
        raise UserError(f"expected a branch, tag or commit as revision of {name}, got {revision!r}")
    return name if revision == "main" else f"{name}@{revision.replace('/', '@')}"  # no name has an @ of its own


def _is_part(text: str) -> bool:
    return ".." not in text and _PART.fullmatch(text) is not None


def _data_folder(name: str, revision: str) -> Path | None:
    data = os.environ.get("TWINGRAD_DATA")
    if data and not Path(data).is_dir():
        raise UserError(f"TWINGRAD_DATA names {data!r}, which is not a folder")
    place = Path(data) / _relative(name, revision) if data else None
    return place if place is not None and place.is_dir() else None


# What is there already


def _known(name: str, place: Path) -> tuple[File, ...]:
    """What a folder should have, as far as the registry or the folder's own records know; nothing where neither do."""
    if name not in ENTRIES:
        return _listed(place)
    records = _read_json(place / _HASHES)
    return tuple(_with_record(file, records) for file in ENTRIES[name].files)


def _with_record(file: File, records: Any) -> File:
    """The file with the hash that was recorded, where the registry knows none."""
    if file.sha256 is not None:
        return file
    try:
        recorded = _checked(File(file.name, **records[file.name]))
    except (KeyError, TypeError, ValueError):
        return file
    return recorded if file.size is None else replace(recorded, size=file.size)


def _listed(place: Path) -> tuple[File, ...]:
    """The files of a repository as `files.json` has them; none without it, or where it is not as it was written."""
    try:
        return tuple(_checked(File(**record)) for record in _read_json(place / _FILES)["files"])
    except (KeyError, TypeError, ValueError):
        return ()


def _checked(file: File) -> File:
    """ValueError unless the name stays in its folder, there is a hash, and size and hashes are such."""
    if not file.sha256 and not file.git_sha1:
        raise ValueError(f"no hash of {file.name}")
    hashes = (file.sha256 or "0" * 64) + (file.git_sha1 or "0" * 40)
    if not (_is_part(file.name) and re.fullmatch("[0-9a-f]{104}", hashes) and isinstance(file.size, int)):
        raise ValueError(f"not a file with its size and hashes: {file}")
    return file


def _own_problem(name: str, own: Path, hashed: bool) -> str | None:
    """What is wrong with a folder that the user made, which need not have the records that a download leaves."""
    files = _known(name, own)
    return _problem(own, files, hashed) if files else _lack(own)


def _problem(place: Path, files: Iterable[File], hashed: bool) -> str | None:
    return next((problem for file in files if (problem := _damage(place, file, hashed))), None)


def _damage(place: Path, file: File, hashed: bool) -> str | None:
    path = place / file.name
    if not path.is_file():
        return f"{file.name} is missing"
    problem = mismatch(path, file.size, *((file.sha256, file.git_sha1) if hashed else (None,)))
    return f"{file.name} has {problem}" if problem else None


def _lack(place: Path) -> str | None:
    """What a copy of a repository lacks that loading needs, as far as its own files tell."""
    there = _wanted(path.name for path in place.iterdir() if path.is_file())
    if "config.json" not in there:
        return "config.json is missing"
    if not any(map(_is_weights, there)):
        return f"{_WEIGHTS} are missing"
    for index in (name for name in there if name.endswith(".index.json")):
        try:
            missing = set(_read_json(place / index)["weight_map"].values()) - set(there)
        except (AttributeError, KeyError, TypeError):
            return f"{index} is not an index of weights"
        if missing:
            return f"{min(missing)} is missing"
    return None


def _record(place: Path, name: str) -> None:
    """Write down the size and SHA-256 of a file that has arrived."""
    size, digest = _measured(place / name)
    records = _read_json(place / _HASHES)
    kept = records if isinstance(records, dict) else {}
    _write_json(place / _HASHES, {**kept, name: {"size": size, "sha256": digest}})


def _measured(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file."""
    try:
        with open(path, "rb") as file:
            return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _read_json(path: Path) -> Any:
    """What a JSON file holds; nothing where there is none, or one that cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror or error}") from error


# Repositories of Hugging Face


def _source(name: str, revision: str) -> _Hub | _Mirror:
    """Where HF_ENDPOINT says that repositories are: at an address, or in a folder (a path or file:///path)."""
    endpoint = os.environ.get("HF_ENDPOINT") or HUGGING_FACE
    parts = urlsplit(endpoint)
    if parts.scheme in ("http", "https") and parts.netloc:
        return _Hub(endpoint.rstrip("/"), name, revision)
    mirror = Path(url2pathname(parts.path) if parts.scheme == "file" else endpoint)
    if not mirror.is_dir():
        raise UserError(f"HF_ENDPOINT names {endpoint!r}, which is neither an http address nor a folder")
    if not (mirror / name).is_dir():
        raise UserError(f"HF_ENDPOINT names the folder {mirror}, and in it there is no {name}")
    if revision != "main":
        raise UserError(f"{mirror / name} is one revision of {name}, which it does not name: got {revision!r}")
    return _Mirror(mirror / name)


@dataclass(frozen=True)
class _Hub:
    """A repository at an address."""

    endpoint: str
    name: str
    revision: str

    def files(self) -> list[File]:
        try:
            listed = {item["path"]: item for item in self._items() if item["type"] == "file"}
            files = [_from_item(listed[name]) for name in _wanted(listed)]
        except DownloadError as error:
            raise self._explained(error, f"cannot list {self.name} ({error})") from error
        except UserError:  # a ValueError too
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self._host} does not list the files of {self.name} as expected: {error!r}") from error
        if not any(_is_weights(file.name) for file in files):
            raise UserError(f"{self.name} on {self._host} has no {_WEIGHTS}")
        return files

    def fetch(self, file: File, target: Path) -> None:
        url = f"{self.endpoint}/{self.name}/resolve/{quote(self.revision, safe='')}/{file.name}"
        try:
            download([url], target, file.size, file.sha256, file.git_sha1, _token())
        except DownloadError as error:
            raise self._explained(error, str(error)) from error

    def _items(self) -> Iterator[dict[str, Any]]:
        """Files and folders, page after page. Of a page's address only the query is taken: the host stays ours."""
        address = f"{self.endpoint}/api/models/{self.name}/tree/{quote(self.revision, safe='')}"
        query, seen = "recursive=true", set()
        while query not in seen:
            seen.add(query)
            body, following = fetch(f"{address}?{query}", _token())
            yield from json.loads(body)
            if following is None:
                return
            query = urlsplit(following).query
        raise ValueError("its pages go round in a circle")

    @property
    def _host(self) -> str:
        return urlsplit(self.endpoint).netloc.rpartition("@")[2]

    def _explained(self, error: DownloadError, otherwise: str) -> UserError:
        refused = next((status for status in error.statuses if status in (401, 403, 404)), None)
        if refused is None:
            return DownloadError(otherwise)
        without = f"without revision {self.revision}" if refused == 404 else "gated"
        token = "the token in HF_TOKEN does not open it" if _token() else "HF_TOKEN can hold a token that opens it"
        return UserError(f"{self._host} refuses {self.name} ({refused}): it is misspelt, private or {without}; {token}")


@dataclass(frozen=True)
class _Mirror:
    """A repository in a folder."""

    place: Path

    def files(self) -> list[File]:
        if problem := _lack(self.place):
            raise UserError(f"{self.place}: {problem}")
        return [self._file(name) for name in _wanted(path.name for path in self.place.iterdir() if path.is_file())]

    def fetch(self, file: File, target: Path) -> None:
        with atomic_write(target) as copy, open(self.place / file.name, "rb") as original:
            shutil.copyfileobj(original, copy, _BLOCK)
            copy.flush()
            if problem := mismatch(Path(copy.name), file.size, file.sha256):
                raise UserError(f"the copy of {self.place / file.name} has {problem}")

    def _file(self, name: str) -> File:
        size, digest = _measured(self.place / name)
        return File(name, size, digest)


def _wanted(names: Iterable[str]) -> list[str]:
    """Which of a repository's files loading needs. UserError for one that has such a name but might leave its folder.

    The weights are those in safetensors, and only where there are none PyTorch's own. Nothing in a subfolder counts,
    nor Mistral's second copy of the weights.
    """
    top = sorted(name for name in names if "/" not in name)
    tensors = [name for name in top if name.endswith(".safetensors")]
    if main := [name for name in tensors if not name.startswith("consolidated")]:
        tensors = main + [name for name in top if name.endswith(".safetensors.index.json")]
    pickles = [name for name in top if re.fullmatch(r"pytorch_model.*\.bin(\.index\.json)?", name)]
    wanted = [name for name in top if name in _BESIDE_WEIGHTS] + (tensors or pickles)
    for name in wanted:
        if not _is_part(name):
            raise UserError(f"the repository has a file {name!r}: expected letters, digits, '.', '_' and '-' only")
    return wanted


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _from_item(item: dict[str, Any]) -> File:
    """A file as the address lists it: a large one with its SHA-256 under "lfs", others with git's name of the blob."""
    if large := item.get("lfs"):
        return _checked(File(item["path"], large["size"], large["oid"].removeprefix("sha256:")))
    return _checked(File(item["path"], item["size"], None, item["oid"]))


def _token() -> dict[str, str]:
    """The header that carries HF_TOKEN, which the message about a wrong one leaves out."""
    token = (os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or "").strip()
    if not re.fullmatch("[!-~]*", token):
        raise UserError("the token in HF_TOKEN (or HUGGING_FACE_HUB_TOKEN) has characters that no token has")
    return {"Authorization": f"Bearer {token}"} if token else {}

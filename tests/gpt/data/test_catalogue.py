"""The catalogue: where a file is looked for, and that it is the one expected."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from gpt.data import catalogue, load_text
from gpt.data.catalogue import ENTRIES, STANDARD_LIBRARY, Entry, get, standard_library
from gpt.data.download import DownloadError
from gpt.errors import UserError

DATA = os.environ.get("TWINGRAD_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="TWINGRAD_DATA names no folder with the data sets")
CONTENT = b"ham\thello\nspam\twin!\n"
downloaded = [entry for entry in ENTRIES.values() if entry.urls]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """An empty TWINGRAD_DATA and an empty TWINGRAD_CACHE."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    monkeypatch.setenv("TWINGRAD_DATA", str(data))
    monkeypatch.setenv("TWINGRAD_CACHE", str(cache))
    return data, cache


@pytest.fixture
def entry(monkeypatch):
    """An entry with CONTENT."""
    entry = Entry(
        "mine", "mine.txt", "", "", ("http://x/a", "http://y/b"), len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
    )
    monkeypatch.setitem(ENTRIES, "mine", entry)
    return entry


def served(monkeypatch, content):
    """Let every download give `content`; returns what was asked for."""
    asked = []

    def download(urls, target, size=None, sha256=None):
        asked.append((urls, size, sha256))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    monkeypatch.setattr(catalogue, "download", download)
    return asked


def test_names_and_files_are_unambiguous():
    assert [entry.name for entry in catalogue.entries()] == list(ENTRIES)
    assert len({entry.file for entry in ENTRIES.values()}) == len(ENTRIES)
    for entry in downloaded:
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert all(url.startswith("https://") for url in entry.urls)
        assert entry.description
        assert entry.licence


@needs_data
@pytest.mark.parametrize("entry", downloaded, ids=lambda entry: entry.name)
def test_the_real_files_are_those_of_the_catalogue(entry):
    assert get(entry.name) == Path(DATA) / entry.file
    text = load_text(entry.name)
    if entry.file.endswith(".json"):
        assert len(json.loads(text)) == 1100


def test_the_data_folder_comes_first(folders, entry, monkeypatch):
    data, cache = folders
    asked = served(monkeypatch, CONTENT)
    assert get("mine") == cache / "mine.txt"
    (data / "mine.txt").write_bytes(CONTENT)
    assert get("mine") == data / "mine.txt"
    assert asked == [(entry.urls, entry.size, entry.sha256)]


def test_a_cached_file_is_verified_and_not_fetched_again(folders, entry, monkeypatch):
    asked = served(monkeypatch, CONTENT)
    for _ in range(2):
        assert get("mine").read_bytes() == CONTENT
    assert len(asked) == 1
    get("mine").write_bytes(CONTENT[:-1] + b"?")
    assert get("mine").read_bytes() == CONTENT
    assert len(asked) == 2


@pytest.mark.parametrize("content, problem", [(CONTENT + b"x", "21 bytes instead of 20"), (CONTENT[::-1], "SHA-256 ")])
def test_another_file_in_the_data_folder_is_refused(folders, entry, content, problem):
    (folders[0] / "mine.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"mine.txt is not the mine that the catalogue knows: it has {problem}"):
        get("mine")


def test_a_data_folder_that_is_none_is_named(folders, monkeypatch):
    monkeypatch.setenv("TWINGRAD_DATA", str(folders[0] / "absent"))
    with pytest.raises(UserError, match="TWINGRAD_DATA names .*absent', which is not a folder"):
        get("the-verdict")


@pytest.mark.parametrize(
    "name, near", [("the_verdict", "the-verdict"), ("smsspam", "sms-spam"), ("Python-Stdlib", "python-stdlib")]
)
def test_a_wrong_name_suggests_the_near_one(name, near):
    with pytest.raises(UserError, match=f"'{name}' is not a data set .*did you mean '{near}'"):
        get(name)


def test_a_name_like_no_other_lists_the_names():
    with pytest.raises(UserError, match="the-verdict, tiny-shakespeare") as caught:
        get("xyzzy")
    assert "did you mean" not in str(caught.value)


def test_offline_says_where_to_put_the_file(folders, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setitem(
        ENTRIES, "mine", Entry("mine", "mine.txt", "", "", ("http://127.0.0.1:9/mine.txt",), 20, "0" * 64)
    )
    with pytest.raises(
        UserError, match=r"127.0.0.1:9: no connection\); or put mine.txt into .*TWINGRAD_DATA"
    ) as caught:
        get("mine")
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, DownloadError)


def archive(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return buffer.getvalue()


def test_a_member_is_taken_out_of_its_zip(folders, entry, monkeypatch):
    monkeypatch.setitem(ENTRIES, "mine", replace(entry, member="Inner"))
    asked = served(monkeypatch, archive(Inner=CONTENT, readme=b"other"))
    assert get("mine").read_bytes() == CONTENT
    assert asked == [(entry.urls, None, None)]  # size and digest are the member's, the zip's are not known
    assert [path.name for path in folders[1].iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"<html>blocked</html>", "not the archive expected"),
        (archive(other=CONTENT), "not the archive expected"),
        (archive(Inner=CONTENT + b"x"), "Inner .* 21 bytes instead of 20"),
        (archive(Inner=CONTENT[::-1]), "Inner .* SHA-256 "),
    ],
)
def test_a_wrong_zip_leaves_nothing(folders, entry, monkeypatch, content, reason):
    monkeypatch.setitem(ENTRIES, "mine", replace(entry, member="Inner"))
    served(monkeypatch, content)
    with pytest.raises(UserError, match=reason):
        get("mine")
    assert list(folders[1].iterdir()) == []


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("TWINGRAD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setenv("LOCALAPPDATA", "/somewhere")
    assert catalogue.cache_folder() == Path("/somewhere/twingrad")
    monkeypatch.setenv("TWINGRAD_CACHE", "/own")
    assert catalogue.cache_folder() == Path("/own")


def test_standard_library_is_source_text_in_a_fixed_order():
    text = standard_library(50_000)
    assert len(text) == 50_000
    assert text == standard_library(60_000)[:50_000]
    assert "import" in text
    command = "from gpt.data.catalogue import standard_library as s; print(hash(s(50_000)))"
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    hashes = {subprocess.check_output([sys.executable, "-c", command], env=environment) for _ in range(2)}
    assert len(hashes) == 1


def test_standard_library_leaves_out_packages_tests_and_what_is_not_utf8(tmp_path, monkeypatch):
    files = {
        "a.py": "a = 1\n",
        "b/c.py": "c\n",
        "b.py": "b\n",
        "test/t.py": "no",
        "b/tests/t.py": "no",
        "notes.txt": "no",
    }
    files |= {"site-packages/p.py": "no", "_sysconfigdata_x.py": "no", "b/__pycache__/x.py": "no"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.py").write_bytes(b"# \xff\n")
    monkeypatch.setattr(catalogue.sysconfig, "get_path", lambda name: str(tmp_path))
    assert standard_library() == "a = 1\nb\nc\n"
    assert standard_library(8) == "a = 1\nb\n"
    assert standard_library(None) == standard_library()
    monkeypatch.setattr(catalogue.sysconfig, "get_path", lambda name: str(tmp_path / "absent"))
    with pytest.raises(UserError, match="no source of its standard library"):
        standard_library()


def test_get_writes_the_built_in_text(folders):
    path = get(STANDARD_LIBRARY)
    assert path.parent == folders[1]
    assert path.read_bytes().decode() == standard_library() == load_text(STANDARD_LIBRARY)

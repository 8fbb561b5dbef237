"""Published weights from a local server that cuts, lacks files, alters them, or answers as Hugging Face does."""

import hashlib
import json
import re
from dataclasses import replace

import pytest

from gpt.errors import UserError
from gpt.weights import registry
from gpt.weights.registry import ENTRIES, Entry, File, find, folder, get
from tests.gpt.weights.conftest import serving

DATA = bytes(range(256)) * 1000
SMALL = b'{"n_layer": 2}'
REPOSITORY = "owner/model-1.0"
HUB = {
    "config.json": b'{"model_type": "gpt2"}',
    "model.safetensors": DATA,
    "merges.txt": b"",
    "README.md": b"no need of it",
    "pytorch_model.bin": b"the same weights again",
    "onnx/config.json": b"in a subfolder",
}
WANTED = ["config.json", "merges.txt", "model.safetensors"]


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no TWINGRAD_DATA, no token, and no proxy on the way to the server."""
    for variable in ("TWINGRAD_DATA", "HF_ENDPOINT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("TWINGRAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty TWINGRAD_DATA."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("TWINGRAD_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def entry(server, monkeypatch):
    """An entry of three files, known by size and hash, by size, and by neither, at two addresses of the server."""
    contents = {"data": DATA, "hparams": SMALL, "index": b"index"}
    server.contents = {f"/{place}/{name}": content for place in "ab" for name, content in contents.items()}
    files = (File("data", len(DATA), sha256(DATA)), File("hparams", len(SMALL), None), File("index", None, None))
    entry = Entry("mine", "", "", "", files, (f"{server.address}/a/", f"{server.address}/b/"))
    monkeypatch.setitem(ENTRIES, "mine", entry)
    return entry


def listed(contents, large=("model.safetensors",)):
    """What the address says of these files: the type, the size and hash, and those of the pointer where it is large."""
    items = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "tokenizer.model"}]
    for path, content in contents.items():
        item = {"type": "file", "oid": git_sha1(content), "size": len(content), "path": path}
        if path in large:
            item |= {"oid": "1" * 40, "lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 134}}
        items.append(item)
    return items


def tree(revision="main", query="recursive=true"):
    return f"/api/models/{REPOSITORY}/tree/{revision}?{query}"


def publish(server, contents, revision="main", **settings):
    server.contents[tree(revision)] = json.dumps(listed(contents, **settings)).encode()
    server.contents |= {f"/{REPOSITORY}/resolve/{revision}/{path}": content for path, content in contents.items()}


@pytest.fixture
def hub(server, monkeypatch):
    """The server as Hugging Face with one repository."""
    publish(server, HUB)
    monkeypatch.setenv("HF_ENDPOINT", server.address + "/")
    return server


def offline(server, monkeypatch):
    """From now on nobody answers: the discard port."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    if "mine" in ENTRIES:
        monkeypatch.setitem(ENTRIES, "mine", replace(ENTRIES["mine"], urls=("http://127.0.0.1:9/", "http://[::1]:9/")))


def files_in(place):
    return sorted(path.name for path in place.iterdir())


def alter(path):
    """The same size, one byte another."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


# The registry itself


def test_the_entries_are_openais():
    assert tuple(entry.name for entry in registry.entries()) == ("gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl")
    for entry in registry.entries():
        assert ENTRIES[entry.name] is entry
        assert sorted(file.name for file in entry.files) == [
            "checkpoint",
            "encoder.json",
            "hparams.json",
            "model.ckpt.data-00000-of-00001",
            "model.ckpt.index",
            "model.ckpt.meta",
            "vocab.bpe",
        ]
        assert len(entry.urls) == 2
        assert all(re.fullmatch(r"https://.*/(124M|355M|774M|1558M)/", url) for url in entry.urls)
        assert all(file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256) for file in entry.files)
        assert entry.description
        assert entry.licence
    assert all(file.size and file.sha256 for file in ENTRIES["gpt2-small"].files)


@pytest.mark.parametrize("ask", [get, find, folder])
@pytest.mark.parametrize(
    "name, message",
    [
        ("gpt2-smal", "no weights 'gpt2-smal': expected gpt2-small, .*; did you mean gpt2-small?"),
        ("GPT2-XL", "did you mean gpt2-xl?"),
        ("xyzzy", "or owner/repository for one of Hugging Face$"),
        ("..", "no weights '..'"),
        *((name, "expected owner/repository, of letters") for name in ("../x", "a/..", "a/b/c", "/a", "a/", "a/b c")),
        *((name, "expected owner/repository, of letters") for name in ("a/b\n", "a\\b/c", "./a", "a/b..c", "a/é")),
    ],
)
def test_a_name_of_nothing_is_one_line(ask, name, message):
    with pytest.raises(UserError, match=message) as caught:
        ask(name)
    assert "\n" not in str(caught.value)


def test_folders_stay_in_the_cache(cache):
    assert folder("gpt2-xl") == cache / "weights" / "gpt2-xl"
    assert folder("a/b") == cache / "weights" / "a" / "b"
    assert folder("a/b", "refs/pr/1") == cache / "weights" / "a" / "b@refs@pr@1"
    for revision in ("..", "", "a/../b", "/a", "a b"):
        with pytest.raises(UserError, match="expected a branch, tag or commit"):
            folder("a/b", revision)
    with pytest.raises(UserError, match="gpt2-xl has no revisions"):
        folder("gpt2-xl", "v2")


# Entries


def test_whole(server, entry):
    assert find("mine") is None
    place = get("mine")
    assert place == folder("mine") == find("mine")
    assert [(place / name).read_bytes() for name in ("data", "hparams", "index")] == [DATA, SMALL, b"index"]
    assert server.asked == ["/a/data", "/a/hparams", "/a/index"]
    assert json.loads((place / "hashes.json").read_text()) == {
        "hparams": {"size": len(SMALL), "sha256": sha256(SMALL)},
        "index": {"size": 5, "sha256": sha256(b"index")},
    }


def test_what_is_whole_is_not_fetched_again(server, entry, monkeypatch):
    get("mine")
    offline(server, monkeypatch)
    assert get("mine") == get("mine", verify=True) == find("mine") == folder("mine")
    assert len(server.asked) == 3


def test_a_cut_download_goes_on_where_it_broke(server, entry):
    server.cut = True
    with pytest.raises(UserError, match="mine: data is missing: cannot download data .*connection cut"):
        get("mine")
    assert find("mine") is None
    server.cut = False
    assert (get("mine") / "data").read_bytes() == DATA
    resumed = int(server.headers[-3]["Range"][6:-1])
    assert 100_000 - (1 << 14) < resumed <= 100_000
    assert files_in(folder("mine")) == ["data", "hashes.json", "hparams", "index"]


@pytest.mark.parametrize("wrong", [None, DATA + b"x", DATA[:-1], DATA[::-1]])
def test_the_second_address_has_what_the_first_has_not(server, entry, wrong):
    if wrong is None:
        del server.contents["/a/data"]
    else:
        server.contents["/a/data"] = wrong
    assert (get("mine") / "data").read_bytes() == DATA
    assert server.asked[:2] == ["/a/data", "/b/data"]


@pytest.mark.parametrize(
    "wrong, reason", [(DATA + b"x", "256[0-9]+ bytes instead of 256000"), (DATA[::-1], "SHA-256 .* instead of")]
)
def test_what_is_not_the_file_never_gets_its_name(server, entry, wrong, reason):
    server.contents |= {"/a/data": wrong, "/b/data": wrong}
    with pytest.raises(UserError, match=rf"cannot download data \(127.0.0.1:\d+: {reason}.*; 127.0.0.1:\d+: {reason}"):
        get("mine")
    assert find("mine") is None
    assert files_in(folder("mine")) == []


def test_offline_says_why_and_where_to_put_the_files(server, entry, monkeypatch):
    offline(server, monkeypatch)
    with pytest.raises(UserError, match=r"data \(127.0.0.1:9: no connection; \[::1\]:9: no connection\)") as caught:
        get("mine")
    assert f"put its files into {folder('mine')}, or into mine in the folder that TWINGRAD_DATA" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_put_there_by_hand_are_taken_and_their_hashes_written_down(server, entry, monkeypatch):
    offline(server, monkeypatch)
    place = folder("mine")
    place.mkdir(parents=True)
    for name, content in {"data": DATA, "hparams": SMALL, "index": b"index"}.items():
        (place / name).write_bytes(content)
    assert get("mine") == place
    assert set(json.loads((place / "hashes.json").read_text())) == {"hparams", "index"}


@pytest.mark.parametrize("name", ["data", "hparams", "index"])
def test_damage_is_noticed_and_mended(server, entry, monkeypatch, name):
    place = get("mine")
    before = (place / name).read_bytes()
    alter(place / name)
    assert get("mine") == find("mine") == place  # in its size
    assert len(server.asked) == 3
    assert get("mine", verify=True) == place
    assert (place / name).read_bytes() == before
    assert server.asked[3:] == [f"/a/{name}"]
    alter(place / name)
    offline(server, monkeypatch)
    with pytest.raises(UserError, match=f"mine: {name} has SHA-256 .*: cannot download {name}"):
        get("mine", verify=True)


@pytest.mark.parametrize("name", ["data", "hparams", "index"])
def test_another_size_is_always_noticed(server, entry, name):
    place = get("mine")
    before = (place / name).read_bytes()
    (place / name).write_bytes(before + b"x")
    assert find("mine") is None
    assert (get("mine") / name).read_bytes() == before


def test_the_first_hash_binds_later_downloads(server, entry):
    place = get("mine")
    (place / "index").unlink()
    server.contents |= {"/a/index": b"xedni", "/b/index": b"xedni"}
    with pytest.raises(UserError, match="cannot download index .*SHA-256 [0-9a-f]{16}... instead of"):
        get("mine")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"index": 5}', '{"index": {"sha256": "x", "size": 5}}', '{"index": {}}']
)
def test_records_that_are_none_are_written_anew(server, entry, content):
    place = get("mine")
    (place / "hashes.json").write_text(content)
    assert find("mine") == place
    assert get("mine") == place
    assert json.loads((place / "hashes.json").read_text())["index"] == {"size": 5, "sha256": sha256(b"index")}
    assert len(server.asked) == 3


def test_a_size_that_the_registry_knows_comes_before_a_record(server, entry):
    place = get("mine")
    records = {"hparams": {"size": 1, "sha256": sha256(b"x")}}
    (place / "hashes.json").write_text(json.dumps(records))
    (place / "hparams").write_bytes(b"x")
    assert find("mine") is None


def test_the_data_folder_comes_first_and_is_left_alone(server, entry, data):
    cached = get("mine")
    own = data / "mine"
    own.mkdir()
    for name in ("data", "hparams", "index"):
        (own / name).write_bytes((cached / name).read_bytes())
    assert get("mine") == get("mine", verify=True) == find("mine") == own
    alter(own / "data")
    assert get("mine") == own
    with pytest.raises(UserError, match=r"data/mine is not mine as it should be: data has SHA-256"):
        get("mine", verify=True)
    (own / "data").unlink()
    assert find("mine") == cached
    with pytest.raises(UserError, match="is not mine as it should be: data is missing"):
        get("mine")
    assert files_in(own) == ["hparams", "index"]
    assert len(server.asked) == 3


def test_a_data_folder_that_is_none_is_named(data):
    data.rmdir()
    with pytest.raises(UserError, match="TWINGRAD_DATA names .*data', which is not a folder"):
        get("gpt2-small")


def test_a_folder_that_cannot_be_written_is_named(server, entry, cache):
    cache.write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write .*weights/mine/data"):
        get("mine")


# Repositories


def test_a_repository_has_what_loading_needs(hub):
    assert find(REPOSITORY) is None
    place = get(REPOSITORY)
    assert place == folder(REPOSITORY) == find(REPOSITORY)
    assert files_in(place) == sorted([*WANTED, "files.json"])
    assert all((place / name).read_bytes() == HUB[name] for name in WANTED)
    record = json.loads((place / "files.json").read_text())
    assert (record["repository"], record["revision"]) == (REPOSITORY, "main")
    assert record["files"][0] == {
        "name": "config.json",
        "size": 22,
        "sha256": None,
        "git_sha1": git_sha1(HUB["config.json"]),
    }
    assert record["files"][2]["sha256"] == sha256(DATA)
    assert len(hub.asked) == 4


def test_a_whole_repository_needs_no_network(hub, monkeypatch):
    get(REPOSITORY)
    for endpoint in ("http://127.0.0.1:9", "/nowhere"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert get(REPOSITORY) == get(REPOSITORY, verify=True) == find(REPOSITORY)
    assert len(hub.asked) == 4


def test_pytorchs_own_format_only_without_safetensors(hub):
    names = ["pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin", "pytorch_model.bin.index.json"]
    contents = dict.fromkeys(["config.json", *names, "training_args.bin", "model.safetensors.index.json"], b"x")
    publish(hub, contents, large=names[:2])
    assert files_in(get(REPOSITORY)) == sorted(["config.json", "files.json", *names])


def test_shards_with_their_index_and_no_second_copy(hub):
    names = ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"]
    publish(hub, dict.fromkeys(["config.json", "consolidated.safetensors", *names], b"x"))
    assert files_in(get(REPOSITORY)) == sorted(["config.json", "files.json", *names])


def test_a_repository_without_weights_is_refused(hub):
    publish(hub, {"config.json": b"{}", "model.gguf": b"x"})
    with pytest.raises(UserError, match=f"{REPOSITORY} on 127.0.0.1:.* has no weights \\(\\*.safetensors or"):
        get(REPOSITORY)


def test_a_cut_repository_goes_on_where_it_broke(hub):
    hub.cut = True
    with pytest.raises(UserError, match=f"{REPOSITORY}: not all files .*cannot download model.safetensors .*cut"):
        get(REPOSITORY)
    assert find(REPOSITORY) is None
    hub.cut = False
    before = len(hub.asked)
    assert (get(REPOSITORY) / "model.safetensors").read_bytes() == DATA
    assert hub.asked[before:] == [tree(), f"/{REPOSITORY}/resolve/main/model.safetensors"]
    assert "Range" in hub.headers[-1]


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("model.safetensors", DATA[::-1], "SHA-256 [0-9a-f]{16}"),
        ("model.safetensors", DATA + b"x", "bytes instead of 256000"),
        ("config.json", HUB["config.json"][::-1], "git's SHA-1 [0-9a-f]{16}"),
        ("config.json", HUB["config.json"] + b"x", "23 bytes instead of 22"),
    ],
)
def test_an_altered_file_of_a_repository_never_gets_its_name(hub, name, content, reason):
    hub.contents[f"/{REPOSITORY}/resolve/main/{name}"] = content
    with pytest.raises(UserError, match=f"cannot download {name} .*{reason}"):
        get(REPOSITORY)
    assert name not in files_in(folder(REPOSITORY))
    assert find(REPOSITORY) is None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damage_in_a_repository_is_noticed_and_mended(hub, monkeypatch, name):
    place = get(REPOSITORY)
    alter(place / name)
    assert get(REPOSITORY) == place
    assert len(hub.asked) == 4
    assert (get(REPOSITORY, verify=True) / name).read_bytes() == HUB[name]
    assert hub.asked[4:] == [tree(), f"/{REPOSITORY}/resolve/main/{name}"]
    alter(place / name)
    offline(hub, monkeypatch)
    with pytest.raises(UserError, match=rf"{name} has .*: cannot list {REPOSITORY} \(127.0.0.1:9: no connection\)"):
        get(REPOSITORY, verify=True)
    assert get(REPOSITORY) == place


def test_a_branch_that_moved_is_never_mixed(hub):
    place = get(REPOSITORY)
    (place / "config.json").unlink()  # what makes it ask again
    moved = {**HUB, "model.safetensors": DATA[::-1]}
    publish(hub, moved)
    hub.refused = {f"/{REPOSITORY}/resolve/main/model.safetensors": 500}
    with pytest.raises(UserError, match="config.json is missing: cannot download model.safetensors .*500"):
        get(REPOSITORY)
    assert WANTED == files_in(place)  # each in its size
    assert find(REPOSITORY) is None
    hub.refused = {}
    assert get(REPOSITORY) == find(REPOSITORY) == place
    assert (place / "model.safetensors").read_bytes() == moved["model.safetensors"]


def test_a_file_that_the_branch_no_longer_has_goes(hub):
    publish(hub, {**HUB, "vocab.json": b"{}"})
    place = get(REPOSITORY)
    (place / "merges.txt").unlink()
    publish(hub, HUB)
    assert files_in(get(REPOSITORY)) == sorted([*WANTED, "files.json"])
    assert find(REPOSITORY) == place


def test_revisions_have_folders_of_their_own(hub):
    contents = {**HUB, "config.json": b"{}"}
    publish(hub, contents, "refs%2Fpr%2F1")
    assert (get(REPOSITORY, "refs/pr/1") / "config.json").read_bytes() == b"{}"
    assert find(REPOSITORY) is None
    assert (get(REPOSITORY) / "config.json").read_bytes() == HUB["config.json"]


@pytest.mark.parametrize("host", ["", "http://127.0.0.1:9"])
def test_pages_are_followed_on_the_same_host(hub, host):
    items = listed(HUB)
    following = tree(query="recursive=true&cursor=abc")
    hub.contents |= {tree(): json.dumps(items[:3]).encode(), following: json.dumps(items[3:]).encode()}
    hub.links[tree()] = host + following
    assert files_in(get(REPOSITORY)) == sorted([*WANTED, "files.json"])
    assert hub.asked[:2] == [tree(), following]


def test_pages_in_a_circle_end(hub):
    hub.links[tree()] = tree()
    with pytest.raises(UserError, match="does not list the files .* as expected: .*circle"):
        get(REPOSITORY)


@pytest.mark.parametrize("name", ["../evil.safetensors", "a/b.safetensors", "/tmp/evil.safetensors"])
def test_nothing_is_written_outside_the_folder(hub, cache, name):
    publish(hub, {**HUB, name: b"evil"})
    place = get(REPOSITORY)
    assert sorted(path for path in cache.rglob("*") if path.is_file()) == sorted(place.iterdir())
    assert files_in(place) == sorted([*WANTED, "files.json"])


@pytest.mark.parametrize("name", ["..\\evil.safetensors", "C:evil.safetensors", "\n.safetensors", "..safetensors"])
def test_a_file_with_a_wicked_name_is_refused(hub, cache, name):
    publish(hub, {**HUB, name: b"evil"})
    with pytest.raises(UserError, match="the repository has a file .*: expected letters") as caught:
        get(REPOSITORY)
    assert "\n" not in str(caught.value)
    assert not cache.exists()


@pytest.mark.parametrize(
    "record",
    ["{}", "[]", '{"files": [{"name": "../x", "size": 1, "sha256": "' + "0" * 64 + '"}]}', '{"files": [3]}', "?"],
)
def test_a_list_of_files_that_is_none_is_made_anew(hub, record):
    place = get(REPOSITORY)
    (place / "files.json").write_text(record)
    (place.parent / "x").write_text("x")
    assert find(REPOSITORY) is None
    assert get(REPOSITORY) == find(REPOSITORY)
    assert hub.asked[4:] == [tree()]  # the files are those listed
    assert (place.parent / "x").read_text() == "x"


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>",
        b'{"error": "x"}',
        b"[3]",
        b'[{"type": "file", "path": "config.json"}]',
        b'[{"type": "file", "path": "config.json", "size": 1, "oid": "xyz"}]',
        b'[{"type": "file", "path": "config.json", "size": 1, "oid": null}]',
        b'[{"type": "file", "path": "config.json", "size": "1", "oid": "' + b"0" * 40 + b'"}]',
        b'[{"type": "file", "path": 3}]',
    ],
)
def test_an_answer_that_is_no_list_of_files_is_one_line(hub, answer):
    hub.contents[tree()] = answer
    with pytest.raises(UserError, match="does not list the files of owner/model-1.0 as expected") as caught:
        get(REPOSITORY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("beginning", ["/api/", f"/{REPOSITORY}/resolve"])
@pytest.mark.parametrize("status, why", [(401, "gated"), (403, "gated"), (404, "without revision main")])
@pytest.mark.parametrize(
    "token, advice",
    [("", "HF_TOKEN can hold a token that opens it"), ("s3cret", "the token in HF_TOKEN does not open")],
)
def test_a_refusal_is_one_clear_line(hub, monkeypatch, beginning, status, why, token, advice):
    hub.refused = {beginning: status}
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        UserError,
        match=rf"127.0.0.1:\d+ refuses owner/model-1.0 \({status}\): it is misspelt, private or {why}; {advice}",
    ) as caught:
        get(REPOSITORY)
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_no_network_and_nothing_cached_is_one_line(hub, monkeypatch):
    offline(hub, monkeypatch)
    with pytest.raises(
        UserError,
        match=f"cannot list {REPOSITORY} .127.0.0.1:9: no connection.*; or .* {REPOSITORY} in .*TWINGRAD_DATA",
    ) as caught:
        get(REPOSITORY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_the_token_goes_to_the_endpoint_and_nowhere_else(hub, monkeypatch, variable, capsys):
    monkeypatch.setenv(variable, "s3cret\n")
    path = f"/{REPOSITORY}/resolve/main/model.safetensors"
    with serving() as other:
        other.contents["/signed"] = hub.contents.pop(path)
        hub.redirects[path] = f"{other.address}/signed"
        place = get(REPOSITORY)
    assert (place / "model.safetensors").read_bytes() == DATA
    assert [headers.get("Authorization") for headers in hub.headers] == ["Bearer s3cret"] * 4
    assert [headers.get("Authorization") for headers in other.headers] == [None]
    assert "s3cret" not in "".join(path.read_text("latin-1") for path in place.iterdir())
    assert "s3cret" not in "".join(capsys.readouterr())


def test_without_a_token_none_is_sent(hub):
    get(REPOSITORY)
    assert all("Authorization" not in headers for headers in hub.headers)


@pytest.mark.parametrize("token", ["s3 cret", "s3cret\nX: y", "s3crét"])
def test_a_token_that_is_none_is_not_shown(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match="the token in HF_TOKEN .* has characters that no token has") as caught:
        get(REPOSITORY)
    assert "s3" not in str(caught.value)
    assert hub.asked == []


# Repositories in a folder


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder with the repository, named in HF_ENDPOINT."""
    write(tmp_path / "mirror" / REPOSITORY, HUB)
    monkeypatch.setenv("HF_ENDPOINT", str(tmp_path / "mirror"))
    return tmp_path / "mirror"


def write(place, contents):
    for path, content in contents.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(content)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_mirror_is_copied(mirror, monkeypatch, scheme):
    monkeypatch.setenv("HF_ENDPOINT", scheme + str(mirror))
    place = get(REPOSITORY)
    assert place == folder(REPOSITORY) == find(REPOSITORY)
    assert files_in(place) == sorted([*WANTED, "files.json"])
    assert all((place / name).read_bytes() == HUB[name] for name in WANTED)
    alter(place / "model.safetensors")
    assert (get(REPOSITORY, verify=True) / "model.safetensors").read_bytes() == DATA
    monkeypatch.setenv("HF_ENDPOINT", "/nowhere")
    assert get(REPOSITORY, verify=True) == place


@pytest.mark.parametrize(
    "endpoint, name, revision, message",
    [
        ("/nowhere", REPOSITORY, "main", "HF_ENDPOINT names '/nowhere', which is neither an http address nor a folder"),
        ("ftp://host", REPOSITORY, "main", "HF_ENDPOINT names 'ftp://host', which is neither"),
        (None, "owner/absent", "main", "HF_ENDPOINT names the folder .*mirror, and in it there is no owner/absent"),
        (None, REPOSITORY, "v2", "is one revision of owner/model-1.0, which it does not name: got 'v2'"),
    ],
)
def test_a_mirror_without_it_says_so(mirror, monkeypatch, endpoint, name, revision, message):
    if endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(UserError, match=message):
        get(name, revision)


INDEX = b'{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}'
LACKING = [
    ({"model.safetensors": b"x"}, "config.json is missing"),
    ({"config.json": b"{}"}, r"weights \(\*.safetensors or pytorch_model\*.bin\) are missing"),
    (
        {"config.json": b"{}", "model-1-of-2.safetensors": b"x", "model.safetensors.index.json": INDEX},
        "model-2-of-2.safetensors is missing",
    ),
    (
        {"config.json": b"{}", "model-1-of-2.safetensors": b"x", "model.safetensors.index.json": b"[]"},
        "model.safetensors.index.json is not an index of weights",
    ),
]


@pytest.mark.parametrize("contents, problem", LACKING)
def test_a_copy_that_lacks_something_says_what(mirror, data, monkeypatch, contents, problem):
    write(mirror / "owner" / "half", contents)
    with pytest.raises(UserError, match=f"mirror/owner/half: {problem}"):
        get("owner/half")
    write(data / "owner" / "half", contents)
    assert find("owner/half") is None
    with pytest.raises(UserError, match=f"data/owner/half is not owner/half as it should be: {problem}"):
        get("owner/half")


def test_a_copy_in_the_data_folder_is_used_where_it_is(hub, data, cache):
    write(data / REPOSITORY, HUB)
    assert get(REPOSITORY) == get(REPOSITORY, verify=True) == find(REPOSITORY) == data / REPOSITORY
    assert hub.asked == []
    assert not cache.exists()


def test_a_downloaded_folder_may_be_moved_to_the_data_folder(hub, data):
    (data / "owner").mkdir()
    moved = get(REPOSITORY).rename(data / REPOSITORY)
    assert get(REPOSITORY, verify=True) == moved
    alter(moved / "model.safetensors")
    assert get(REPOSITORY) == moved
    with pytest.raises(UserError, match="model.safetensors has SHA-256"):
        get(REPOSITORY, verify=True)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_the_mirror_cannot_give_never_gets_its_name(mirror, monkeypatch, name):
    original = registry._measured

    def measured(path):
        size, digest = original(path)
        return size, digest if path.name != name else "0" * 64

    monkeypatch.setattr(registry, "_measured", measured)
    with pytest.raises(UserError, match=f"the copy of .*{name} has SHA-256"):
        get(REPOSITORY)
    assert find(REPOSITORY) is None
    assert name not in files_in(folder(REPOSITORY))

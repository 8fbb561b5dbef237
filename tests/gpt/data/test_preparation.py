"""Preparing a corpus: the same bytes whoever encodes it and however often that is interrupted, in constant memory."""

import errno
import gzip
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt import cli, tokenizers
from gpt.data import WindowLoader, cuts, documents, loader, open_tokens, parts, preparation, prepare, text
from gpt.data.permutation import permutation
from gpt.data.progress import Bar, Lines, Progress
from gpt.errors import UserError
from reference.torch_rng import Generator

ROOT = Path(__file__).parents[3]
BYTES = tokenizers.load("bytes")
END = "<|endoftext|>"
needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary"
)


def write(folder, **files):
    """Files of text, of JSON lines where they are given a list, gzipped where the name says so; "__" is a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, list):
            content = "".join(json.dumps({"id": i, "text": each}) + "\n" for i, each in enumerate(content))
        data = content.encode()
        path = folder / name.replace("__", ".")
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return folder


def expected(documents, tokenizer):
    """The rule: each document's own tokens, the end token between two that have any."""
    encoded = [ids for ids in map(tokenizer.encode, documents) if ids]
    return list(itertools.chain(*(([tokenizer.eot] if i else []) + ids for i, ids in enumerate(encoded))))


DOCUMENTS = st.text(
    st.one_of(st.sampled_from(" \n\t'abs1,.-\u00a0☃é"), st.sampled_from("the gift  "), st.characters(codec="utf-8")),
    max_size=60,
)


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=needs_gpt2), "bytes", "simple-v2"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    texts=st.lists(DOCUMENTS, min_size=1, max_size=4),
    lines=st.lists(DOCUMENTS, max_size=8),
    zipped=st.lists(DOCUMENTS, max_size=3),
    length=st.integers(1, 80),
    piece=st.integers(1, 40),
    seed=st.one_of(st.none(), st.integers(0, 99)),
)
def test_whatever_the_parts_the_tokens_are_the_documents(tmp_path, name, texts, lines, zipped, length, piece, seed):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    write(folder, c__jsonl=lines, d__jsonl__gz=zipped, **{f"a{i}__txt": each for i, each in enumerate(texts)})
    documents = [*(each.removeprefix("\ufeff") for each in texts), *lines, *zipped]
    tokenizer = tokenizers.load(name, " ".join(documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "LENGTH", length)
        patch.setattr(cuts, "PIECE", piece)
        if not any(map(tokenizer.encode, documents)):
            with pytest.raises(UserError, match="there is no text to encode"):
                prepare(folder, folder / "out", tokenizer, seed=seed)
            assert not list(folder.glob("out*"))
            return
        made = prepare(folder, folder / "out", tokenizer, seed=seed)
    if seed is not None:
        documents = [each for each in documents if tokenizer.encode(each)]
        documents = [documents[row] for row in permutation(len(documents), seed)(np.arange(len(documents)))]
    assert made.ids.tolist() == expected(documents, tokenizer)
    names = [f"a{i}.txt" for i in range(len(texts))] + ["c.jsonl", "d.jsonl.gz"]
    assert [source.name for source in made.sources] == names
    assert all(source.sha256 == sha256(folder / source.name) for source in made.sources)
    assert all(source.bytes == (folder / source.name).stat().st_size for source in made.sources)
    assert not list(folder.glob("out.parts"))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def corpus(tmp_path):
    """Two long texts, many short ones, and JSON lines: some 300 KB."""
    words = [f"word{i * i % 97}, then {i}." for i in range(12_000)]
    folder = write(tmp_path / "corpus", a__txt=" ".join(words), b__txt="\n".join(reversed(words[:3000])), empty__txt="")
    write(folder, lines__jsonl=[" ".join(words[i : i + 7 + i % 50]) for i in range(0, 4000, 31)])
    for i in range(20):
        write(folder / "more", **{f"{i:02}__txt": " ".join(words[i::500])})
    return folder


@pytest.mark.parametrize("seed", [None, 3])
def test_the_result_does_not_depend_on_the_processes_or_the_parts(corpus, tmp_path, monkeypatch, seed):
    whole = prepare(corpus, tmp_path / "whole", BYTES, seed=seed)
    monkeypatch.setattr(parts, "LENGTH", 20_000)
    for processes in (1, 2, 3):
        made = prepare(corpus, tmp_path / f"by{processes}", BYTES, processes=processes, seed=seed)
        assert made.path.read_bytes() == whole.path.read_bytes()


@needs_gpt2
def test_one_long_text_is_encoded_by_several_processes(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "LENGTH", 50_000)
    tokenizer = tokenizers.load("gpt2")
    made = prepare(corpus / "a.txt", tmp_path / "out", tokenizer, processes=2)
    assert made.ids.tolist() == tokenizer.encode((corpus / "a.txt").read_text())


def test_a_seed_changes_the_order_of_the_documents_and_nothing_else(corpus, tmp_path):
    def documents(seed):
        return BYTES.decode(prepare(corpus, tmp_path / "out", BYTES, seed=seed).ids).split(END)

    first, again, other, kept = documents(1), documents(1), documents(2), documents(None)
    assert first == again
    assert len({tuple(order) for order in (first, other, kept)}) == 3
    assert sorted(first) == sorted(other) == sorted(kept)


def test_files_come_in_the_order_given_and_folders_in_that_of_their_paths(tmp_path):
    write(tmp_path / "x", b__txt="two", a__txt="one", empty__txt="", other__md="no")
    write(tmp_path / "x" / "sub", c__txt="3")
    write(tmp_path, last__log="4")
    opened = prepare([tmp_path / "last.log", tmp_path / "x"], tmp_path / "out", BYTES)
    assert BYTES.decode(opened.ids) == END.join(["4", "one", "two", "3"])
    assert [source.name for source in opened.sources] == [
        "last.log",
        "x/a.txt",
        "x/b.txt",
        "x/empty.txt",
        "x/sub/c.txt",
    ]
    assert BYTES.decode(prepare(tmp_path / "x", tmp_path / "out", BYTES, "*.md").ids) == "no"
    with pytest.raises(UserError, match=r"holds no file that matches '\*.rst'"):
        prepare(tmp_path / "x", tmp_path / "out", BYTES, "*.rst")


def test_the_token_file_and_its_parts_are_no_sources(tmp_path):
    write(tmp_path, a__txt="one", out="two")
    write(tmp_path / "out.parts", b__txt="three")
    assert BYTES.decode(prepare(tmp_path, tmp_path / "out", BYTES, "*").ids) == "one"


def test_a_tokenizer_without_end_token_takes_one_text_alone(tmp_path):
    write(tmp_path, a__txt="one two", b__txt="two one")
    tokenizer = tokenizers.load("simple-v1", "one two")
    assert prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer).ids.tolist() == tokenizer.encode("one two")
    with pytest.raises(UserError, match="simple-v1 has no end token to separate 2 documents with"):
        prepare(tmp_path, tmp_path / "out", tokenizer)
    write(tmp_path, c__jsonl=["one", "two"])
    with pytest.raises(UserError, match=r"no end token to separate the lines of .*c\.jsonl with"):
        prepare(tmp_path / "c.jsonl", tmp_path / "out", tokenizer)


def test_the_end_token_in_a_text_is_text(tmp_path):
    write(tmp_path, a__txt=f"a{END}b", b__jsonl=[f"{END}"])
    assert prepare(tmp_path, tmp_path / "out", BYTES).ids.tolist().count(BYTES.eot) == 1


@pytest.mark.parametrize("length", [4, 1 << 20])
@pytest.mark.parametrize("ending", ["txt", "txt.gz"])
def test_a_byte_order_mark_before_a_text_is_none_of_it(tmp_path, monkeypatch, length, ending):
    monkeypatch.setattr(parts, "LENGTH", length)
    write(tmp_path, **{f"a__{ending.replace('.', '__')}": "\ufeffone and \ufefftwo"})
    assert BYTES.decode(prepare(tmp_path, tmp_path / "out", BYTES).ids) == "one and \ufefftwo"


def test_json_lines_may_have_a_byte_order_mark_blank_lines_and_any_line_end(tmp_path):
    write(
        tmp_path,
        a__jsonl='\ufeff{"body": "one"}\r\n\n  \n{"body": "two \\u2603", "text": 1}\n{"body": ""}\n{"body": "3"}',
    )
    opened = prepare(tmp_path / "a.jsonl", tmp_path / "out", BYTES, field="body")
    assert BYTES.decode(opened.ids) == END.join(["one", "two ☃", "3"])


# ---------------------------------------------------------------- interrupted

PREPARE = """
import sys
from gpt.data import parts
parts.LENGTH = {length}
from gpt.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(arguments, length=2000, **environment):
    """The command in a process of its own, with parts of that length."""
    command = [sys.executable, "-c", PREPARE.format(length=length), "data", "prepare", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def processes_with(variable):
    """Ids of the processes whose environment holds this."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if variable.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_was_killed_goes_on_and_gives_the_same_bytes(corpus, tmp_path, monkeypatch, processes, how):
    whole = prepare(corpus, tmp_path / "whole", BYTES, seed=1).path.read_bytes()
    out, folder = tmp_path / "out", tmp_path / "out.parts"
    mark = f"TWINGRAD_TEST_MARK={tmp_path}"
    running = start(
        [corpus, "--out", out, "--tokenizer", "bytes", "--processes", processes, "--seed", 1],
        TWINGRAD_TEST_MARK=str(tmp_path),
    )
    wait_for(lambda: len(list(folder.glob("*.part"))) >= 10 or running.poll() is not None)
    assert running.poll() is None
    running.send_signal(how)
    error = running.communicate()[1]
    assert running.returncode == (-how if how == signal.SIGKILL else 130), error
    assert "Traceback" not in error
    wait_for(lambda: not processes_with(mark))  # workers whose owner is gone end
    assert not out.exists()
    kept = sorted(folder.glob("*.part"))
    assert len(kept) >= 10
    damaged = bytearray(kept[0].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    kept[0].write_bytes(damaged)
    kept[1].write_bytes(kept[1].read_bytes()[:-3])
    progress = Progress()
    monkeypatch.setattr(parts, "LENGTH", 2000)
    made = prepare(corpus, out, BYTES, seed=1, progress=progress)
    assert made.path.read_bytes() == whole
    assert 8 * 2000 <= progress.kept < progress.done == progress.total
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out", "whole"]


def test_a_part_is_kept_only_for_what_it_was_made_of(corpus, tmp_path, monkeypatch):
    """After a failure: the parts of files that have not changed are there, those of one that has are made again."""
    monkeypatch.setattr(parts, "LENGTH", 2000)
    broken = corpus / "zz.txt"
    broken.write_bytes(b"good, but \xff")
    for _ in range(2):
        with pytest.raises(UserError, match=r"zz\.txt is not UTF-8: byte 10$"):
            prepare(corpus, tmp_path / "out", BYTES)
    (corpus / "b.txt").write_text("another text")
    broken.write_bytes(b"good, and good")
    progress = Progress()
    made = prepare(corpus, tmp_path / "out", BYTES, progress=progress)
    assert 0 < progress.kept < progress.total
    monkeypatch.setattr(parts, "LENGTH", 1 << 24)
    assert made.path.read_bytes() == prepare(corpus, tmp_path / "again", BYTES).path.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_worker_that_is_killed_is_one_line_and_its_parts_are_kept(corpus, tmp_path):
    mark = f"TWINGRAD_TEST_MARK={tmp_path}"
    arguments = [corpus, "--out", tmp_path / "out", "--tokenizer", "bytes", "--processes", 2]
    running = start(arguments, TWINGRAD_TEST_MARK=str(tmp_path))
    wait_for(lambda: len(list(tmp_path.glob("out.parts/*.part"))) >= 5 or running.poll() is not None)
    worker = next(each for each in processes_with(mark) if each != running.pid)
    os.kill(worker, signal.SIGKILL)
    error = running.communicate()[1]
    assert running.returncode == 2
    assert error.startswith("error: a process that encodes was ended by signal 9")
    assert error.count("\n") == 1
    assert len(list(tmp_path.glob("out.parts/*.part"))) >= 5
    assert start(arguments).wait() == 0


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    write(tmp_path, a__txt="one two")
    planned = parts.plan([(tmp_path / "a.txt", "a.txt")])
    (tmp_path / "a.txt").write_text("one two three")
    monkeypatch.setattr(preparation, "plan", lambda files: planned)
    with pytest.raises(UserError, match=r"a\.txt has changed while it was read: run again"):
        prepare(tmp_path / "a.txt", tmp_path / "out", BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


# ---------------------------------------------------------------- bad input


BAD_LINES = {
    '{"title": "x", "txt": "y"}': r"there is no field 'text', its fields are: 'title', 'txt'; did you mean txt\?",
    "{}": "there is no field 'text', its fields are: none",
    '{"text": "x"': r"not JSON: Expecting ',' delimiter, column 13",
    '{"text": 3}': "field 'text': expected text, got a number",
    '{"text": null}': "field 'text': expected text, got null",
    '["text"]': "expected an object with the field 'text', got a list",
    '"text"': "expected an object with the field 'text', got text",
    '{"text": "a\\ud800"}': r"field 'text' holds the lone surrogate U\+D800",
    "[" * 100_000: "not JSON that can be read: ",
    '{"text": "' + "1" * 10 + '", "n": ' + "1" * 5000 + "}": "not JSON that can be read: ",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_wherever_it_is(tmp_path, monkeypatch, line):
    good = '{"text": "one"}\n'
    (tmp_path / "a.jsonl").write_text(good * 50 + "\n" + line + "\n" + good)
    monkeypatch.setattr(parts, "LENGTH", 100)
    with pytest.raises(UserError, match=rf"a\.jsonl, line 52: {BAD_LINES[line]}") as error:
        prepare(tmp_path / "a.jsonl", tmp_path / "out", BYTES)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_of_several_mistakes_the_first_is_named_by_any_number_of_processes(tmp_path, monkeypatch):
    good = '{"text": "one"}\n'
    (tmp_path / "a.jsonl").write_text(good * 50 + "{}\n" + good * 50 + "[]\n")
    monkeypatch.setattr(parts, "LENGTH", 100)
    for processes in (1, 2, 3):
        with pytest.raises(UserError, match=r"a\.jsonl, line 51: there is no field 'text'"):
            prepare(tmp_path / "a.jsonl", tmp_path / "out", BYTES, processes=processes)


@pytest.mark.parametrize("length", [10, 1 << 24])
def test_a_byte_that_is_not_utf8_is_named_by_its_place_in_the_file(tmp_path, monkeypatch, length):
    monkeypatch.setattr(parts, "LENGTH", length)
    (tmp_path / "a.txt").write_bytes(b"four" * 10 + b" words and then \xe9 ends")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8: byte 56$"):
        prepare(tmp_path / "a.txt", tmp_path / "out", BYTES)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' * 5 + b'{"text": "\xe9"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 6: not UTF-8: byte 80 of the file$"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", BYTES)


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "flipped"])
def test_a_damaged_archive_is_named(tmp_path, damage):
    data = gzip.compress(os.urandom(4000))
    data = {"truncated": data[:-1000], "not gzip": b"text", "flipped": data[:-6] + b"xx" + data[-4:]}[damage]
    (tmp_path / "a.txt.gz").write_bytes(data)
    with pytest.raises(UserError, match=r"cannot read .*a\.txt\.gz: ") as error:
        prepare(tmp_path / "a.txt.gz", tmp_path / "out", BYTES)
    assert "\n" not in str(error.value)


def test_a_line_longer_than_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 16)
    monkeypatch.setattr(documents, "BLOCK", 16)
    monkeypatch.setattr(documents, "LONGEST_LINE", 100)
    write(tmp_path, a__jsonl=["x" * 200])
    with pytest.raises(UserError, match=r"a\.jsonl has a line of more than 100 bytes"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", BYTES)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("nowhere --out out", "nowhere: no such file or folder"),
        ("empty --out out", "empty holds no file that matches '*.txt' or '*.txt.gz' or '*.jsonl' or '*.jsonl.gz'"),
        ("a.txt", "the following arguments are required: --out"),
        ("a.txt --out out --tokenizer gpt3", "unknown tokenizer 'gpt3'"),
        ("a.txt --out a.txt --tokenizer bytes", "--out: a.txt exists already"),
        ("a.txt --out out --tokenizer bytes --processes 0", "--processes: expected at least 1, got 0"),
        ("a.txt --out out --tokenizer bytes --seed x", "argument --seed: invalid int value: 'x'"),
        ("a.txt --out out --tokenizer bytes --field body", "--field body: there are no JSON lines"),
        ("a.jsonl --out out --tokenizer bytes --field tex", "a.jsonl, line 1: there is no field 'tex'"),
        ("blank.txt --out out --tokenizer bytes", "blank.txt: there is no text to encode"),
        ("a.txt --out a.txt/out --tokenizer bytes", "cannot write "),
        (
            "a.txt --out out --tokenizer bytes --feild x",
            "twingrad data prepare has no option --feild; did you mean --field",
        ),
    ],
)
def test_bad_arguments_get_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    write(tmp_path, a__txt="x", blank__txt="", a__jsonl=["x"])
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "prepare", *arguments.split()]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert shown.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_failed_preparation_leaves_what_was_there(tmp_path):
    write(tmp_path, a__txt="good")
    prepare(tmp_path / "a.txt", tmp_path / "out.tokens", BYTES)
    (tmp_path / "b.txt").write_bytes(b"bad \xff")
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8: byte 4"):
        prepare(tmp_path, tmp_path / "out.tokens", BYTES)
    assert BYTES.decode(open_tokens(tmp_path / "out.tokens").ids) == "good"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "out.tokens"]


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path, a__txt="text")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        prepare(tmp_path / "a.txt", tmp_path / "out", BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_worker_that_cannot_write_says_so(corpus, tmp_path):
    arguments = [corpus, "--out", tmp_path / "out", "--tokenizer", "bytes", "--processes", "2"]
    quoted = " ".join(f"'{each}'" for each in arguments)
    command = f"ulimit -f 20; exec '{sys.executable}' -c \"{PREPARE.format(length=50_000)}\" data prepare {quoted}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write ")
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


# ---------------------------------------------------------------- memory and progress


@pytest.mark.parametrize("seed", [None, 1])
def test_a_corpus_is_prepared_in_bounded_memory(tmp_path, monkeypatch, seed):
    """Eight times as much text needs no more memory, and far less than its tokens take."""
    monkeypatch.setattr(text, "BLOCK", 1 << 12)
    monkeypatch.setattr(loader, "PIECE", 1 << 12)
    monkeypatch.setattr(cuts, "PIECE", 1 << 12)
    monkeypatch.setattr(cuts, "WINDOW", 1 << 12)
    monkeypatch.setattr(parts, "LENGTH", 1 << 15)
    monkeypatch.setattr(parts, "_BLOCK", 1 << 12)
    monkeypatch.setattr(parts, "_TOGETHER", 1 << 10)
    peaks = []
    for repeats in (5_000, 40_000):
        folder = write(tmp_path / str(repeats), a__txt="ten letters " * repeats)
        write(folder, b__jsonl=["ten letters " * 50] * (repeats // 50))
        tracemalloc.start()
        opened = prepare(folder, folder / "out", BYTES, seed=seed)
        batches = iter(WindowLoader(opened.ids, 4, 16, 1024, True, False, Generator(0), opened.n_vocab))
        assert next(batches).inputs.shape == (4, 16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(opened.ids) == 24 * repeats + repeats // 50
    assert peaks[1] < 1.3 * peaks[0] < 24 * 40_000 / 2


def test_progress_says_how_far_how_fast_and_how_long(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gpt.data.progress.SECONDS", 0.0)
    monkeypatch.setattr(parts, "LENGTH", 50_000)
    progress = Lines()
    prepare(corpus, tmp_path / "out", BYTES, processes=2, progress=progress)
    lines = capsys.readouterr().out.splitlines()
    pattern = r"\d+ of \d+ MB, \d+\.\d MB/s, [\d,]+ tokens/s, 0:0\d:\d\d left"
    assert all(re.fullmatch(pattern, line) for line in lines[1:])
    assert len(lines) > 5
    assert progress.done == progress.total == sum(p.stat().st_size for p in corpus.rglob("*") if p.is_file())
    end_tokens = progress.tokens - len(open_tokens(tmp_path / "out").ids)
    assert end_tokens < 0  # which stand between documents, and are nobody's tokens


def test_a_terminal_gets_a_bar(corpus, tmp_path):
    from rich.console import Console

    with open(tmp_path / "screen", "w+", encoding="utf-8") as screen:
        prepare(corpus, tmp_path / "out", BYTES, progress=Bar(Console(file=screen, force_terminal=True, width=120)))
        screen.seek(0)
        shown = screen.read()
    assert "tokens/s" in shown
    assert "left" in shown


def test_a_file_that_changes_after_its_parts_were_made_is_refused(corpus):
    """Its tokens would be of the old text, its digest of the new."""
    path = corpus / "a.txt"
    [part] = documents.ranges(path, "a.txt", 1 << 30)
    assert documents.digest(part) == sha256(path)
    path.write_text("another text")
    with pytest.raises(UserError, match=r"a\.txt has changed while it was read: run again"):
        documents.digest(part)


def test_two_that_write_the_same_file_are_not_both_begun(corpus, monkeypatch):
    begun = preparation.make_parts

    def again(*arguments):
        with pytest.raises(UserError, match="out: another preparation is writing it"):
            prepare(corpus, corpus / "out", tokenizers.load("bytes"))
        begun(*arguments)

    monkeypatch.setattr(preparation, "make_parts", again)
    first = prepare(corpus, corpus / "out", tokenizers.load("bytes"))
    monkeypatch.undo()
    assert np.array_equal(first.ids, prepare(corpus, corpus / "out2", tokenizers.load("bytes")).ids)
    assert not list(corpus.glob("*.parts"))


@pytest.mark.parametrize("pattern", ["/etc/*", "nowhere.txt"])
def test_a_folder_s_files_that_cannot_be_read_are_not_left_out(corpus, pattern):
    if pattern.startswith("/"):
        message = "pattern: expected one of names in"
    else:
        (corpus / pattern).symlink_to("what is not there")
        message = "nowhere.txt: a link to what is not there"
    with pytest.raises(UserError, match=message):
        prepare(corpus, corpus / "out", tokenizers.load("bytes"), pattern if pattern.startswith("/") else None)


def test_a_folder_that_cannot_be_listed_is_an_error(corpus, monkeypatch):
    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", f"{top}/private"))
        return iter(())

    monkeypatch.setattr(documents.os, "walk", walk)  # root may read all
    with pytest.raises(UserError, match="private: cannot be read: Permission denied"):
        prepare(corpus, corpus / "out", tokenizers.load("bytes"))

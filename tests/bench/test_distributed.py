"""The benchmark of shared steps runs, and writes what it measured."""

import json

import pytest

from bench import __main__ as bench
from bench import distributed
from gpt.errors import UserError

pytest.importorskip("torch")


def test_shared_steps_are_timed_against_those_of_one_process(tmp_path, monkeypatch, capsys):
    tiny = distributed.Case("bytes-tiny", batch=2, length=16, rounds=3, steps=2)
    monkeypatch.setitem(distributed.CASES, "bytes-tiny", tiny)
    out = tmp_path / "distributed.json"
    assert bench.main(["distributed", "bytes-tiny", "--rounds", "2", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    case = document["cases"]["bytes-tiny"]
    assert document["kind"] == "distributed"
    assert [len(case["seconds"][who]) for who in ("one", "shared")] == [2, 2]
    assert 0 < case["throughput_ratio_quartiles"][0] <= case["throughput_ratio"]
    assert "bytes-tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["gpt5"], "'gpt5' is not one of bytes-small, gpt2-small, gpt2-small-1024"),
        (["--processes", "1"], "processes: expected at least 2, got 1"),
        (["--rounds", "0"], "rounds: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_one_line(words, complaint, capsys):
    assert bench.main(["distributed", *words]) == 2
    assert capsys.readouterr().err == f"error: {complaint}\n"


def test_a_process_that_dies_is_one_line_at_once_and_leaves_none_behind(monkeypatch):
    tiny = distributed.Case("bytes-tiny", batch=2, length=16, rounds=3, steps=1)
    workers = distributed.Workers(tiny, 2, 1, "ddp")
    workers.processes[1].kill()
    with pytest.raises(UserError, match="process 1 ended early with status -9"):
        workers.step()
    workers.close()
    assert all(process.returncode is not None for process in workers.processes)

"""The benchmark of preparing token files runs, and its figures are those of the same corpus."""

import json
import os

import pytest

from bench import __main__ as bench
from bench import data
from gpt.data import parts


def test_preparing_is_timed_against_tiktoken(tmp_path, monkeypatch, capsys):
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs GPT-2's BPE files in TIKTOKEN_CACHE_DIR")
    monkeypatch.setattr(parts, "LENGTH", 1 << 16)
    monkeypatch.setattr(data, "cores", lambda: 2)
    out = tmp_path / "data.json"
    assert bench.main(["data", "--megabytes", "0.3", "--rounds", "1", "--out", str(out)]) == 0
    assert "JSON lines" in capsys.readouterr().out
    document = json.loads(out.read_text())
    assert document["kind"] == "data"
    assert document["cases"]["bytes"] >= 300_000
    for rates in document["cases"]["kinds"].values():
        assert set(rates["processes"]) == {"1", "2"}
        for n, figures in rates["processes"].items():
            assert figures["share"] == pytest.approx(
                figures["bytes_per_s"] / int(n) / rates["tiktoken_bytes_per_s"], rel=1e-9
            )


@pytest.mark.parametrize("size", ["-1", "0", "nan", "inf"])
def test_a_corpus_of_no_size_is_refused(size, capsys):
    assert bench.main(["data", "--megabytes", size]) == 2
    assert f"megabytes: expected 0.001 to 10000, got {float(size)}" in capsys.readouterr().err

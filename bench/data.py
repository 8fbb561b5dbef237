"""Preparing token files: MB of text a second for each process, against tiktoken's own encoding by one thread.

The corpus is the source of Python's standard library, in documents of a few KiB, as one long text and as JSON lines.
tiktoken encodes the same text in this process, document by document or MiB by MiB, and writes nothing. Rounds go in
turns, so that a machine that slows down slows all. To start the processes counts as well.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench import results
from bench.contest import show_table
from bench.cpu import check_counts
from gpt import tokenizers
from gpt.data import parts, prepare
from gpt.data.catalogue import standard_library
from gpt.data.workers import cores
from gpt.errors import UserError

TARGET = 0.8  # of tiktoken's rate, for each process
MEGABYTES, ROUNDS = 64, 5
MOST = 10_000  # megabytes, which are held in memory
DOCUMENT = 4000  # characters


def corpus(folder: Path, size: int) -> tuple[dict[str, Path], list[str]]:
    """A file of each kind with about so many bytes of text, and the documents of the JSON lines."""
    library = standard_library(size)
    text = (library * (size // len(library) + 1))[:size]
    documents = [text[i : i + DOCUMENT] for i in range(0, len(text), DOCUMENT)]
    paths = {"text": folder / "a.txt", "JSON lines": folder / "a.jsonl"}
    paths["text"].write_text(text, encoding="utf-8")
    with open(paths["JSON lines"], "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    return paths, documents


def measure(megabytes: float, rounds: int, counts: Sequence[int]) -> dict[str, Any]:
    """Rates in bytes of text a second, medians of the rounds, and each process's share of tiktoken's rate."""
    tokenizer = tokenizers.load("gpt2")
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths, documents = corpus(folder, int(megabytes * 1e6))
        size = sum(len(document.encode()) for document in documents)
        whole = "".join(documents)
        pieces = [whole[i : i + (1 << 20)] for i in range(0, len(whole), 1 << 20)]
        encoded = {"text": pieces, "JSON lines": documents}
        kinds: dict[str, Any] = {}
        for kind, path in paths.items():
            calls: dict[str, Callable[[], Any]] = {
                "tiktoken": lambda kind=kind: [encoding.encode_ordinary(each) for each in encoded[kind]]  # type: ignore[misc]
            }
            for n in counts:
                calls[str(n)] = lambda path=path, n=n: prepare(path, folder / "out", tokenizer, processes=n)  # type: ignore[misc]
            rates: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    begun = time.perf_counter()
                    call()
                    rates[name].append(size / (time.perf_counter() - begun))
            shares = {n: [r / n / t for r, t in zip(rates[str(n)], rates["tiktoken"], strict=True)] for n in counts}
            kinds[kind] = {
                "tiktoken_bytes_per_s": median(rates["tiktoken"]),
                "processes": {
                    str(n): {
                        "bytes_per_s": median(rates[str(n)]),
                        "share": median(shares[n]),
                        "share_quartiles": quantiles(shares[n], n=4, method="inclusive")[::2]
                        if rounds > 1
                        else shares[n] * 2,
                    }
                    for n in counts
                },
            }
    return {"bytes": size, "rounds": rounds, "part_bytes": parts.LENGTH, "target": TARGET, "kinds": kinds}


def main(megabytes: float | None, rounds: int | None, out: Path | None) -> int:
    """Measure with one process and with as many as there are cores, print the table, write JSON."""
    check_counts(None, rounds)
    megabytes = MEGABYTES if megabytes is None else megabytes
    if not 1e-3 <= megabytes <= MOST:
        raise UserError(f"megabytes: expected 0.001 to {MOST}, got {megabytes}")
    measured = measure(megabytes, rounds or ROUNDS, sorted({1, cores()}))
    show_table(*rows_of(measured))
    if out:
        results.write(out, "data", measured)
    return 0


def rows_of(measured: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A table: for each kind of file and number of processes rates, and what a process does of tiktoken's alone."""
    rows = []
    for kind, rates in measured["kinds"].items():
        alone = f"{rates['tiktoken_bytes_per_s'] / 1e6:.1f}"
        for n, figures in rates["processes"].items():
            low, high = figures["share_quartiles"]
            met = "met" if figures["share"] >= measured["target"] else "missed"
            share = f"{figures['share']:.2f} [{low:.2f}, {high:.2f}]"
            ours = f"{figures['bytes_per_s'] / 1e6:.1f}"
            rows.append([kind, n, alone, ours, share, f"{measured['target']:.2f}: {met}"])
    return ["files of", "processes", "tiktoken alone, MB/s", "prepare, MB/s", "a process / tiktoken", "at least"], rows

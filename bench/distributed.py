"""A training step shared by processes of one thread each, against one process with all threads.

Both are PyTorch eager on this CPU and take the same steps (forward, backward, clip, AdamW) on the same batches, in
turns of some steps in a row (see worker.in_a_row), so that a machine that slows down slows both. A shared step ends
when its last process ends. What counts is the median, over the rounds, of how many tokens a second the processes
together do of those that the one does.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import numpy as np

from bench import results
from bench.contest import show_table
from bench.cpu import check_counts
from gpt.errors import UserError, check_installed
from reference.config import PRESETS

TARGET = 0.9  # of the throughput of one process with as many threads


@dataclass(frozen=True)
class Case:
    """A model, the batch that a step shares, and how many rounds are timed."""

    preset: str
    batch: int
    length: int
    rounds: int
    steps: int  # in a row, after one that is not timed where there are several


CASES = {
    "bytes-small": Case("bytes-small", batch=16, length=128, rounds=15, steps=4),
    # What a step costs beside its tokens, adding up 124M gradients and two whole updates, weighs less the longer it is.
    "gpt2-small": Case("gpt2-small", batch=4, length=256, rounds=11, steps=1),
    "gpt2-small-1024": Case("gpt2-small", batch=2, length=1024, rounds=9, steps=1),
}


class Workers:
    """Processes that share their steps, or one that has its own, with some threads each."""

    def __init__(self, case: Case, processes: int, threads: int, parallel: str) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "CUDA_VISIBLE_DEVICES": "",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.distributed", json.dumps([asdict(case), parallel])],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C reaches their owner alone, which ends them
            )
            for rank in range(processes)
        ]
        try:
            self.hear()
        except BaseException:
            self.close()
            raise

    def step(self) -> float:
        """Have them take their steps in a row; the seconds of one, of the process that took longest."""
        for process in self.processes:
            assert process.stdin
            with contextlib.suppress(BrokenPipeError):  # whoever hears nothing says why below
                print(file=process.stdin, flush=True)
        return max(self.hear())

    def hear(self) -> list[float]:
        """The next number of each. UserError as soon as one has ended, for which the others would wait."""
        lines: dict[int, str] = {}
        with selectors.DefaultSelector() as waiting:
            for rank, process in enumerate(self.processes):
                assert process.stdout
                waiting.register(process.stdout, selectors.EVENT_READ, rank)
            while len(lines) < len(self.processes):
                for key, _ in waiting.select():
                    rank = key.data
                    waiting.unregister(key.fileobj)
                    lines[rank] = self.processes[rank].stdout.readline()  # type: ignore[union-attr]
                    if not lines[rank]:
                        raise UserError(f"process {rank} ended early with status {self.processes[rank].wait()}")
        return [float(lines[rank]) for rank in range(len(lines))]

    def close(self) -> None:
        """End them, whatever they do: they leave nothing behind."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()


def measure(case: Case, processes: int = 2, parallel: str = "ddp", rounds: int | None = None) -> dict[str, Any]:
    """Seconds of each step, and the throughput of the processes as a part of that of the one."""
    rounds = rounds or case.rounds
    contestants: dict[str, Workers] = {}
    seconds: dict[str, list[float]] = {"one": [], "shared": []}
    try:
        contestants["one"] = Workers(case, 1, processes, parallel)
        contestants["shared"] = Workers(case, processes, 1, parallel)
        for _ in range(rounds):
            for name, workers in contestants.items():
                seconds[name].append(workers.step())
    finally:
        for workers in contestants.values():
            workers.close()
    ratios = [one / shared for one, shared in zip(seconds["one"], seconds["shared"], strict=True)]
    return {
        **asdict(case),
        "rounds": rounds,
        "processes": processes,
        "parallel": parallel,
        "seconds": seconds,
        "throughput_ratio": median(ratios),
        "throughput_ratio_quartiles": quantiles(ratios, n=4, method="inclusive")[::2] if rounds > 1 else ratios * 2,
        "throughput_target": TARGET,
    }


def work(case: Case, parallel: str) -> None:
    """What a worker does: a step on new random tokens, the same in each process, for every line that it reads."""
    import torch

    from gpt import world
    from gpt.engine import Batch, create_engine
    from reference.init import initialize
    from reference.philox import PhiloxNoise
    from reference.torch_rng import Generator

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config, rng = PRESETS[case.preset], np.random.default_rng(0)
    params = initialize(config, Generator(1), "gpt2")
    shared: Any = parallel if world.size() > 1 else None
    engine = create_engine("torch", config, params, device="cpu", parallel=shared)

    def step(number: int) -> float:
        tokens = rng.integers(0, config.vocab_size, (case.batch, case.length + 1))
        start = perf_counter()
        engine.accumulate(Batch(tokens[:, :-1], tokens[:, 1:]), 1.0, PhiloxNoise(0, number))
        engine.step(1e-4, max_norm=1.0)
        return perf_counter() - start

    print(step(0), flush=True)  # the first allocates memory, and connects the processes
    for number, _ in enumerate(sys.stdin):
        if case.steps > 1:
            step(number)
        print(median(step(number) for _ in range(case.steps)), flush=True)


def main(names: Sequence[str], processes: int, parallel: str, rounds: int | None, out: Path | None) -> int:
    """Measure the cases named, or all, print the table and write JSON; 0 even where a target is missed."""
    check_installed("torch", extra="torch")
    for name in names:
        if name not in CASES:
            raise UserError(f"{name!r} is not one of {', '.join(CASES)}")
    if processes < 2:
        raise UserError(f"processes: expected at least 2, got {processes}")
    check_counts(None, rounds)
    measured: dict[str, Any] = {}
    for name in names or CASES:
        measured[name] = measure(CASES[name], processes, parallel, rounds)
        if out:  # so that what ends it loses no more than one case
            results.write(out, "distributed", measured)
    show_table(*rows_of(measured))
    return 0


def rows_of(cases: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A table: milliseconds of either, and the throughput of the processes as a part of that of the one."""
    rows = []
    for name, case in cases.items():
        one, shared = (f"{1e3 * median(case['seconds'][who]):,.0f}" for who in ("one", "shared"))
        low, high = case["throughput_ratio_quartiles"]
        met = "met" if case["throughput_ratio"] >= case["throughput_target"] else "missed"
        how = f"{case['processes']} processes ({case['parallel']})"
        ratio = f"{case['throughput_ratio']:.2f} [{low:.2f}, {high:.2f}]"
        rows.append([name, how, one, shared, ratio, f"{case['throughput_target']:.2f}: {met}"])
    return ["case", "shared by", "one process, ms", "shared, ms", "throughput, shared / one", "at least"], rows


if __name__ == "__main__":
    given, how = json.loads(sys.argv[1])  # what Workers asks for
    work(Case(**given), how)

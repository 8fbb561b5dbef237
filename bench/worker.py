"""One contestant in a process of its own, so that its threads share the cores with nobody else's.

Reads a case as JSON from standard input and answers with one JSON line when all is ready; then, for each line it
reads, does the case's work, for so long that what came before has passed, and answers with the seconds that it took
once, and its parts. The end of the input ends it, with the peak of its memory, and of our engines with what of it is
their libraries' and what was planned for the rest.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from gpt import memory, parts, plan
from gpt.engine import IGNORE, Batch, Examples, OptimizerConfig, Preferences, create_engine
from gpt.generate import Sampling, Writer
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

Work = Callable[[], dict[str, float]]
LR, MAX_NORM = 1e-4, 1.0
TURN = 0.4  # seconds


def train(case: dict[str, Any]) -> Work:
    """Forward, backward, clip, AdamW on new random examples, the same for all contestants; and the loss they had.

    Contestants are our engines ("numpy", "torch", "torch compiled"), plain loops in PyTorch ("plain", "plain fused")
    and such a loop around a model of transformers ("transformers").
    """
    config, params = _model(case)
    step = (_plain if case["contestant"].partition(" ")[0] in ("plain", "transformers") else _ours)(
        case, config, params
    )
    rng = np.random.default_rng(0)
    return lambda: step(rng.integers(0, config.vocab_size, (case["batch"], case["length"] + 1)))


Step = Callable[[np.ndarray], dict[str, float]]  # tokens (B, T + 1) -> seconds and loss


def _ours(case: dict[str, Any], config: GPTConfig, params: dict[str, np.ndarray]) -> Step:
    name, _, how = case["contestant"].partition(" ")
    optimizer = OptimizerConfig(trained=tuple(case.get("trained", ())))
    engine = create_engine(name, config, params, optimizer, device="cpu", compile=how == "compiled")

    def step(tokens: np.ndarray) -> dict[str, float]:
        batch = examples(case.get("examples", "text"), tokens, config.n_outputs)
        start = perf_counter()
        loss = engine.accumulate(batch)
        computed = perf_counter()
        engine.step(LR, max_norm=MAX_NORM)
        end = perf_counter()
        return {"seconds": end - start, "gradients": computed - start, "update": end - computed, "loss": loss}

    return step


def _plain(case: dict[str, Any], config: GPTConfig, params: dict[str, np.ndarray]) -> Step:
    from bench import plain

    if case["contestant"] == "transformers":
        loop = plain.Loop(_transformers(config, params).train())
    else:
        loop = plain.Loop(plain.create(config, params), fused=case["contestant"] == "plain fused")

    def step(tokens: np.ndarray) -> dict[str, float]:
        inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
        return loop.step(inputs, targets, MAX_NORM)

    return step


def examples(kind: str, tokens: np.ndarray, n_outputs: int) -> Examples:
    """tokens (B, T + 1) as a text to learn, a class to tell from the last token, or answers, the last half of each."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    T = inputs.shape[1]
    if kind == "label":
        return Batch(inputs, np.where(np.arange(T) < T - 1, IGNORE, targets % n_outputs))
    if kind == "text":
        return Batch(inputs, targets)
    answers = np.where(np.arange(T) < T // 2, IGNORE, targets)
    return Preferences(inputs, answers, "dpo" if kind == "dpo" else "orpo", 0.1, np.full(len(inputs), -5.0 * T))


def generate(case: dict[str, Any]) -> Work:
    """The same prompt continued greedily, by an engine with a cache or without, or by transformers' `generate`."""
    config, params = _model(case)
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, case["prompt"])
    if case["contestant"] == "transformers":
        write = _transformers_writer(config, params, prompt, case["tokens"])
    else:
        name, _, uncached = case["contestant"].partition(" ")
        engine, sampling = create_engine(name, config, params, device="cpu"), Sampling(case["tokens"])

        def write() -> None:
            writer = Writer(engine, [prompt], sampling, cached=not uncached)
            while writer.running:
                writer.step()

    return _timed(write)


def _transformers_writer(
    config: GPTConfig, params: dict[str, np.ndarray], prompt: np.ndarray, tokens: int
) -> Callable[[], None]:
    import torch

    model = _transformers(config, params).eval()
    inputs = torch.from_numpy(prompt)[None]
    settings = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    mask = torch.ones_like(inputs)

    def write() -> None:
        with torch.inference_mode():
            model.generate(inputs, attention_mask=mask, **settings)

    return write


def _transformers(config: GPTConfig, params: dict[str, np.ndarray]) -> Any:
    """Its model of this architecture, with these parameters."""
    import transformers

    from gpt.weights.huggingface import save_folder
    from gpt.weights.native import SavedModel

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_folder(Path(folder) / "model", SavedModel(params, config, None))
        return transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model")


def product(case: dict[str, Any]) -> Work:
    """One (n, n) by (n, n) product in float32, by NumPy or by PyTorch on the CPU or on a GPU ("torch cuda")."""
    a, b = np.random.default_rng(0).normal(size=(2, case["n"], case["n"])).astype(np.float32)
    if case["contestant"] == "numpy":
        return _timed(lambda: a @ b)
    import torch

    device = case["contestant"].partition(" ")[2]
    x, y = (torch.from_numpy(array).to(device) for array in (a, b))

    def multiply() -> None:
        x @ y
        if device == "cuda":
            torch.cuda.synchronize()

    return _timed(multiply)


def copy(case: dict[str, Any]) -> Work:
    """A copy of `bytes` bytes by as many threads as there are cores, each its part."""
    threads = len(os.sched_getaffinity(0))
    source = np.ones(case["bytes"] // 8)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    pool = ThreadPoolExecutor(threads)  # NumPy lets other threads run while it copies
    return _timed(lambda: list(pool.map(lambda part: np.copyto(*part), parts)))


def _timed(work: Callable[[], Any]) -> Work:
    def timed() -> dict[str, float]:
        start = perf_counter()
        work()
        return {"seconds": perf_counter() - start}

    return timed


def _model(case: dict[str, Any]) -> tuple[GPTConfig, dict[str, np.ndarray]]:
    """Random weights, and the same for all: to speed, numbers are alike."""
    config = GPTConfig.from_dict(case["config"])
    return config, initialize(config, Generator(1), "gpt2")


def in_a_row(work: Work) -> dict[str, float]:
    """What the work takes where it is done again and again, as steps of training are: short work is repeated.

    After a pause caches are cold and threads asleep, and those of the contestant before may still be waiting for work
    on the core where this one's want to run; none of that belongs to a step.
    """
    first = work()
    if first["seconds"] >= TURN:
        return first
    answers, spent = list[dict[str, float]](), 0.0
    while spent < TURN:
        answers.append(work())
        spent += answers[-1]["seconds"]
    return {part: median(answer[part] for answer in answers) for part in first}


TINY = GPTConfig(64, 8, 64, 1, 1)


def without_model(case: dict[str, Any], setup: plan.Setup) -> int:
    """Bytes of this process when it has done such work on next to nothing: of the interpreter and its libraries."""
    rows, least = setup.parts if setup.apart else 1, parts.LEAST_APART
    nothing = {"config": TINY.to_dict(), "batch": rows, "length": 8, "trained": (), "examples": "text"}
    parts.LEAST_APART = 1  # as many processes as there will be
    step = train({**case, **nothing})  # which keeps them
    step()
    parts.LEAST_APART = least
    gc.collect()
    memory.return_freed()
    return used(case)


def used(case: dict[str, Any], peak: bool = False) -> int:
    """Bytes of this process, and of those that compute parts of the NumPy engine's batches."""
    if case["contestant"] == "numpy":
        return memory.together_bytes(peak) or 0
    return (memory.peak_bytes() if peak else memory.used_bytes()) or 0


def planned(case: dict[str, Any]) -> plan.Setup:
    """What gpt/plan.py is to be asked about it."""
    engine, trained = case["contestant"], tuple(case.get("trained", ()))
    config = GPTConfig.from_dict(case["config"])
    return plan.Setup(config, case["batch"], case["length"], engine, trained=trained, cores=parts.threads())


WORK = {"train": train, "generate": generate, "product": product, "copy": copy}


def main() -> None:
    case = json.loads(sys.stdin.readline())
    last: dict[str, int] = {}
    if case["work"] == "train" and case["contestant"] in plan.BLOCK and case.get("examples", "text") == "text":
        setup = planned(case)
        last = {"libraries_bytes": without_model(case, setup), "planned_bytes": plan.memory(setup).peak}
    work = WORK[case["work"]](case)
    # The first time allocates memory, a training step its gradients and the optimizer's.
    first = work() if case.get("warm_up", True) else {}
    print(json.dumps(first), flush=True)
    for _ in sys.stdin:
        print(json.dumps(in_a_row(work)), flush=True)
    print(json.dumps({"peak_bytes": used(case, peak=True), **last}), flush=True)


if __name__ == "__main__":
    main()

"""One engine in a process of its own, so that its threads share the cores with nobody else's.

Reads a case as JSON from standard input and answers with one JSON line when the model is ready; then, for each line it
reads, does the case's work once and answers with the seconds of its parts. The end of the input ends it, with the peak
of its memory.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from gpt.engine import IGNORE, Batch, Examples, OptimizerConfig, Preferences, create_engine
from gpt.generate import Sampling, Writer
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

Work = Callable[[], dict[str, float]]


def training_step(case: dict[str, Any], config: GPTConfig, params: dict[str, np.ndarray]) -> Work:
    """Forward, backward, clip, AdamW on new random examples."""
    optimizer = OptimizerConfig(trained=tuple(case.get("trained", ())))
    engine = create_engine(case["engine"], config, params, optimizer, device="cpu")
    rng = np.random.default_rng(0)

    def step() -> dict[str, float]:
        tokens = rng.integers(0, config.vocab_size, (case["batch"], case["length"] + 1))
        batch = examples(case.get("examples", "text"), tokens, config.n_outputs)
        start = perf_counter()
        engine.accumulate(batch)
        computed = perf_counter()
        engine.step(1e-4, max_norm=1.0)
        end = perf_counter()
        return {"step": end - start, "gradients": computed - start, "update": end - computed}

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


def generation(case: dict[str, Any], config: GPTConfig, params: dict[str, np.ndarray]) -> Work:
    """The same prompt continued greedily, by an engine with a cache or without, or by transformers' `generate`."""
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, case["prompt"])
    if case["engine"] == "transformers":
        write = _transformers(config, params, prompt, case["tokens"])
    else:
        name, _, uncached = case["engine"].partition(" ")
        engine, sampling = create_engine(name, config, params, device="cpu"), Sampling(case["tokens"])

        def write() -> None:
            writer = Writer(engine, [prompt], sampling, cached=not uncached)
            while writer.running:
                writer.step()

    def generate() -> dict[str, float]:
        start = perf_counter()
        write()
        return {"seconds": perf_counter() - start}

    return generate


def _transformers(
    config: GPTConfig, params: dict[str, np.ndarray], prompt: np.ndarray, tokens: int
) -> Callable[[], None]:
    import tempfile
    from pathlib import Path

    import torch
    import transformers

    from gpt.weights.huggingface import save_folder
    from gpt.weights.native import SavedModel

    with tempfile.TemporaryDirectory() as folder:
        save_folder(Path(folder) / "model", SavedModel(params, config, None))
        model = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "model").eval()
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


WORK = {"train": training_step, "generate": generation}


def main() -> None:
    case = json.loads(sys.stdin.readline())
    config = GPTConfig.from_dict(case["config"])
    work = WORK[case["work"]](case, config, initialize(config, Generator(1), "gpt2"))
    if case.get("warm_up", True):
        work()  # the first time allocates memory, a training step its gradients and the optimizer's
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        print(json.dumps(work()), flush=True)
    print(json.dumps({"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)


if __name__ == "__main__":
    main()

"""One engine in a process of its own, so that its threads share the cores with nobody else's.

Reads a case as JSON from standard input and answers with one JSON line when the model is ready; then, for each line it
reads, takes one training step and answers with the seconds of its parts. The end of the input ends it, with the peak
of its memory.
"""

from __future__ import annotations

import json
import resource
import sys
from time import perf_counter

import numpy as np

from gpt.engine import Batch, OptimizerConfig, create_engine
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator


def main() -> None:
    case = json.loads(sys.stdin.readline())
    config = GPTConfig.from_dict(case["config"])
    params = initialize(config, Generator(1), "gpt2")
    engine = create_engine(case["engine"], config, params, OptimizerConfig(), device="cpu")
    del params
    rng = np.random.default_rng(0)

    def step() -> dict[str, float]:
        tokens = rng.integers(0, config.vocab_size, (case["batch"], case["length"] + 1))
        start = perf_counter()
        engine.accumulate(Batch(tokens[:, :-1], tokens[:, 1:]))
        computed = perf_counter()
        engine.step(1e-4, max_norm=1.0)
        end = perf_counter()
        return {"step": end - start, "gradients": computed - start, "update": end - computed}

    step()  # the first step allocates the gradients and the optimizer's memory
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)
    print(json.dumps({"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)


if __name__ == "__main__":
    main()

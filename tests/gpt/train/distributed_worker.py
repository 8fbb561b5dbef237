"""What the processes of test_distributed do: `results` is done by torchrun's processes and by the test's own alone.

torchrun ... distributed_worker.py results OUT.npz      every case's numbers, then what is refused, then commands
torchrun ... distributed_worker.py train PIDS ...       `twingrad train ...`, each rank's process id in the folder PIDS
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from gpt import ops, world
from gpt.cli import main
from gpt.data.loader import windows_at
from gpt.engine import IGNORE, Batch, NonFiniteError, OptimizerConfig, Preferences, Unread, create_engine
from gpt.errors import UserError
from gpt.finetune.adapters import adapt
from reference.config import GPTConfig, LoRA
from reference.init import initialize
from reference.philox import PhiloxNoise
from reference.torch_rng import Generator, StreamNoise

GPT2 = GPTConfig(29, 8, 12, 2, 3, emb_dropout=0.1, shortcut_dropout=0.1, attn_dropout=0.1, tie_embeddings=True)
LLAMA = GPT2.replace(norm="rms_norm", mlp="swiglu", position="rope", tie_embeddings=False, n_layers=1)
ADAPTERS = {"lora": LoRA(rank=2, alpha=4.0, dropout=0.2)}
# name -> architecture, operators, dtype, kind of examples, settings of the optimizer
# Small ones: kernels are interpreted, and compiling takes its time.
KERNELS, COMPILED = FEW = "kernels", "compiled"
CASES = {
    "gpt2 float32": (GPT2, "torch", "float32", "text", {}),
    "gpt2 float64": (GPT2, "torch", "float64", "text", {"trained": ("blocks.*", "final_norm.*")}),
    "pairs": (GPT2, "torch", "float64", "pairs", {}),
    KERNELS: (LLAMA, "triton", "float32", "text", {}),
    COMPILED: (GPT2, "torch", "float64", "text", {}),  # where processes share the model
}
AGAIN = "gpt2 float64", *FEW  # of which processes that share them keep no activations
TOKENS = np.random.default_rng(1).integers(0, 29, 300)


def examples(kind: str, rng: np.random.Generator, n: int) -> Batch | Unread | Preferences:
    """n examples, of which some rows have more targets that count than others, or pairs, or windows of a text."""
    tokens = rng.integers(0, 29, (2 * n if kind == "pairs" else n, 9))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    targets = np.where(np.arange(8) < rng.integers(0, 8, (len(targets), 1)), IGNORE, targets)
    if kind == "pairs":
        return Preferences(inputs, targets, "dpo", 0.1, rng.normal(-10, 2, 2 * n))
    if n == 5:
        return windows_at(TOKENS, rng.integers(0, 290, n), 8)
    return Batch(inputs, targets)


def results(parallel: str | None) -> dict[str, np.ndarray]:
    """All that an engine gives in steps of micro-batches whose sizes no number of processes divides."""
    found: dict[str, np.ndarray] = {}
    for case, (config, operators, dtype, kind, settings) in CASES.items():
        few = case in FEW
        if few and world.size() > 2:
            continue
        rng, stream = np.random.default_rng(0), Generator(1)
        params = initialize(config, stream, "book")
        if kind == "pairs":
            params, config = adapt(params, config, stream, **ADAPTERS)
        optimizer = OptimizerConfig(lr=1e-2, **settings)
        again, compiled = (parallel is not None and case in cases for cases in (AGAIN, [COMPILED]))
        engine = create_engine(
            operators, config, params, optimizer, dtype, "cpu",
            parallel=parallel, checkpoint_activations=again, compile=compiled,
        )  # fmt: skip
        before = engine.optimizer_state().get("m.final_norm.weight", 0)
        seen: dict[str, object] = {"moments before a step": np.array(before)}
        for step in range(1 if few else 3):
            row = 0
            sizes = {KERNELS: (3, 1), COMPILED: (4, 4)}.get(case, (5, 3, 1))  # compiled at each size
            batches = [examples(kind, rng, n) for n in sizes]
            counted = sum(batch.counted for batch in batches)
            for i, batch in enumerate(batches):
                noise = PhiloxNoise(7, step, row)
                loss = engine.accumulate(batch, batch.counted / counted, noise, i == len(batches) - 1)
                seen[f"loss {step} {i}"], row = loss, row + batch.shape[0]
            if step == 1:
                seen |= {f"gradient {name}": array.copy() for name, array in engine.gradients().items()}
                seen["gradient's norm"] = engine.gradient_norm()
            seen[f"norm {step}"] = engine.step(1e-2, 0.1 if step else None)
            if not few:
                seen[f"evaluated {step}"] = engine.loss(batches[0])
        if few:
            seen |= {f"parameter {name}": array.copy() for name, array in engine.parameters().items()}
            found |= {f"{case}: {name}": np.asarray(value) for name, value in seen.items()}
            continue
        thought = engine.token_logps(batches[1])
        seen |= {"logps": thought.logps, "best": thought.best}
        seen |= {f"nothing counts {name}": value for name, value in _nothing_counts(engine).items()}
        cache = engine.new_cache(2, 4)
        seen["logits"] = engine.logits(np.array([[1, 2], [3, 4]]), cache)
        seen["next logits"] = engine.logits(np.array([[5], [6]]), cache)
        engine.accumulate(batches[0], last=False)
        engine.forget_gradients()
        seen["evaluated last"] = engine.loss(batches[0])  # as before a checkpoint
        state, params = engine.optimizer_state(), engine.parameters()
        if world.is_first():
            seen |= {f"parameter {name}": array.copy() for name, array in params.items()}
            seen |= {f"state {name}": array.copy() for name, array in state.items()}
        engine.load_parameters({name: np.zeros(shape) for name, shape in config.parameter_shapes().items()})
        seen["loss without parameters"] = engine.loss(batches[0])
        found |= {f"{case}: {name}": np.asarray(value) for name, value in seen.items()}
    return found


def _nothing_counts(engine) -> dict[str, float]:
    batch = Batch(np.ones((3, 8), np.int64), np.full((3, 8), IGNORE))
    found = {"loss": engine.loss(batch), "accumulated": engine.accumulate(batch), "norm": engine.gradient_norm()}
    engine.forget_gradients()
    return found


def refused(parallel: str) -> dict[str, np.ndarray]:
    """What is said of what cannot be shared, and of numbers that are not finite in one process's rows alone."""
    params = initialize(GPT2, Generator(1), "book")
    said = {}

    def say(name, action):
        try:
            action()
        except UserError as error:
            said[name] = np.array(f"{type(error).__name__}: {error}")

    engine = create_engine("torch", GPT2, params, dtype="float32", device="cpu", parallel=parallel)
    batch = Batch(np.ones((4, 8), np.int64), np.ones((4, 8), np.int64))
    say("stream", lambda: engine.accumulate(batch, 1.0, StreamNoise(Generator(1))))
    say("numpy", lambda: create_engine("numpy", GPT2, params, parallel=parallel))
    wrong = {name: array.copy() for name, array in params.items()}
    wrong["tok_emb.weight"][20, 3] = np.nan
    engine.load_parameters(wrong)
    say("parameter", lambda: engine.accumulate(batch))
    untied = GPT2.replace(tie_embeddings=False)
    params = initialize(untied, Generator(1), "book")
    params["tok_emb.weight"][28, 0] = params["pos_emb.weight"][5, 0] = 3e38  # whose sum is infinite
    engine = create_engine("torch", untied, params, dtype="float32", device="cpu", parallel=parallel)
    batch.inputs[3, 5] = 28  # the last process's
    say("row", lambda: engine.accumulate(batch))
    if parallel == "fsdp":
        say("float16", lambda: create_engine("torch", GPT2, params, parallel="fsdp", precision="float16"))
    assert issubclass(NonFiniteError, UserError)
    return said


def together() -> list[str]:
    """What all hear when something fails in one process."""
    heard = []
    for who in range(world.size()):

        def fail(who: int = who) -> None:
            if world.rank() == who:
                raise UserError("no such file")

        try:
            world.together(fail)
        except UserError as error:
            heard.append(str(error))
    return heard


if __name__ == "__main__":
    command, target, *arguments = sys.argv[1:]
    if command == "train":
        Path(target, f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
        raise SystemExit(main(["train", *arguments]))
    if command == "wait":
        world.start(float(target))
        with world.contact():
            world.first(lambda: print("computes", flush=True) or time.sleep(300))
    world.start(120)
    torch.compile = partial(torch.compile, backend="aot_eager")  # all but the machine code
    ops.LOGITS = 0  # heads' losses in chunks, as those of many logits are
    parts = {}
    for way in ("ddp", "fsdp"):
        parts |= {f"{way} {name}": value for name, value in results(way).items()}
        parts |= {f"{way} refused {name}": value for name, value in refused(way).items()}
    parts["together"] = np.array(together())
    everyones = world.exchange({name: value for name, value in parts.items() if "parameter" not in name})
    if world.is_first():
        same = all(
            np.array_equal(one[name], everyones[0][name]) for one in everyones for name in one if "state" not in name
        )
        np.savez(target, **parts, same=same)
    for flags in arguments:  # folder and command, words apart by commas; all processes do the same, RANK is its number
        folder, *words = flags.replace("RANK", str(world.rank())).split(",")
        os.chdir(folder)
        status = main(words)
        world.exchange(status)  # by now the first has said what it has to say
        sys.stdout.write(f"rank {world.rank()} ended with {status}\n")  # at once: torchrun's Python keeps nothing back

"""The benchmarks run where there is no GPU, and write what they measured and where."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bench import __main__ as bench
from bench import ceilings, contest, cpu, generate, layers, matmul, process, results, sweep, work, worker
from gpt.errors import UserError
from reference import GPT, PRESETS
from reference.init import initialize
from reference.torch_rng import Generator

pytest.importorskip("torch")

from bench import plain

ROOT = Path(__file__).parents[2]


def test_products_are_timed_on_the_cpu_and_a_missing_gpu_is_said(tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(matmul, "SIZES", (32,))
    assert matmul.main(tmp_path / "matmul.json", sessions=1, rounds=2) == 0
    assert "no such device" in capsys.readouterr().out
    case = results.read(tmp_path / "matmul.json")["cases"]["32"]
    assert {name: len(each["seconds"]["sessions"][0]) for name, each in case["contestants"].items()} == {
        "numpy": 2,
        "torch cpu": 2,
    }
    assert case["ratios"]["numpy / torch cpu"]["median"] > 0


def test_engines_and_peers_step_in_turns_and_the_results_say_with_what(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    who = tuple(name for name in cpu.EVERY if name != "torch compiled")  # which takes its time
    tiny = dataclasses.replace(cpu.CASES["bytes-small"], preset="bytes-tiny", batch=2, length=16, contestants=who)
    monkeypatch.setitem(cpu.CASES, "bytes-small", tiny)
    monkeypatch.setattr(ceilings, "measure", partial(ceilings.measure, 64, 2**16, 1, 1))
    out = tmp_path / "cpu.json"
    assert bench.main(["cpu", "bytes-small", "--sessions", "1", "--rounds", "2", "--out", str(out)]) == 0
    document = results.read(out)
    case = document["cases"]["bytes-small"]
    assert document["kind"] == "cpu"
    assert {"numpy", "torch", "transformers"} <= set(document["versions"])
    assert set(case["contestants"]) == set(who)
    for figures in case["contestants"].values():
        (rounds,) = figures["seconds"]["sessions"]
        assert len(rounds) == 2
        assert min(rounds) <= figures["seconds"]["median"] <= max(rounds)
        assert figures["gradients"] + figures["update"] == pytest.approx(figures["seconds"]["median"], rel=0.9)
        assert figures["tokens_per_s"] == pytest.approx(32 / figures["seconds"]["median"])
        assert figures["peak_bytes"] > 2**24
    # Of so small a model next to all memory is its libraries'.
    assert {name for name, figures in case["contestants"].items() if "of_plan" in figures} == {"numpy", "torch"}
    assert 0 < case["contestants"]["numpy"]["of_plan"]["planned_bytes"] < 2**22
    assert case["control"] == "plain"
    assert {f"numpy / {peer}" for peer in who[1:]} <= set(case["ratios"])
    assert document["ceilings"]["operations_per_s"] > 0
    assert document["ceilings"]["bytes_per_s"] > 0


@pytest.mark.parametrize("contestant, engine, compiled", [("torch", "torch", False), ("torch compiled", "torch", True)])
def test_a_compiled_contestant_is_compiled(monkeypatch, contestant, engine, compiled):
    asked = []
    monkeypatch.setattr(worker, "create_engine", lambda *arguments, **settings: asked.append((arguments[0], settings)))
    worker.train({"contestant": contestant, "config": PRESETS["bytes-tiny"].to_dict(), "batch": 2, "length": 4})
    assert asked == [(engine, {"device": "cpu", "compile": compiled})]


def test_the_plain_loop_s_model_is_ours():
    config = PRESETS["bytes-tiny"]
    params = initialize(config, Generator(1), "gpt2")
    rng = np.random.default_rng(0)
    params = {name: array + rng.normal(0, 0.1, array.shape).astype(np.float32) for name, array in params.items()}
    tokens = rng.integers(0, config.vocab_size, (2, 9))
    import torch

    theirs = plain.create(config, params)(torch.from_numpy(tokens)).detach().numpy()
    np.testing.assert_allclose(theirs, GPT(config, params)(tokens), rtol=0, atol=1e-4)


def test_a_peer_with_another_loss_is_refused():
    cpu._agree("some case", {"numpy": 5.0, "plain": 5.001, "torch": 4.999})
    with pytest.raises(UserError, match="some case: plain computes another loss than numpy: 5.1, not 5"):
        cpu._agree("some case", {"numpy": 5.0, "torch": 5.0, "plain": 5.1})
    with pytest.raises(UserError, match="torch computes another loss"):
        cpu._agree("some case", {"numpy": 5.0, "torch": float("nan")})


def test_steps_of_adapters_are_held_against_the_whole_model_s():
    case = dataclasses.replace(cpu.CASES["lora"], preset="bytes-tiny", batch=2, length=16)
    measured = cpu.measure("lora", case, sessions=1, rounds=2)
    assert set(measured["contestants"]) == {"numpy", "torch", "numpy full", "torch full"}
    assert set(measured["ratios"]) == {"numpy / torch"}
    assert measured["ratios"]["numpy / torch"]["median"] > 0
    assert set(measured["of_full"]) == {"numpy", "torch"}
    assert 0 < measured["of_full_optimizer"] < 1


@pytest.mark.parametrize("name", ["classify", "dpo", "orpo"])
def test_steps_that_finetune_lose_the_same_with_each_engine(name):
    """What a worker does, twice."""
    case = dataclasses.replace(cpu.CASES[name], preset="bytes-tiny")
    trained = ("final_norm.*", "head.*") if case.trained else ()
    settings = {"config": case.config.to_dict(), "batch": 2, "length": 16, "trained": trained}
    losses = []
    for engine in ("numpy", "torch"):
        step = worker.train({**settings, "contestant": engine, "examples": case.examples})
        taken = [step() for _ in range(2)]
        assert all(each["gradients"] + each["update"] == pytest.approx(each["seconds"]) for each in taken)
        losses.append([each["loss"] for each in taken])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert losses[0][0] != losses[0][1]


def test_generation_is_timed_with_and_without_a_cache_and_by_transformers():
    pytest.importorskip("transformers")
    measured = generate.measure("bytes-llama", sessions=1, rounds=2, tokens=5)
    rounds = {name: len(each["seconds"]["sessions"][0]) for name, each in measured["contestants"].items()}
    assert rounds == {"numpy": 2, "torch": 2, "transformers": 2, "numpy uncached": 1}
    assert all(figures["tokens_per_s"] > 0 for figures in measured["contestants"].values())
    assert all(ratio["median"] > 0 for ratio in measured["ratios"].values())
    contest.show("generate", measured)


def test_turns_begin_with_another_contestant_each_round_and_sessions_with_fresh_processes(monkeypatch):
    made, asked = [], []

    class Fake:
        def __init__(self, name, settings):
            made.append(name)
            self.name, self.first = name, {"loss": len(made)}

        def ask(self, message):
            asked.append(self.name)
            return {"seconds": len(asked)}

        def close(self):
            return {"peak_bytes": 7 - len(asked) % 2}

        def kill(self):
            pass

    monkeypatch.setattr(process, "Worker", Fake)
    taken = process.take_turns("", {"a": {}, "b": {}, "c": {}}, sessions=2, rounds=3, once=("c",))
    assert made == ["a", "b", "c"] * 2
    assert asked == [*"abc", *"ba", *"ab"] * 2
    assert taken["a"].sessions() == [[1, 5, 6], [8, 12, 13]]
    assert taken["c"].sessions() == [[3], [10]]
    assert taken["b"].bytes() == 7


def test_a_worker_that_dies_is_one_line_and_leaves_nobody_behind(monkeypatch):
    made = []

    class Kept(process.Worker):
        def __init__(self, *arguments):
            made.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr(process, "Worker", Kept)
    works = {"numpy": {"work": "product", "n": 8}, "other": {"work": "nothing that there is"}}
    with pytest.raises(UserError, match="other: its process ended early with status 1"):
        process.take_turns("", works, 1, 1)
    assert [each.name for each in made] == ["numpy", "other"]
    assert all(each.process.poll() is not None for each in made)


def test_cost_is_fitted_along_each_axis(tmp_path, monkeypatch, capsys):
    sizes = tuple(sweep.Point(n, PRESETS["bytes-tiny"], n // 8, 8) for n in (8, 32))
    monkeypatch.setattr(sweep, "AXES", {"tokens": sweep.Axis("tokens in a step", sizes)})
    monkeypatch.setattr(sweep, "CONTESTANTS", ("numpy", "torch"))
    monkeypatch.setattr(ceilings, "measure", dict)
    assert bench.main(["sweep", "--sessions", "1", "--rounds", "2", "--out", str(tmp_path / "sweep.json")]) == 0
    assert "exponent" in capsys.readouterr().out
    cases = results.read(tmp_path / "sweep.json")["cases"]
    assert [case["n"] for case in cases.values()] == [8, 32]
    for case, power in zip(cases.values(), (0.01, 0.08), strict=True):  # as if t = n^1.5 / 2263
        case["contestants"]["numpy"]["seconds"]["median"] = power
    found = {name: fit for _, name, fit, _ in sweep.fits(cases)}
    assert found["numpy"].exponent == pytest.approx(1.5)


@pytest.mark.parametrize("axis", sweep.AXES)
def test_along_an_axis_one_thing_grows(axis):
    points = sweep.AXES[axis].points
    assert [point.n for point in points] == sorted({point.n for point in points})
    grows = {
        "tokens": lambda p: p.batch * p.length,
        "width": lambda p: p.config.emb_dim,
        "depth": lambda p: p.config.n_layers,
        "length": lambda p: p.length,
        "parameters": lambda p: p.config.n_parameters,
    }
    for point in points:
        assert point.n == grows[axis](point)
        assert point.length <= point.config.context_length
        assert plain.can(point.config)
    assert axis != "parameters" or (points[0].n < 1.1e6 and points[-1].n > 124e6)


def test_each_layer_has_a_benchmark_that_runs_on_either_engine(tmp_path):
    out = tmp_path / "layers.json"
    suite = Path(layers.__file__).with_name("test_layers.py")
    command = [sys.executable, "-m", "pytest", "-q", str(suite), "-k", "dropout or layer_norm", "--benchmark-enable"]
    options = [f"--benchmark-json={out}", "--benchmark-min-rounds=1", "--benchmark-max-time=0.01"]
    # A benchmark is not taken by one of several workers, and so this must not look like one.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run(command + options, check=True, cwd=Path(__file__).parents[2], capture_output=True, env=alone)
    report, cases = json.loads(out.read_text()), {}
    layers.add(cases, report)
    layers.add(cases, report)
    layers.finish(cases)
    kept = cases["layer_norm forward"]["contestants"]["numpy"]["seconds"]["sessions"]
    assert len(kept) == 2
    assert 1 <= len(kept[0]) <= layers.KEPT
    timed = {(b["params"]["engine"], b["params"]["name"]) for b in json.loads(out.read_text())["benchmarks"]}
    assert {(engine, name) for engine in ("numpy", "torch") for name in ("dropout", "layer_norm")} <= timed


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["cpu", "gpt5"], "'gpt5' is not one of gpt2-small"),
        (["cpu", "--rounds", "0"], "rounds: expected at least 1, got 0"),
        (["sweep", "--sessions", "-1"], "sessions: expected at least 1, got -1"),
        (["sweep", "heads"], "'heads' is not one of tokens, width"),
        (["quality", "huge"], "'huge' is not one of small, tiny"),
        (["breakdown", "--steps", "0"], "steps: expected at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line(arguments, expected, capsys):
    assert bench.main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_an_unwritable_result_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matmul, "SIZES", ())
    (tmp_path / "file").touch()
    assert bench.main(["matmul", "--out", str(tmp_path / "file" / "result.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["", ".", "{}", "{}/file/result.json"])
def test_what_could_not_be_written_is_not_measured(tmp_path, monkeypatch, capsys, out):
    (tmp_path / "file").touch()
    monkeypatch.setitem(bench.COMMANDS, "layers", lambda _: pytest.fail("it was measured"))
    assert bench.main(["layers", "--out", out.format(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out: ")
    assert error.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ctrl_c_is_one_line_and_leaves_no_worker(tmp_path):
    out = tmp_path / "cpu.json"
    command = [sys.executable, "-m", "bench", "distributed", "bytes-small", "--rounds", "100000", "--out", str(out)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        children, workers = Path(f"/proc/{running.pid}/task/{running.pid}/children"), []
        while len(workers) < 3 and running.poll() is None:
            workers = children.read_text().split()
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)
        _, error = running.communicate(timeout=60)
    assert running.returncode == 130
    assert error == "error: interrupted\n"
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_the_surroundings_name_machine_and_versions():
    found = results.surroundings()
    assert set(found) == {"date", "machine", "python", "versions", "environment", "commit", "dirty"}
    assert {"processor", "cores", "memory_bytes", "system"} <= set(found["machine"])
    assert found["machine"]["memory_bytes"] > 2**28
    assert {"numpy", "torch", "transformers"} <= set(found["versions"])


def test_a_result_is_read_as_it_was_written_with_its_rounds_on_a_line(tmp_path):
    cases = {"a": {"rounds": [[1.5, 2e-07, -3.0], [4.0]], "name": "[\n1\n]", "none": []}}
    results.write(tmp_path / "some.json", "cpu", cases, ceilings={"x": 1})
    document = results.read(tmp_path / "some.json")
    assert document["cases"] == cases
    assert document["ceilings"] == {"x": 1}
    assert "[1.5, 2e-07, -3.0]" in (tmp_path / "some.json").read_text()


def test_work_is_what_is_counted_by_hand():
    """A model of 1 block, 2 wide, 1 head, MLP of 8, 5 tokens: 3 products for each, attention's 2 and 5 at half."""
    config = PRESETS["bytes-tiny"].replace(
        vocab_size=5, context_length=3, emb_dim=2, n_layers=1, n_heads=1, head_dim=2, mlp_dim=8
    )
    matrices = 4 * 2 * 2 + 2 * 2 * 8 + 5 * 2
    counted = work.gradients(config, batch=1, length=3)
    assert counted.operations == 3 * 2 * matrices * 3 + 3.5 * (4 * 3 * 3 * 2 / 2)
    assert counted.bytes == 3 * 4 * config.n_parameters
    forward, backward = work.LAYERS["linear"](7, 2, 3, 5)  # 6 rows, 5 to 7
    assert forward == (2 * 6 * 5 * 7, 4 * (6 * 5 + 7 * 5 + 6 * 7))
    assert backward == (2 * forward.operations, 4 * (2 * 6 * 5 + 2 * 7 * 5 + 6 * 7))
    assert work.LAYERS["attention"](1, 2, 2, 8, 8, 4)[0].operations == 2 * 2 * 8 * 8 * 4
    assert work.Work(100, 10).least_seconds(50, 2) == 5

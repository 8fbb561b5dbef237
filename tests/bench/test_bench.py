"""The benchmarks run where there is no GPU, and write what they measured and where."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as bench
from bench import cpu, generate, layers, matmul, results

pytest.importorskip("torch")


def test_products_are_timed_on_the_cpu_and_a_missing_gpu_is_said(tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(matmul, "SIZES", (32,))
    monkeypatch.setattr(matmul, "SECONDS", 0.01)
    assert bench.main(["matmul", "--out", str(tmp_path / "matmul.json")]) == 0
    assert "no such device" in capsys.readouterr().out
    rates = json.loads((tmp_path / "matmul.json").read_text())["cases"]["32"]
    assert rates["numpy"] > 0
    assert rates["torch cpu"] > 0
    assert rates["torch cuda"] is None


def test_both_engines_step_in_turns_and_the_results_say_with_what(tmp_path):
    out = tmp_path / "cpu.json"
    command = [sys.executable, "-m", "bench", "cpu", "bytes-small", "--rounds", "2", "--out", str(out)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], capture_output=True)
    document = json.loads(out.read_text())
    case = document["cases"]["bytes-small"]
    assert document["kind"] == "cpu"
    assert {"numpy", "torch"} <= set(document["versions"])
    assert set(case["engines"]) == {"numpy", "torch"}
    assert case["time_ratio"] > 0
    assert all(figures["peak_bytes"] > 50 * 2**20 for figures in case["engines"].values())


@pytest.mark.parametrize("name", ["classify", "lora", "orpo"])
def test_steps_that_finetune_are_timed_and_those_of_adapters_held_against_the_whole_model_s(name):
    case = dataclasses.replace(cpu.CASES[name], preset="bytes-tiny", batch=2, length=16, trained=())
    measured = cpu.measure(name, case, rounds=2)
    assert measured["time_ratio"] > 0
    assert ("of_full" in measured) == (name == "lora")
    if name == "lora":
        assert set(measured["engines"]) == {"numpy", "torch", "numpy full", "torch full"}
        assert 0 < measured["of_full_optimizer"] < 1


def test_generation_is_timed_with_and_without_a_cache_and_by_transformers():
    pytest.importorskip("transformers")
    measured = generate.measure("bytes-llama", rounds=1, tokens=5)
    assert set(measured["writers"]) == {"numpy", "torch", "transformers", "numpy uncached"}
    assert all(figures["tokens_per_s"] > 0 for figures in measured["writers"].values())
    assert all(ratio["median"] > 0 for ratio in measured["ratios"].values())
    generate.show(measured)


def test_each_layer_has_a_benchmark_that_runs_on_either_engine(tmp_path):
    out = tmp_path / "layers.json"
    suite = Path(layers.__file__).with_name("test_layers.py")
    command = [sys.executable, "-m", "pytest", "-q", str(suite), "-k", "dropout or layer_norm", "--benchmark-enable"]
    options = [f"--benchmark-json={out}", "--benchmark-min-rounds=1", "--benchmark-max-time=0.01"]
    # A benchmark is not taken by one of several workers, and so this must not look like one.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run(command + options, check=True, cwd=Path(__file__).parents[2], capture_output=True, env=alone)
    timed = {(b["params"]["engine"], b["params"]["name"]) for b in json.loads(out.read_text())["benchmarks"]}
    assert {(engine, name) for engine in ("numpy", "torch") for name in ("dropout", "layer_norm")} <= timed


@pytest.mark.parametrize("arguments, expected", [(["cpu", "gpt5"], "gpt5"), (["cpu", "--rounds", "0"], "at least 1")])
def test_a_mistake_is_one_line(arguments, expected, capsys):
    assert bench.main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_an_unwritable_result_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matmul, "SIZES", ())
    (tmp_path / "file").touch()
    assert bench.main(["matmul", "--out", str(tmp_path / "file" / "result.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_the_surroundings_name_machine_and_versions():
    assert {"date", "machine", "python", "versions", "commit"} == set(results.surroundings())

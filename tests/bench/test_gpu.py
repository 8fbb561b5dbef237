"""The GPU benchmark: its arithmetic, its judgement, and all of it at tiny sizes, interpreted where there is no GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bench import __main__ as bench  # noqa: E402
from bench import checks, clock, gpu, peers, report  # noqa: E402
from bench.cases import cases  # noqa: E402
from gpt import ops  # noqa: E402
from gpt.errors import UserError  # noqa: E402

ROOT = Path(__file__).parents[2]


def bench_gpu(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench", "gpu", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def one(operator, tiny=False, **wanted):
    found = [case for case in cases(tiny) if case.operator == operator]
    return next(case for case in found if all(getattr(case, name) == value for name, value in wanted.items()))


def a_run(tiny=True, begun=None):
    findings = report.Findings("cpu, interpreted", ceilings={"copy": 1.0, "bfloat16": 1.0})
    return gpu.Run("cpu", tiny, time.monotonic() if begun is None else begun, 8.0, findings)


def measured(peer, x, seconds, peak=0, **more):
    given = {"operator": "attention", "direction": "forward", "setting": "D 64 causal", "unit": "TFLOP/s", **more}
    return report.Measurement(
        **{"dtype": "bfloat16", "x": x, "x_name": "", "peer": peer, "seconds": seconds, "calls": 3, "rate": 1.0},
        **{"quartiles": (seconds, seconds), "of_ceiling": 0.5, "peak_bytes": peak, **given},
    )


# What is timed.


def test_operations_and_bytes_are_those_counted_by_hand():
    causal = one("attention", x=4096, setting="D 64 causal")
    assert causal.arguments[0].shape == (4, 32, 4096, 64)
    assert causal.work["forward"] == 2 * (2 * 4 * 32 * 4096 * 4096 * 64) / 2  # two products, half of the scores
    assert one("attention", x=4096, setting="D 64 full").work["backward"] == 5 * causal.work["forward"]
    assert one("attention", x=512, setting="D 128 full").work["forward"] == 4 * 32 * 16 * 512 * 512 * 128
    assert one("layer_norm", x=2048, dtype="float32").work["backward"] == 3 * 4 * 2**26  # x, dy; dx
    assert one("add_layer_norm", x=2048).work["forward"] == 4 * 2 * 2**26  # x, residual; y, total
    assert one("swiglu", x=2048).work == {"forward": 3 * 2 * 2**26, "backward": 5 * 2 * 2**26}  # gate, up; dgate, dup
    turned = one("rope", setting="D 128 interleaved")
    assert turned.work["forward"] == turned.work["backward"] == 2 * 2 * 2**26 + 2 * 4 * 2048 * 64  # x, y; cos, sin
    assert one("cross_entropy").work["both"] == 2 * 2 * 8192 * 50_257  # logits; dlogits
    assert one("linear_cross_entropy").work["both"] == 3 * 2 * 8192 * 50_257 * 768
    step = one("cached_attention", x=4096, setting="B 16 H 32 G 8 D 128")
    assert step.work["forward"] == 2 * 128 * 16 * (2 * 8 * 4096 + 2 * 32)  # k and v; q and y
    assert causal.rate("forward", 0.5) == causal.work["forward"] / 0.5 / 1e12
    assert one("gelu", x=1024).rate("forward", 0.5) == 2 * 2 * 2**26 / 0.5 / 1e9


def test_every_operator_is_timed_at_constant_size():
    every = list(cases(tiny=False))
    assert {case.operator for case in every} == {case.operator for case in cases(tiny=True)}
    assert {case.operator for case in every} == {
        *("attention", "cached_attention", "layer_norm", "add_layer_norm", "gelu", "bias_gelu", "dropout"),
        *("cross_entropy", "linear_cross_entropy", "rms_norm", "add_rms_norm", "rope", "swiglu"),
    }
    assert {case.x for case in every if case.operator == "attention"} == {512, 1024, 2048, 4096, 8192, 16_384}
    assert {case.x for case in every if case.operator == "gelu"} == {1024, 2048, 4096, 8192, 16_384}
    assert {torch.Size(case.arguments[0].shape).numel() for case in every if case.x_name == "width of a row"} == {2**26}
    assert {torch.Size(case.arguments[0].shape).numel() for case in every if case.x_name == "sequence length"} == {
        2**25
    }
    assert len({str(case) for case in every}) == len(every)


def test_every_target_speaks_of_something_that_is_timed():
    for target in report.TARGETS:
        assert any(target.covers(case) and target.direction in case.work for case in cases(tiny=False)), target


# How.


def test_calls_are_made_in_turns():
    made = []
    taken = clock.times({name: lambda name=name: made.append(name) for name in "ab"}, "cpu", 0.0)
    assert made == ["a", "b"] * 3
    assert [len(seconds) for seconds in taken.values()] == [3, 3]


@pytest.mark.parametrize("count", [1, 3, 5, 7, 200])
def test_batches_are_consecutive_and_lose_no_call(count):
    taken = [1e-3 * i for i in range(1, count + 1)]
    parts = clock.batches(taken)
    assert [x for part in parts for x in part] == pytest.approx(taken)
    assert len(parts) == min(5, count)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_peer_that_cannot_run_or_computes_something_else_is_listed_with_its_reason(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("not on this machine\nand more")

    found = {"twingrad": ops.gelu, "broken": broken, "other": lambda x, approximate: 2 * x, "forward": _gelu_forward}
    monkeypatch.setattr(peers, "peers", lambda layer, kernel: found)
    run = a_run()
    gpu.measure_all(run, [one("gelu", tiny=True)], 0)
    assert {(m.peer, m.direction) for m in run.findings.measurements} == {
        *(("twingrad", "forward"), ("twingrad", "backward"), ("forward", "forward")),
    }
    reasons = run.findings.left_out
    assert reasons["broken, gelu exact bfloat16 64"] == "RuntimeError: not on this machine"
    assert "does not compute the same" in reasons["other, gelu exact bfloat16 64"]
    assert len(reasons) == 2


def _gelu_forward(x, approximate):
    return ops.gelu(x.detach(), approximate)


def test_a_compiled_peer_is_compiled_at_every_size():
    for width in range(8, 80, 8):  # Dynamo by itself gives up after eight
        torch._dynamo.utils.counters.clear()
        peer = peers.peers("gelu")["torch.compile"]
        peer(torch.ones(2, width), "none")
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, width


def test_what_there_is_no_time_for_is_left_out_with_a_line():
    run = a_run(tiny=False, begun=-1e6)
    gpu.measure_all(run, list(cases(tiny=True)), 0)
    gpu.measure_models(run)
    assert not run.findings.measurements
    first, *models = run.findings.left_out.items()
    assert first == (f"{len(list(cases(tiny=True)))} cases, from attention D 64 causal bfloat16 16 on", "no time left")
    assert len(models) == 4


# What is said.


def test_targets_are_judged_by_the_worst_size():
    found = report.Findings("some GPU")
    found.measurements = [measured("twingrad", 512, 1.0), measured("flash", 512, 1.5)]
    found.measurements += [measured("twingrad", 1024, 1.0), measured("flash", 1024, 1.1)]
    loss = {"operator": "linear_cross_entropy", "direction": "both", "setting": "8 x 3"}
    found.measurements += [measured("twingrad", 0, 1.0, 10, **loss), measured("torch", 0, 1.0, 45, **loss)]
    said = [str(verdict) for verdict in report.judge(found)]
    assert (
        "NOT MET       attention D 64 causal forward, speed, times flash: 1.10 at D 64 causal 1024, wanted 1.20" in said
    )
    assert "met           linear_cross_entropy both, memory, times torch: 4.50 at 8 x 3, wanted 4.00" in said
    assert "not measured  training step, compiled: speed, times the torch set: wanted 1.15" in said
    found.models = [
        {"operators": name, "mode": "compiled", "tokens_per_s": speed}
        for name, speed in (("triton", 23), ("torch", 20))
    ]
    assert [*report.judge(found)][-1].found == 1.15


# What comes before.


def test_what_a_sanitizer_finds_stops_and_one_that_cannot_run_is_left_out(monkeypatch, tmp_path, capsys):
    program = tmp_path / checks.SANITIZER
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for status, good in ((0, True), (3, True), (checks.FOUND_SOMETHING, False)):
        program.write_text(f"#!/bin/sh\necho '========= a word'\nexit {status}\n")
        program.chmod(0o755)
        found = report.Findings("some GPU")
        assert checks.run(found, ["no layer"], [], time.monotonic() + 60) is good
        assert found.left_out.get("memcheck") == (
            f"{checks.SANITIZER} ended with status 3: a word" if status == 3 else None
        )
        assert ("FAILED        racecheck" in capsys.readouterr().out) is not good


@pytest.mark.parametrize(
    "tool, said, status, good",
    [
        ("memcheck", "Invalid __global__ read of size 4 bytes", 1, False),  # and then Python ended by itself
        ("memcheck", "ERROR SUMMARY: 2 errors", 0, False),
        ("memcheck", "ERROR SUMMARY: 0 errors", 0, True),
        ("racecheck", "RACECHECK SUMMARY: 1 hazard displayed", checks.FOUND_SOMETHING, True),
    ],
)
def test_what_a_sanitizer_says_counts_whatever_the_status(tool, said, status, good, monkeypatch, tmp_path, capsys):
    program = tmp_path / checks.SANITIZER
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program.write_text(f'#!/bin/sh\ncase "$*" in *"--tool {tool}"*) echo "========= {said}"; exit {status};; esac\n')
    program.chmod(0o755)
    found = report.Findings("some GPU")
    assert checks.run(found, ["no layer"], [], time.monotonic() + 60) is good
    failed = {check["gate"]: check["failures"] for check in found.checks}
    assert failed == {"memcheck": 0, "racecheck": 0, tool: int(not good or tool == "racecheck")}
    assert (said in capsys.readouterr().out) == (failed[tool] > 0)


def test_what_is_measured_is_kept_before_the_next_is_begun(tmp_path, monkeypatch):
    """What comes next may hang, or be ended from outside."""
    out, seen = tmp_path / "gpu.json", []
    monkeypatch.setattr(gpu, "cases", lambda tiny: [case for case in cases(tiny) if case.operator == "gelu"])
    monkeypatch.setattr(gpu, "measure_models", lambda _: seen.append(json.loads(out.read_text())["cases"]))
    monkeypatch.setattr(gpu.report, "show", lambda *_, **__: None)
    assert gpu.main(gpu.Options(tiny=True, check=False, out=out)) == 0
    assert seen[0]["ceilings"]


def test_what_outlasts_its_time_is_ended_with_all_that_it_started():
    begun = time.monotonic()
    slow, quick = checks.together([["sh", "-c", "sleep 100 & wait"], ["true"]], begun + 1)
    assert slow is None
    assert quick.returncode == 0
    assert checks.together([["true"]], begun - 1) == [None]


def test_a_failing_check_is_status_1_and_times_nothing(monkeypatch, capsys):
    monkeypatch.setattr(checks, "together", lambda commands, until: [_said(_check(passed=False)) for _ in commands])
    assert gpu.main(gpu.Options(layers=("gelu",), tiny=True)) == 1
    said = capsys.readouterr()
    assert "FAILED        triton gelu, algebra: 1 measurements, 1 bad" in said.out
    assert "nothing was timed" in said.err
    monkeypatch.setattr(checks, "together", lambda commands, until: [_said("", "KeyError: 'x'\n") for _ in commands])
    assert gpu.main(gpu.Options(layers=("gelu",), tiny=True)) == 1
    assert "FAILED        checks of gelu: KeyError: 'x'" in capsys.readouterr().out


def _said(out, err=""):
    return subprocess.CompletedProcess([], 0, out, err)


def _check(passed):
    result = {"operator": "triton gelu", "gate": "algebra", "case": "5x7", "tensor": "y", "error": None, "bound": 1e-11}
    return json.dumps({"results": [{**result, "passed": passed, "note": ""}]})


# The command.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert bench.main(["gpu"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: bench gpu: no CUDA GPU is here")
    assert said.err.count("\n") == 1
    assert not said.out


def test_bad_arguments_are_refused():
    for options, message in (
        (gpu.Options(("embedding",), tiny=True), "embedding: no such layer; choose from add_layer_norm"),
        (gpu.Options(tiny=True, minutes=0), "minutes: expected more than 0"),
        (gpu.Options(tiny=True, kernel="mine.py:gelu"), "wants the one operator"),
    ):
        with pytest.raises(UserError, match=message):
            gpu.main(options)


def test_checked_and_timed_beside_somebody_s_kernel(tmp_path):
    kernel = tmp_path / "mine.py"
    kernel.write_text(
        "import torch\ndef gelu(x, approximate):\n    return torch.nn.functional.gelu(x, approximate=approximate)\n"
    )
    done = bench_gpu("--tiny", "--kernel", f"{kernel}:gelu", "--op", "gelu", "--out", tmp_path / "some" / "gpu.json")
    assert done.returncode == 0, done.stderr
    assert "checked       triton gelu-tanh, algebra" in done.stdout, "before it is timed"
    found = json.loads((tmp_path / "some" / "gpu.json").read_text())["cases"]
    assert {m["peer"] for m in found["measurements"]} == {"twingrad", "yours", "torch", "torch.compile"}
    assert {(check["operator"], check["failures"]) for check in found["checks"]} == {
        *(("triton gelu", 0), ("triton gelu-tanh", 0)),
    }


def test_the_whole_of_it_at_tiny_sizes(tmp_path, monkeypatch, capsys):
    kept = sorted((ROOT / "bench" / "results").iterdir())
    # What torch.compile makes of every operator takes half a minute; what it does for a peer is tried elsewhere.
    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    assert gpu.main(gpu.Options(tiny=True, check=False, out=tmp_path / "gpu.json")) == 0
    printed = capsys.readouterr().out
    assert sorted((ROOT / "bench" / "results").iterdir()) == kept
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["kind"] == "gpu"
    assert document["versions"]["torch"]
    assert document["versions"]["triton"]
    found = document["cases"]
    assert found["device"] == "cpu, interpreted"  # as all tests of kernels are, with a GPU too
    assert {"copy", "bfloat16", "float32"} <= found["ceilings"].keys()
    timed = {(m["operator"], m["direction"]) for m in found["measurements"] if m["peer"] == "twingrad"}
    assert timed == {(case.operator, direction) for case in cases(tiny=True) for direction in case.work}
    for m in found["measurements"]:
        assert 0 < m["quartiles"][0] <= m["seconds"] <= m["quartiles"][1]
        assert m["rate"] > 0
        assert m["of_ceiling"] > 0
        assert sum(map(len, m["sessions"])) == m["calls"]
    assert [(m["operators"], m["mode"]) for m in found["models"]] == [("triton", "eager"), ("torch", "eager")]
    assert all(m["tokens_per_s"] > 0 for m in found["models"])
    for plot in ("attention", "bandwidth", "model"):
        assert (tmp_path / f"gpu-{plot}.png").read_bytes().startswith(b"\x89PNG")
        assert f"gpu-{plot}.png" in printed
    if not torch.cuda.is_available():
        assert "flash" in {m["peer"] for m in found["measurements"]}
        assert "cudnn, attention D 64 causal bfloat16 16" in found["left_out"]


def test_what_fails_while_it_is_timed_takes_nothing_else_with_it(tmp_path, monkeypatch, capsys):
    """Memory that lacks for one model, and a mistake that nobody foresaw: a machine may not be there again."""

    def step():
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gpu, "training_step", lambda *_: (step, {"model": "GPT", "batch": 1, "length": 1}))
    monkeypatch.setattr(gpu, "cases", lambda tiny: [case for case in cases(tiny) if case.operator == "gelu"])
    monkeypatch.setattr(gpu.report, "show", lambda *_, **__: None)
    out = tmp_path / "gpu.json"
    assert gpu.main(gpu.Options(tiny=True, check=False, out=out)) == 0
    found = json.loads(out.read_text())["cases"]
    assert found["left_out"]["model, eager"] == "OutOfMemoryError: out of memory"
    assert {m["operator"] for m in found["measurements"]} == {"gelu"}

    monkeypatch.setattr(gpu, "measure_models", lambda _: 1 / 0)
    assert gpu.main(gpu.Options(tiny=True, check=False, out=out)) == 1
    assert json.loads(out.read_text())["cases"]["left_out"]["the rest"] == "ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in capsys.readouterr().err

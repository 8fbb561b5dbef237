"""The GPU benchmark: its arithmetic, and all of it at tiny sizes, interpreted, where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bench import gpu, peers  # noqa: E402
from gpt import ops  # noqa: E402

ROOT = Path(__file__).parents[2]


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench", "gpu", *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def one(operator, direction, **wanted):
    found = [case for case in gpu.cases(tiny=False) if (case.operator, case.direction) == (operator, direction)]
    return next(case for case in found if all(getattr(case, name) == value for name, value in wanted.items()))


def test_operations_and_bytes_are_those_counted_by_hand():
    causal = one("attention", "forward", x=4096, setting="D 64 causal")
    assert causal.arguments[0].shape == (4, 32, 4096, 64)
    assert causal.flops == 2 * (2 * 4 * 32 * 4096 * 4096 * 64) / 2  # two products, half of the scores
    assert one("attention", "backward", x=4096, setting="D 64 full").flops == 5 * causal.flops
    assert one("layer_norm", "backward", x=2048, dtype="float32").bytes == 3 * 4 * 2**26  # x, dy; dx
    assert one("add_layer_norm", "forward", x=2048).bytes == 4 * 2 * 2**26  # x, residual; y, total
    assert one("linear_cross_entropy", "both").flops == 3 * 2 * 8192 * 50_257 * 768


def test_every_operator_is_timed_at_constant_size():
    cases = list(gpu.cases(tiny=False))
    assert {case.operator for case in cases} == {
        *("attention", "layer_norm", "add_layer_norm", "gelu", "bias_gelu", "dropout"),
        *("cross_entropy", "linear_cross_entropy"),
    }
    assert {case.x for case in cases if case.operator == "attention"} == {512, 1024, 2048, 4096, 8192, 16_384}
    assert {case.x for case in cases if case.operator == "gelu"} == {1024, 2048, 4096, 8192, 16_384}
    assert len({str(case) for case in cases}) == len(cases)


def test_a_peer_that_cannot_run_is_listed_with_its_reason(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("not on this machine\nand more")

    monkeypatch.setattr(peers, "peers", lambda layer, kernel: {"twingrad": ops.gelu, "broken": broken})
    run = gpu.Run("cpu", True, 0.0, ceilings={"copy_gb_per_s": 1.0})
    gpu.measure(run, next(case for case in gpu.cases(tiny=True) if case.operator == "gelu"))
    assert [m.peer for m in run.measurements] == ["twingrad"]
    assert run.left_out == {"broken, gelu exact forward": "RuntimeError: not on this machine"}


def test_targets_are_judged_by_the_worst_size():
    def measured(peer, x, seconds):
        return gpu.Measurement(
            *("attention", "forward", "bfloat16", "D 64 causal", x, "", peer, seconds, (seconds, seconds)),
            *(1.0, "TFLOP/s", 0.5),
        )

    run = gpu.Run("cuda", False, 0.0)
    run.measurements = [measured("twingrad", 512, 1.0), measured("flash", 512, 1.5)]
    run.measurements += [measured("twingrad", 1024, 1.0), measured("flash", 1024, 1.1)]
    assert list(gpu.judged(run)) == [("attention D 64 causal forward speed of flash's", 1.1, 1.2)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = bench()
    assert done.returncode == 2
    assert done.stderr.startswith("error: bench gpu: no CUDA GPU is here")
    assert done.stderr.count("\n") == 1


def test_some_layers_at_tiny_sizes_with_somebody_s_kernel(tmp_path):
    kernel = tmp_path / "mine.py"
    kernel.write_text(
        "import torch\ndef gelu(x, approximate):\n    return torch.nn.functional.gelu(x, approximate=approximate)\n"
    )
    out = tmp_path / "gpu.json"
    done = bench("gelu", "--tiny", "--kernel", f"{kernel}:gelu", "--out", str(out))
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["kind"] == "gpu"
    assert document["versions"]["torch"]
    found = document["cases"]
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu, interpreted")
    assert found["ceilings"]["copy_gb_per_s"] > 0
    assert {m["peer"] for m in found["measurements"]} >= {"twingrad", "yours", "torch", "torch.compile"}
    for m in found["measurements"]:
        assert 0 < m["quartiles"][0] <= m["seconds"] <= m["quartiles"][1]
    assert (tmp_path / "gpu-bandwidth.png").stat().st_size > 10_000
    assert "triton gelu" in done.stdout, "checked before it is timed"


def test_a_failing_check_is_status_1_and_times_nothing(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "check", lambda run, layers: False)
    assert gpu.main(gpu.Options(layers=("gelu",), tiny=True)) == 1
    assert "nothing was timed" in capsys.readouterr().err


def test_a_training_step_of_each_set_of_operators():
    run = gpu.Run("cpu", True, float("inf"))
    gpu.measure_models(run)
    assert not run.left_out
    assert [(m["operators"], m["mode"]) for m in run.models] == [("triton", "eager"), ("torch", "eager")]
    assert all(m["tokens_per_s"] > 0 for m in run.models)

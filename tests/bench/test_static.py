"""The static gate: real compilations of a few kernels, and what it says about bad ones."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from bench import __main__ as bench
from bench import results, static

ROOT = Path(__file__).parents[2]
GOOD = static.Compiled(8, 128, 0, 65_536, {"HGMMA": 8}, {"16": 4, "4": 1})
ATTENTION = static.Launch("attention", (1, 4, 4, 128, 128, 64), "bfloat16", 0, "attention.forward_kernel", "")
TURN = static.Launch("rope", (2, 4, 128, 64), "bfloat16", 0, "rope.rotate_kernel", "")
NORM = static.Launch("layer_norm", (64, 2048), "bfloat16", 0, "layer_norm.forward_kernel", "")


def compile_with_bench(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "static", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_real_kernels_compile_and_are_compared_with_what_they_were(tmp_path):
    before, out = tmp_path / "before.json", tmp_path / "static.json"
    name = "dropout.dropout_kernel dropout 64x64 bfloat16 sm_90"
    known = {"registers": 1, "stack": 0, "shared": 0, "warps": 4, "resident": 8, "wide_share": 1.0}
    gone = "dropout.forgotten_kernel dropout 64x64 bfloat16 sm_90"
    not_asked_for = ["dropout.dropout_kernel dropout 64x64 bfloat16 sm_80", "gelu.gelu_kernel gelu 4x4 float32 sm_90"]
    results.write(before, "static", dict.fromkeys([name, gone, *not_asked_for], known))
    done = compile_with_bench("dropout", "--arch", "90", "--out", str(out), "--against", str(before))
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(out.read_text())["cases"]
    case = cases[name]
    assert 16 <= case["registers"] <= 255
    assert case["stack"] == 0
    assert case["wide_share"] == 1.0
    assert case["resident"] >= 8
    lines = done.stdout.splitlines()
    assert f"changed  {name}: registers 1 -> {case['registers']}" in lines
    assert not [line for line in lines if line.startswith("changed") and ("stack" in line or "wide_share" in line)]
    assert [line for line in lines if line.startswith("gone")] == [f"gone  {gone}"]
    assert {line for line in lines if line.startswith("new  ")} == {f"new  {other}" for other in cases if other != name}


@pytest.mark.parametrize(
    "launch, compiled, complaint",
    [
        (ATTENTION, GOOD, None),
        (ATTENTION, replace(GOOD, stack=224), "spills: 224 bytes of stack"),
        (ATTENTION, replace(GOOD, shared=300_000), "300000 bytes of shared memory, the limit is 232448"),
        (ATTENTION, replace(GOOD, matrix={"HMMA": 8}), "matrix products without HGMMA"),
        (replace(ATTENTION, dtype="float32"), replace(GOOD, matrix={}), None),
        (NORM, replace(GOOD, matrix={}), None),
        (NORM, replace(GOOD, widths={"2": 16, "16": 1}), "only 33% of bytes go 16 at a time: {'2': 16, '16': 1}"),
        (TURN, replace(GOOD, widths={"2": 16}), "only 0% of bytes go 16 at a time: {'2': 16}"),
        (replace(TURN, size=(2, 4, 128, 54)), replace(GOOD, widths={"2": 16}), None),
        (replace(NORM, size=(64, 1001)), replace(GOOD, widths={"2": 16}), None),
        (NORM, replace(GOOD, error="OutOfResources"), "does not compile: OutOfResources"),
    ],
)
def test_what_must_not_be_is_said(launch, compiled, complaint):
    assert list(static.violations(launch, 90, compiled)) == ([complaint] if complaint else [])


REACHED = """
import json
from bench import results, static
from kernels import attention, cached_attention

found = static.launches()
assert not static.unreached(found), static.unreached(found)
without = [launch for launch in found if launch.kernel != "gelu.backward_kernel"]
assert static.unreached(without) == ["gelu.backward_kernel"]
tiles, of_cached = set(), set()
for launch in found:
    options = static.record(launch.row, launch.size, launch.dtype)[launch.index].options
    if launch.kernel == "cached_attention.split_kernel":
        tile = tuple(options[name] for name in ("BLOCK_K", "num_warps", "num_stages"))
        of_cached.add((4 if launch.dtype == "float32" else 2, max(64, options["BLOCK_D"]), tile))
    if launch.kernel.startswith("attention."):
        tile = tuple(options[name] for name in ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages"))
        size = 4 if launch.dtype == "float32" else 2
        tiles.add((launch.kernel[10:-7], size, max(64, options["BLOCK_D"]), tile))
for (kernel, size), widths in attention.CONFIGURATIONS.items():
    for width, tiles_of_width in widths.items():
        for tile in tiles_of_width:
            assert (kernel, size, width, tile) in tiles, (kernel, size, width, tile)
for size, widths in cached_attention.CONFIGURATIONS.items():
    for width, tiles_of_width in widths.items():
        assert {(size, width, tile) for tile in tiles_of_width} <= of_cached, (size, width)
print("fine")
"""


def test_every_kernel_and_every_row_of_attention_s_tables_is_reached():
    """In a process that does not interpret: there kernels know their parameters."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", REACHED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "fine\n", done.stderr


def test_programs_that_fit_are_counted_by_what_runs_out_first():
    machine = static.ARCHITECTURES[90]
    assert machine.resident(replace(GOOD, registers=255, shared=0)) == 1
    assert machine.resident(replace(GOOD, registers=128, shared=0)) == 2
    assert machine.resident(replace(GOOD, registers=32, shared=113 * 1024)) == 2
    assert machine.resident(replace(GOOD, registers=16, shared=0)) == 8
    assert machine.resident(replace(GOOD, registers=16, shared=0, warps=1)) == 32


def test_widths_and_matrix_instructions_are_read_from_the_code():
    code = """
        /*0010*/  LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;
        /*0020*/  LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR6][R2.64] ;
        /*0030*/  LDG.E.U16 R4, desc[UR6][R2.64] ;
        /*0040*/  @P0 STG.E.64 desc[UR6][R2.64], R4 ;
        /*0050*/  LDG.E R4, desc[UR6][R2.64] ;
        /*0060*/  HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0070*/  LDS.128 R4, [R5] ;
    """
    assert static._widths(code) == {"16": 2, "8": 1, "4": 1, "2": 1}
    assert static._matrix(code) == {"HGMMA": 1}


def test_an_unknown_layer_is_one_line(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert bench.main(["static", "atention"]) == 2
    assert capsys.readouterr().err == "error: atention: no such operator\n"


@pytest.mark.parametrize(
    "text, complaint",
    [
        (None, "no such file"),
        ("{", "not a result: expected JSON"),
        (json.dumps({"format": 2, "kind": "cpu", "machine": {}, "cases": {}}), "expected a result of bench static"),
    ],
)
def test_what_is_no_earlier_result_is_one_line(tmp_path, monkeypatch, capsys, text, complaint):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "before.json"
    if text:
        path.write_text(text)
    assert bench.main(["static", "--against", str(path)]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1

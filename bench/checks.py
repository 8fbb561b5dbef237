"""What comes before any timing on a GPU: are the kernels right there?

Every operator's gates, the model's, and every operator once under compute-sanitizer, each in a process of its own, as
many at once as there are cores. Beside them, what will be timed is compiled, and kept in the compilers' caches.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.report import Findings
from gpt.parity import check, subjects
from gpt.parity.ops import ROWS

SANITIZER, FOUND_SOMETHING = "compute-sanitizer", 99
# PyTorch and Triton ask the driver for what it may not have: no error of theirs. And an access that is not allowed ends
# its kernel, not the whole process, whose own status would then be all that is heard.
TOOLS = {
    "memcheck": ["--report-api-errors", "no", "--destroy-on-device-error", "kernel"],
    "racecheck": [],
}


def run(findings: Findings, layers: Sequence[str], compiled: Sequence[str], until: float) -> bool:
    """Check these layers, or all and a model, and compile what times `compiled`. Whether all that was done by `until`,
    on time.monotonic()'s clock, is right; what was not done is noted in `findings`.
    """
    rows = [row for row in ROWS.values() if row.has_twin("kernels") and (not layers or row.layer in layers)]
    names = [row.name for row in rows] + ([] if layers else ["model"])
    jobs = {f"checks of {name}": _python("bench.checks", "gates", name) for name in names}
    if findings.device != "cpu, interpreted":
        sanitized = _sanitized(findings, _python("bench.checks", "once", *(row.name for row in rows)))
        jobs = sanitized | jobs | {f"compiling {name}": _python("bench.gpu", name) for name in compiled}
    good = True
    for name, done in zip(jobs, together(list(jobs.values()), until), strict=True):
        if done is None:
            if not name.startswith("compiling"):
                findings.left_out[name] = "not done in the time that checks may take"
        elif name in TOOLS:
            good &= _heed_sanitizer(findings, name, done)
        elif name.startswith("checks"):
            good &= _heed_check(findings, name, done)
    return good


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def _sanitized(findings: Findings, command: list[str]) -> dict[str, list[str]]:
    if not shutil.which(SANITIZER):
        findings.left_out[", ".join(TOOLS)] = f"{SANITIZER} is not on the PATH"
        return {}
    # Each tensor an allocation of its own: what lies beyond its end is then nobody's, and an access is seen.
    sanitizer = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", SANITIZER, "--error-exitcode", str(FOUND_SOMETHING)]
    return {tool: [*sanitizer, "--tool", tool, *options, *command] for tool, options in TOOLS.items()}


def together(commands: list[list[str]], until: float) -> list[subprocess.CompletedProcess[str] | None]:
    """Run commands side by side; None for one that was not done in time, and was ended."""
    running: list[subprocess.Popen[str]] = []
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }

    def one(command: list[str]) -> subprocess.CompletedProcess[str] | None:
        if time.monotonic() > until:
            return None
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # so that it can be ended with all that it started
        )
        running.append(process)
        try:
            out, err = process.communicate(timeout=max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            _end(process)
            return None
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        return list(pool.map(one, commands))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _heed_check(findings: Findings, name: str, done: subprocess.CompletedProcess[str]) -> bool:
    """Note what a check measured, print what failed."""
    try:
        results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    except json.JSONDecodeError:
        print(f"FAILED        {name}: {(done.stderr.splitlines() or ['ended without a word'])[-1]}")
        return False
    for operator, gate in dict.fromkeys((result["operator"], result["gate"]) for result in results):
        here = [result for result in results if (result["operator"], result["gate"]) == (operator, gate)]
        failed = [result for result in here if not result["passed"]]
        findings.checks.append({"operator": operator, "gate": gate, "measurements": len(here), "failures": len(failed)})
        print(
            f"{'FAILED' if failed else 'checked':12}  {operator}, {gate}: {len(here)} measurements, {len(failed)} bad"
        )
        for result in failed[:3]:
            off = "no number" if result["error"] is None else f"{result['error']:.3g}"
            where = f"[{result['case']}] {result['tensor']}"
            print(f"    {where} is off by {off}, bound {result['bound']:.3g} {result['note']}")
    return bool(results) and done.returncode == 0 and all(result["passed"] for result in results)


def _heed_sanitizer(findings: Findings, tool: str, done: subprocess.CompletedProcess[str]) -> bool:
    if done.returncode == FOUND_SOMETHING or re.search(r"Invalid __|ERROR SUMMARY: [1-9]", done.stdout):
        print("\n".join([f"FAILED        {tool}", *done.stdout.splitlines()[:40]]))
        findings.checks.append({"operator": "all", "gate": tool, "measurements": 1, "failures": 1})
        return tool == "racecheck"  # which may take the hardware's own asynchronous copies for a race: told, no more
    if done.returncode:
        said = [line.strip("= ") for line in (done.stdout + done.stderr).splitlines() if line.strip("= ")]
        findings.left_out[tool] = f"{SANITIZER} ended with status {done.returncode}: {(said or [''])[-1]}"[:200]
    else:
        findings.checks.append({"operator": "all", "gate": tool, "measurements": 1, "failures": 0})
        print(f"checked       {tool}: nothing found")
    return True


# What those processes do.


def gates(name: str) -> None:
    """Print, as JSON, all that `twingrad check` measures of one row of the table, or of the model on the kernels."""
    found = check.Report()
    rows = [] if name == "model" else [ROWS[name]]
    with check.one_thread():
        found.results += check.kernel_results(rows, name == "model", True, found.left_out, lambda what: None)
    print(found.to_json())


def each_once(names: Sequence[str]) -> None:
    """What runs under the sanitizer: operators, forward and backward, at a size that is no multiple of a block."""
    subject = subjects.kernels()
    for row in map(ROWS.__getitem__, names):
        for dtype in ("bfloat16", "float32"):
            row.problem(row.rounding[0], dtype).on(subject).run()


if __name__ == "__main__":
    errand, *names = sys.argv[1:]
    gates(*names) if errand == "gates" else each_once(names)

"""python -m bench static: every kernel in every shipped configuration, compiled ahead of time, without a GPU.

Which launches there are, the layers say themselves: they run on tensors without data, and their launches are recorded
(kernels/launch.py). Each is compiled for each architecture as Triton would at its first call, and taken apart with the
disassembler that comes with Triton. The columns:

warps       of a program, 32 threads each
registers   of a thread; 255 at most
stack       bytes of a thread beyond registers, which are memory: spills. The gate allows none
shared      KiB of a program
resident    programs that a multiprocessor holds at once, as far as registers, shared memory and threads go
matrix      instructions of the tensor cores: HMMA a warp's, HGMMA a warp group's (sm_90), UTCHMMA (sm_100)
16 bytes    share of the bytes which go to and from global memory 16 at a time

The gate: no stack; shared memory within the architecture's limit; attention in 16 bits uses HGMMA on sm_90, and tensor
cores everywhere; kernels that go through rows do so 16 bytes at a time where rows are aligned (beside what there is one
of for each row: less than 45% of a thread's bytes); and every kernel of `kernels/` was reached. On sm_100 all this is
noted, but does not fail: the tables of configurations are made for sm_80 and sm_90. It says nothing about time.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import results
from gpt.errors import UserError, require
from gpt.parity.ops import ROWS, Case

DTYPES = ("bfloat16", "float16", "float32")
WIDTHS = (64, 768, 1001, 2048, 4096, 8192, 16384)  # a block each, and one that is not aligned
TABLES = ("cos", "sin")  # arguments that are float32 whatever the others are
HEAD_DIMS = (32, 54, 64, 96, 128, 256)  # those that are no power of 2 have configurations of their own


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor has. From the CUDA C++ programming guide, table of technical specifications."""

    shared: int  # bytes of a multiprocessor
    shared_of_program: int  # bytes that a program may have
    registers: int = 65_536
    threads: int = 2048
    programs: int = 32

    def resident(self, kernel: Compiled) -> int:
        """How many programs fit. A warp's registers come in steps of 256, a program's shared memory has 1 KiB more."""
        of_warp = -(-kernel.registers * 32 // 256) * 256
        by_registers = self.registers // (of_warp * kernel.warps)
        by_shared = self.shared // (kernel.shared + 1024)
        return min(by_registers, by_shared, self.threads // (32 * kernel.warps), self.programs)


ARCHITECTURES = {
    80: Architecture(164 * 1024, 163 * 1024),
    90: Architecture(228 * 1024, 227 * 1024),
    100: Architecture(228 * 1024, 227 * 1024),
}


NOTED = 100  # what is wrong there is told, but is no failure


@dataclass(frozen=True)
class Launch:
    """One launch of a layer, and where it comes from: what a worker needs to record it again."""

    row: str
    size: tuple[int, ...]
    dtype: str
    index: int  # among the launches of forward and backward
    kernel: str  # "attention.forward_kernel"
    key: str  # whatever makes two compilations the same

    def __str__(self) -> str:
        return f"{self.kernel} {self.row} {'x'.join(map(str, self.size))} {self.dtype}"


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch."""

    warps: int
    registers: int
    stack: int
    shared: int
    matrix: dict[str, int]
    widths: dict[str, int]  # bytes of a global load or store -> how many of them
    error: str = ""

    @property
    def wide_share(self) -> float:
        """Of the bytes to and from global memory, the share that goes 16 at a time."""
        total = sum(int(width) * count for width, count in self.widths.items())
        return 16 * self.widths.get("16", 0) / total if total else 1.0


def sizes(row: str, dtype: str) -> list[tuple[int, ...]]:
    """Sizes of a row of the table of operators that between them reach every configuration.

    Configurations depend on the bytes of an element, so that float16 has to show little that bfloat16 has not.
    """
    layer, half = ROWS[row].layer, dtype == "float16"
    if layer == "attention":
        dims = (64,) if half else HEAD_DIMS if row == "attention" else (64, 128, 256)
        return [(1, 4, 2 if "grouped" in row or "dropout" in row else 4, 128, 128, D) for D in dims]
    if layer == "cached_attention":
        return [(2, 4, 2 if "grouped" in row else 4, 1, 1024, D) for D in ((64,) if half else HEAD_DIMS)]
    if layer == "linear_cross_entropy":
        return [(50_257, 64, 64)]
    if layer == "cross_entropy":
        return [(4, 1024), (4, 50_257)] if row == layer else []
    if layer == "rope":
        return [(2, 4, 128, D) for D in ((64,) if half or "rows" in row else HEAD_DIMS)]
    if layer.endswith("_norm"):
        return [(64, C) for C in ((768,) if half or row != layer else WIDTHS)]
    return [(64, C) for C in ((768,) if half else (64, 768, 1001))]


def launches(names: Sequence[str] = ()) -> list[Launch]:
    """All launches of these layers, or of all, each compilation once."""
    found: dict[str, Launch] = {}
    for row in ROWS.values():
        if not row.has_twin("kernels") or (names and row.layer not in names and row.name not in names):
            continue
        for dtype in DTYPES:
            for size in sizes(row.name, dtype):
                for index, recorded in enumerate(record(row.name, size, dtype)):
                    layer = recorded.kernel.fn.__module__.removeprefix("kernels.")
                    key = f"{layer} {recorded.kernel.__name__} {specialize(recorded)} {options(recorded)}"
                    launch = Launch(row.name, size, dtype, index, f"{layer}.{recorded.kernel.__name__}", key)
                    found.setdefault(key, launch)
    return list(found.values())


@cache
def record(row: str, size: tuple[int, ...], dtype: str) -> list[Any]:
    """What forward and backward would launch on such inputs."""
    import numpy as np
    import torch

    from kernels import launch

    def without_data(name: str, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        tensor = torch.from_numpy(value)
        kind = getattr(torch, "float32" if name in TABLES else dtype) if tensor.is_floating_point() else tensor.dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device="meta")

    operator = ROWS[row]
    arguments = operator.draw(np.random.default_rng(0), Case(size))
    with launch.recorded() as recorded:
        found, saved = operator.twin("kernels").forward(*map(without_data, arguments, arguments.values()))
        dy = tuple(map(torch.empty_like, found)) if isinstance(found, tuple) else torch.empty_like(found)
        if operator.gradients:
            operator.twin("kernels").backward(dy, saved)
    return recorded


def specialize(launch: Any) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and what is known to be divisible by 16, as Triton finds them when a kernel is called.

    Memory from PyTorch begins at multiples of 16 bytes.
    """
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.options
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (not _is_plain(parameter, value) and value == 1):
            types[name], constants[name] = "constexpr", value
        elif hasattr(value, "dtype"):
            types[name] = "*" + POINTERS[str(value.dtype).removeprefix("torch.")]
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible[(i,)] = [["tt.divisibility", 16]]
        else:
            types[name] = parameter.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            if not _is_plain(parameter, value) and value % 16 == 0:
                divisible[(i,)] = [["tt.divisibility", 16]]
    return types, constants, divisible


POINTERS = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "int64": "i64",
    "int32": "i32",
}


def _is_plain(parameter: Any, value: Any) -> bool:
    """Whether nothing is made of what a value is: it may be another one at the next call."""
    return hasattr(value, "dtype") or parameter.do_not_specialize or bool(parameter.annotation_type)


def options(launch: Any) -> dict[str, int]:
    """num_warps and num_stages."""
    return {name: value for name, value in launch.options.items() if name not in launch.kernel.arg_names}


def compile_for(launch: Any, architecture: int) -> Compiled:
    """Compile a recorded launch, and take apart what comes out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, divisible = specialize(launch)
    source = ASTSource(launch.kernel, types, constants, divisible)
    target = GPUTarget("cuda", architecture, 32)
    try:
        kernel = triton.compile(source, target=target, options=options(launch))
    except Exception as error:  # of whatever kind: it is the compiler's answer
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Compiled(0, 0, 0, 0, {}, {}, f"{type(error).__name__}: {lines[-1] if lines else error}"[:200])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if not found:
        return Compiled(0, 0, 0, 0, {}, {}, f"cuobjdump: no usage of registers in {usage[:100]!r}")
    registers, stack, local = map(int, found.groups())
    return Compiled(
        kernel.metadata.num_warps, registers, stack + local, kernel.metadata.shared, _matrix(code), _widths(code)
    )


def _cuobjdump(*arguments: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def _matrix(code: str) -> dict[str, int]:
    return dict(sorted(Counter(re.findall(r"\b(HMMA|HGMMA|IMMA|DMMA|UTC\w*MMA)\b", code)).items()))


def _widths(code: str) -> dict[str, int]:
    """Global loads, also those straight to shared memory, and stores, by bytes of a thread."""
    found: Counter[str] = Counter()
    for modifiers in re.findall(r"\b(?:LDG|STG|LDGSTS)((?:\.\w+)+)", code):
        parts = modifiers.split(".")
        named = {"128": "16", "64": "8", "U16": "2", "S16": "2", "U8": "1", "S8": "1"}
        found[next((named[part] for part in parts if part in named), "4")] += 1
    return dict(sorted(found.items(), key=lambda item: -int(item[0])))


# The gate.


def violations(launch: Launch, architecture: int, compiled: Compiled) -> Iterator[str]:
    """What must not be, in words."""
    if compiled.error:
        yield f"does not compile: {compiled.error}"
        return
    if compiled.stack:
        yield f"spills: {compiled.stack} bytes of stack"
    limit = ARCHITECTURES[architecture].shared_of_program
    if compiled.shared > limit:
        yield f"{compiled.shared} bytes of shared memory, the limit is {limit}"
    if launch.kernel.startswith("attention.") and launch.dtype != "float32":
        # Rows of a warp group's product come 64 at a time; for the widest heads a tile of so many keys does not fit.
        narrow = launch.kernel == "attention.dk_dv_kernel" and launch.size[-1] > 128
        wanted = "HGMMA" if architecture == 90 and not narrow else "MMA"
        if not any(wanted in name for name in compiled.matrix):
            yield f"matrix products without {wanted}"
    if _has_aligned_rows(launch) and compiled.wide_share < 0.55:
        yield f"only {compiled.wide_share:.0%} of bytes go 16 at a time: {compiled.widths}"


def _has_aligned_rows(launch: Launch) -> bool:
    """Rows begin at multiples of 16 bytes, and have more than 16 bytes for each thread."""
    if launch.kernel.startswith("linear_cross_entropy."):
        return True
    if launch.kernel.startswith("rope."):
        return launch.size[-1] % 16 == 0
    return "attention." not in launch.kernel and launch.size[-1] % 16 == 0 and launch.size[-1] >= 768


def unreached(found: Sequence[Launch]) -> list[str]:
    """Kernels of `kernels/` that no launch was recorded of."""
    import kernels

    names = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        for name, value in vars(importlib.import_module(f"kernels.{module.name}")).items():
            if name.endswith("_kernel") and value.fn.__module__ == f"kernels.{module.name}":
                names.add(f"{module.name}.{name}")
    return sorted(names - {launch.kernel for launch in found})


# The command.


def main(names: Sequence[str], architectures: Sequence[int], out: Path | None, against: Path | None) -> int:
    """Compile, print, write, compare. 1 where the gate does not hold. UserError for an unknown layer."""
    if os.environ.pop("TRITON_INTERPRET", None):  # read when a kernel is decorated: too late in this process
        return subprocess.run([sys.executable, "-m", "bench", *sys.argv[1:]], check=False).returncode
    require("triton", extra="torch")
    before = _read(against) if against else {}
    if unknown := set(names) - {key for row in ROWS.values() for key in (row.name, row.layer)}:
        raise UserError(f"{sorted(unknown)[0]}: no such operator")
    found = launches(names)
    compiled = compile_all(found, architectures or tuple(ARCHITECTURES))
    show(compiled)
    cases = {
        f"{launch} sm_{architecture}": _summary(architecture, made) for (launch, architecture), made in compiled.items()
    }
    # What was not asked for is not gone.
    operators = {row.name for row in ROWS.values() if not names or {row.name, row.layer} & set(names)}
    ends = tuple(f" sm_{architecture}" for architecture in architectures or ARCHITECTURES)
    before = {name: case for name, case in before.items() if name.endswith(ends) and name.split()[1] in operators}
    for line in changes(before, cases) if against else ():
        print(line)
    found_wrong = {
        architecture: [
            f"{launch} sm_{architecture}: {line}"
            for (launch, each), made in compiled.items()
            if each == architecture
            for line in violations(launch, architecture, made)
        ]
        for architecture in ARCHITECTURES
    }
    for line in found_wrong.pop(NOTED):
        print(f"noted  {line}")
    failures = [line for lines in found_wrong.values() for line in lines]
    failures += [f"{name}: no launch of it was found" for name in (unreached(found) if not names else [])]
    for line in failures:
        print(f"FAILED  {line}")
    print(
        f"{len(compiled)} compilations of {len({launch.kernel for launch in found})} kernels, {len(failures)} failures"
    )
    if out:
        results.write(out, "static", dict(sorted(cases.items())))
    return 1 if failures else 0


def _read(path: Path) -> dict[str, Any]:
    """The compilations that an earlier run wrote. UserError for another file."""
    document = results.read(path)
    if document["kind"] != "static":
        raise UserError(f"--against {path}: expected a result of bench static, got one of {document['kind']!r}")
    return document["cases"]


def compile_all(found: Sequence[Launch], architectures: Sequence[int]) -> dict[tuple[Launch, int], Compiled]:
    """Every launch for every architecture, on all cores."""
    jobs = [(launch, architecture) for launch in found for architecture in architectures]
    done: dict[tuple[Launch, int], Compiled] = {}
    begun = time.monotonic()
    fresh = multiprocessing.get_context("spawn")  # a forked process would share PyTorch's threads, and wait for them
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), fresh) as pool:
        for job, made in zip(jobs, pool.map(_compile_job, jobs, chunksize=2), strict=True):
            done[job] = made
            if sys.stderr.isatty():
                left = (time.monotonic() - begun) / len(done) * (len(jobs) - len(done))
                print(f"\r\033[Kcompiled {len(done)} of {len(jobs)}, {left:.0f} s left", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return done


def _compile_job(job: tuple[Launch, int]) -> Compiled:
    launch, architecture = job
    return compile_for(record(launch.row, launch.size, launch.dtype)[launch.index], architecture)


def _summary(architecture: int, made: Compiled) -> dict[str, Any]:
    resident = 0 if made.error else ARCHITECTURES[architecture].resident(made)
    return {**asdict(made), "resident": resident, "wide_share": round(made.wide_share, 3)}


def show(compiled: dict[tuple[Launch, int], Compiled]) -> None:
    """A line a compilation."""
    head = (
        "kernel",
        "operator, size, type",
        "sm",
        "warps",
        "registers",
        "stack",
        "shared",
        "resident",
        "matrix",
        "16 bytes",
    )
    table = Table(*head, box=None)
    for (launch, architecture), made in compiled.items():
        case = f"{launch.row} {'x'.join(map(str, launch.size))} {launch.dtype}"
        if made.error:
            table.add_row(launch.kernel, case, str(architecture), made.error)
            continue
        matrix = " ".join(f"{name} {count}" for name, count in made.matrix.items())
        numbers = (made.warps, made.registers, made.stack, f"{made.shared / 1024:.1f}")
        resident = ARCHITECTURES[architecture].resident(made)
        cells = (*map(str, numbers), str(resident), matrix, f"{made.wide_share:.0%}")
        table.add_row(launch.kernel, case, str(architecture), *cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What is not as it was, a line each."""
    for name in sorted(before.keys() | now.keys()):
        if name not in before or name not in now:
            yield f"{'new' if name in now else 'gone'}  {name}"
            continue
        for field in ("registers", "stack", "shared", "warps", "resident", "wide_share"):
            if before[name][field] != now[name][field]:
                yield f"changed  {name}: {field} {before[name][field]} -> {now[name][field]}"

"""How kernels round: wide arithmetic inside, one rounding on the way out; and the mask of dropout.

A kernel computes in float32 whatever it loads, and in float64 if that is what it loads, which is for the interpreter:
there an error of algebra stands out from rounding by ten orders of magnitude.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Read once, as Triton does when it decorates a kernel. The interpreter's bfloat16 has to be worked around: it cuts
# digits off where a GPU rounds, and multiplies bit patterns in `tl.dot`.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y"))


@triton.jit
def wide(x):
    """x in the type that kernels compute in."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x to the nearest number of `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a b, exact products of what a and b hold."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)

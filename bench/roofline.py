"""What the machine can do at most, measured in the same run: bytes copied and products summed in a second."""

from __future__ import annotations

from statistics import median

import torch

from bench import clock

UNITS = {"GB/s": "copy", "TFLOP/s": "bfloat16"}  # which ceiling a rate in this unit is held against


def ceilings(device: str, tiny: bool = False) -> dict[str, float]:
    """ "copy": GB/s of a copy far larger than the caches, read and written; TFLOP/s of products of random matrices in
    "bfloat16", "float32" and, on a GPU, "tf32"."""
    elements, n = (2**16, 64) if tiny else (2**30, 8192)
    source = torch.randint(0, 256, (elements,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * elements / _median(lambda: target.copy_(source), device, tiny) / 1e9}
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision  # and not allow_tf32, after which "none" is "ieee", another key of Inductor's cache
    for name in ("bfloat16", "float32", "tf32")[: 3 if device == "cuda" else 2]:
        matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in "ab")
        found[name] = 2 * n**3 / _median(lambda a=a, b=b: a @ b, device, tiny) / 1e12
    matmul.fp32_precision = before
    return found


def _median(call: clock.Call, device: str, tiny: bool) -> float:
    return median(clock.times({"": call}, device, 0.02 if tiny else 0.5)[""])

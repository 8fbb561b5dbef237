"""What the machine can do at most, measured in the same run: bytes copied and products summed in a second."""

from __future__ import annotations

from collections.abc import Callable

import torch

Timer = Callable[[Callable[[], object]], float]  # a function -> seconds, the median of many


def ceilings(device: str, timer: Timer, tiny: bool = False) -> dict[str, float]:
    """copy_gb_per_s: of a copy far larger than the caches, read and written; TFLOP/s of products of random matrices."""
    elements = 2**16 if tiny else 2**29
    source = torch.randint(0, 256, (elements,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy_gb_per_s": 2 * elements / timer(lambda: target.copy_(source)) / 1e9}
    n = 64 if tiny else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in "ab")
        name = str(dtype).removeprefix("torch.")
        found[f"{name}_tflop_per_s"] = 2 * n**3 / timer(lambda a=a, b=b: a @ b) / 1e12
    return found

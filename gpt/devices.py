"""Which device PyTorch computes on: the first of CUDA, Apple's MPS and the CPU that this machine has."""

from __future__ import annotations

from types import ModuleType

__all__ = ["available_devices", "pick_device"]


def available_devices(torch: ModuleType) -> list[str]:
    """PyTorch's device types that can be used here, best first; "cpu" is always the last."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, usable in found.items() if usable]


def pick_device(torch: ModuleType) -> str:
    """The device type that `--device auto` means."""
    return available_devices(torch)[0]

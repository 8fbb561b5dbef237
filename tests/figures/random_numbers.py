"""PyTorch's random stream, replayed."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpt.errors import require
from reference.config import GPTConfig
from reference.torch_rng import Generator
from tests.figures.engines import BOOK_256, Layers, seeded
from tests.figures.registry import figure


@figure("rng.numpy_mt19937")
def differences_from_torch() -> dict[str, float]:
    """Largest differences of our draws from PyTorch's own, each after seed 123."""
    torch = require("torch", extra="torch")

    def theirs() -> Any:
        return torch.Generator().manual_seed(123)

    pairs = {
        f"randn_{n}": (Generator(123).normal(n), torch.randn(n, generator=theirs())) for n in (15, 18, 37, 64, 1000)
    }
    pairs["rand"] = Generator(123).rand(1000), torch.rand(1000, generator=theirs())
    for n in (5, 1000):
        pairs[f"randperm{n}"] = Generator(123).randperm(n), torch.randperm(n, generator=theirs())
    pairs["randint64"] = (
        np.array(Generator(123).randint64()),
        torch.empty((), dtype=torch.int64).random_(generator=theirs()),
    )
    return {name: float(np.abs(ours - tensor.numpy()).max()) for name, (ours, tensor) in pairs.items()}


@figure("rng.gpt124m_ctx256.init")
def seeded_weights(layers: Layers) -> dict[str, Any]:
    """First and last three numbers of some parameters: ours, or those of PyTorch's own modules and stream."""
    params = seeded(BOOK_256)[0] if layers.name == "numpy" else _drawn_by_torch(BOOK_256)
    names = ("tok_emb.weight", "pos_emb.weight", "blocks.0.attn.query.weight", "blocks.11.mlp.down.bias", "head.weight")
    return {name: np.concatenate([params[name].ravel()[:3], params[name].ravel()[-3:]]).tolist() for name in names}


def _drawn_by_torch(config: GPTConfig) -> dict[str, np.ndarray]:
    import torch

    from gpt.model import GPT

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        return {name: p.detach().numpy() for name, p in GPT(config).named_parameters()}

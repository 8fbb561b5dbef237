"""Initial weights, drawn from PyTorch's random stream.

book    what the book's PyTorch modules draw when they are built: embeddings N(0, 1), linear weights and biases
        U(-b, b), b = 1 / sqrt(fan_in) (He et al. 2015 with a slope of sqrt(5), the default of torch.nn.Linear)
gpt2    weights N(0, 0.02), biases 0; a projection that ends on a shortcut N(0, 0.02 / sqrt(2 n_layers)) (Radford et al.
        2019, section 2.3)

Both draw in the order of the forward pass, in which the book's modules are built too. Norms draw nothing. A low-rank
adapter's A is drawn as the book's linear weights are, and its B is 0, see lora.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from reference.config import GPTConfig
from reference.torch_rng import Generator

SCHEMES = ("book", "gpt2")


def initialize(
    config: GPTConfig, generator: Generator, scheme: str = "book", names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """Name -> float32 array for every parameter of `config`, or for those of `names` alone.

    Raises ValueError for a scheme not in SCHEMES.

    With `Generator(seed)` and scheme "book" these are, bit for bit, the weights after torch.manual_seed(seed).
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    params: dict[str, np.ndarray] = {}
    shapes = config.parameter_shapes()
    for name, shape in shapes.items():
        if names is not None and name not in names:
            continue
        module, kind = name.rsplit(".", 1)
        if kind == "lora_b":
            params[name] = np.zeros(shape, np.float32)
        elif kind == "lora_a":
            params[name] = generator.uniform(shape, -1 / math.sqrt(shape[1]), 1 / math.sqrt(shape[1]))
        elif "norm" in module:
            params[name] = np.full(shape, kind == "weight", np.float32)
        elif scheme == "gpt2":
            residual = module.endswith(("attn.out", "mlp.down"))
            std = 0.02 / math.sqrt(2 * config.n_layers) if residual else 0.02
            params[name] = generator.normal(shape, 0.0, std) if kind == "weight" else np.zeros(shape, np.float32)
        elif module in ("tok_emb", "pos_emb"):
            params[name] = generator.normal(shape)
        else:
            fan_in = shapes[f"{module}.weight"][1]
            params[name] = generator.uniform(shape, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
    return params

"""The key-value cache of `reference/cache.py` for the PyTorch model, on its device."""

from __future__ import annotations

import numpy as np
import torch

from reference.config import GPTConfig


class Cache:
    """See reference.cache.Cache. `lengths` (B,) is NumPy's, on the host, so that nobody waits for a device."""

    def __init__(
        self, config: GPTConfig, rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (config.n_layers, rows, config.n_kv_heads, capacity, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.lengths = np.zeros(rows, np.int64)

    def begin(self, T: int) -> None:
        """Before the layers store T new tokens for each row: where they go."""
        device = self.keys.device
        self.starts = torch.from_numpy(self.lengths.copy()).to(device)  # (B,)
        self.rows = torch.arange(len(self.lengths), device=device)[:, None]
        self.columns = self.starts[:, None] + torch.arange(T, device=device)  # (B, T)
        self.end = int(self.lengths.max()) + T

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v (B, G, T, D) of one layer's new tokens -> those of all its tokens so far, both (B, G, S, D)."""
        for all_of_it, new in ((self.keys, k), (self.values, v)):
            all_of_it[layer][self.rows, :, self.columns] = new.transpose(1, 2)
        return self.keys[layer, :, :, : self.end], self.values[layer, :, :, : self.end]

    def advance(self, counts: np.ndarray | int) -> None:
        """Count the new tokens in, `counts` of each row (B,) or of all, once all layers have stored them."""
        self.lengths += counts

    def select(self, rows: np.ndarray) -> None:
        """Go on with these rows alone, indices (R,) in this order."""
        chosen = torch.from_numpy(np.asarray(rows)).to(self.keys.device)
        self.keys, self.values = self.keys[:, chosen], self.values[:, chosen]
        self.lengths = self.lengths[rows]

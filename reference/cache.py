"""The key-value cache: what attention needs of the tokens that a model has read, so that it reads each of them once.

The keys and values of a token depend on the tokens before it only. So to continue a text, the model reads its new
tokens alone, and their queries look at the keys of all.
"""

from __future__ import annotations

import numpy as np

from reference.config import GPTConfig


class Cache:
    """Keys and values of the rows of a batch, which may be of different lengths: row b holds `lengths[b]` tokens.

    New tokens take the columns after a row's own length; what lies there from before is never looked at.
    """

    def __init__(self, config: GPTConfig, rows: int, capacity: int, dtype: str = "float32") -> None:
        shape = (config.n_layers, rows, config.n_kv_heads, capacity, config.head_dim)
        self.keys, self.values = np.zeros(shape, dtype), np.zeros(shape, dtype)
        self.lengths = np.zeros(rows, np.int64)

    def store(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """k and v (B, G, T, D) of one layer's new tokens -> those of all its tokens so far, both (B, G, S, D)."""
        B, _, T, _ = k.shape
        rows, columns = np.arange(B)[:, None], self.lengths[:, None] + np.arange(T)  # (B, 1), (B, T)
        S = int(self.lengths.max()) + T
        for all_of_it, new in ((self.keys, k), (self.values, v)):
            all_of_it[layer][rows, :, columns] = new.transpose(0, 2, 1, 3)
        return self.keys[layer, :, :, :S], self.values[layer, :, :, :S]

    def advance(self, counts: np.ndarray | int) -> None:
        """Count the new tokens in, `counts` of each row (B,) or of all, once all layers have stored them."""
        self.lengths += counts

    def select(self, rows: np.ndarray) -> None:
        """Go on with these rows alone, indices (R,) in this order."""
        self.keys, self.values, self.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]

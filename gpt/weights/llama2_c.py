"""Training checkpoints of Karpathy's llama2.c and its kin: one file of torch.save with weights, settings and more.

    {"model": {"tok_embeddings.weight": ..., "layers.0.attention.wq.weight": ..., ...}, "model_args": {"dim": ...}, ...}

Settings are a mapping, or an object of one of the classes that such code calls them. An object's class is never looked
up, let alone run: an empty class of ours stands in for it, by its name in `SETTINGS_CLASSES`; any other class is
refused. What torch.compile puts before names, `_orig_mod.`, is taken away.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt.errors import UserError, require
from gpt.weights.names import FORMATS, to_ours
from gpt.weights.native import SavedModel
from gpt.weights.tensors import Stored, stored_tensors, unpickled
from reference.config import GPTConfig

__all__ = ["SETTINGS_CLASSES", "read_checkpoint"]

MODEL_KEYS = ("model", "model_state_dict", "state_dict")
SETTINGS_KEYS = ("model_args", "config", "model_config", "args")
SETTINGS_CLASSES = ("ModelArgs", "LlamaConfig", "TransformerConfig", "GPTConfig")
COMPILED = "_orig_mod."
BUFFERS = ("freqs_cos", "freqs_sin", "freqs_cis", "rope.freqs")  # tables, no parameters
DEFAULT_EPS = 1e-5


class Settings:
    """Stands in for a pickled settings object: its attributes, and nothing that runs."""


def read_checkpoint(path: Path) -> SavedModel:
    """The model in such a file. Raises UserError for a file that is none, or that asks for more."""
    loaded = unpickled(path, _stand_ins(path))
    state, settings = _find(loaded, MODEL_KEYS), _find(loaded, SETTINGS_KEYS)
    if not isinstance(state, Mapping) or settings is None:
        raise UserError(
            f"{path}: not a model of its own: expected a mapping with {' or '.join(MODEL_KEYS)}, "
            f"and {' or '.join(SETTINGS_KEYS)}; weights alone need a config.json beside them"
        )
    tensors = stored_tensors(path, {str(name).removeprefix(COMPILED): tensor for name, tensor in state.items()})
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(BUFFERS)}
    config = _config(path, settings if isinstance(settings, Mapping) else vars(settings), tensors)
    if config.tie_embeddings:
        tensors.pop("output.weight", None)
    return SavedModel(to_ours(FORMATS["llama2.c"], config, tensors, str(path)), config, None)


def _stand_ins(path: Path) -> list[tuple[type, str]]:
    """Names of settings classes that the file asks for, whatever module it says they are in."""
    torch = require("torch", extra="torch")
    try:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged file, which `unpickled` has words for; or an old one, which carries no settings
        return []
    return [(Settings, name) for name in wanted if name.rpartition(".")[2] in SETTINGS_CLASSES]


def _find(loaded: Any, keys: tuple[str, ...]) -> Any:
    return next((loaded[key] for key in keys if key in loaded), None) if isinstance(loaded, Mapping) else None


def _config(path: Path, settings: Mapping[str, Any], tensors: Mapping[str, Stored]) -> GPTConfig:
    """Sizes from the settings, and from the tensors where those say no more than a rule."""
    try:
        heads = settings["n_heads"]
        embedding, gate = (tensors[name] for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"))
        head, key = tensors.get("output.weight"), tensors["layers.0.attention.wk.weight"]
        tied = head is None or (head.shape == embedding.shape and np.array_equal(head, embedding))
        head_dim = tensors["layers.0.attention.wq.weight"].shape[0] // heads
        return GPTConfig(
            vocab_size=embedding.shape[0],
            context_length=settings.get("max_seq_len") or settings.get("context_length") or settings["block_size"],
            emb_dim=embedding.shape[1],
            n_layers=settings["n_layers"],
            n_heads=heads,
            n_kv_heads=key.shape[0] // head_dim,
            head_dim=head_dim,
            mlp_dim=gate.shape[0],
            norm="rms_norm",
            norm_eps=settings.get("norm_eps", DEFAULT_EPS),
            mlp="swiglu",
            position="rope",
            rope_theta=settings.get("rope_theta", 10000.0),
            rope_interleaved=True,
            qkv_bias="layers.0.attention.wq.bias" in tensors,
            bias="layers.0.feed_forward.w1.bias" in tensors,
            tie_embeddings=tied,
        )
    except KeyError as error:
        raise UserError(f"{path}: not a Llama of this kind: lacks {error}") from None
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None

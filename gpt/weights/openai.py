"""OpenAI's GPT-2 checkpoints, read by TensorFlow: hparams.json, and the variables of a TensorFlow 1 Saver.

Query, key and value are one variable, model/h0/attn/c_attn/w, of shape (1, in, 3 in); so are all projections stored,
with a leading axis and (in, out). TensorFlow verifies a checksum of each variable as it reads it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np

from gpt.errors import UserError, require
from gpt.weights.names import FORMATS, to_ours
from gpt.weights.native import SavedModel
from gpt.weights.tensors import Stored
from reference.config import GPTConfig

__all__ = ["is_checkpoint", "read_checkpoint", "read_variables"]

HPARAMS = "hparams.json"
OPTIMIZER = re.compile(r".*/Adam(_\d+)?|beta\d_power.*|global_step")  # of those who trained further


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like one of these checkpoints."""
    return (folder / HPARAMS).exists()


def read_checkpoint(folder: Path) -> SavedModel:
    """The model in such a folder. Raises UserError, also where TensorFlow is not installed."""
    config = _config(folder / HPARAMS)
    params = to_ours(FORMATS["openai-gpt2"], config, read_variables(folder), str(folder))
    return SavedModel(params, config, {"name": "gpt2"} if config.vocab_size == 50257 else None)


def read_variables(folder: Path) -> dict[str, Stored]:
    """All variables of a TensorFlow checkpoint by name, without an optimizer's."""
    if not (folder / "checkpoint").exists() and not list(folder.glob("*.index")):
        raise UserError(f"{folder}: holds no TensorFlow checkpoint, no file `checkpoint` and no *.index")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it has much to say about the machine otherwise
    tensorflow = require("tensorflow", extra="openai")
    try:
        # What the file `checkpoint` says first is the newest one's name; whose folder it names is of no matter.
        place = (
            tensorflow.train.latest_checkpoint(str(folder)) or str(sorted(folder.glob("*.index"))[0])[: -len(".index")]
        )
        reader = tensorflow.train.load_checkpoint(place)
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    except Exception as error:  # what a damaged file raises is not documented
        raise UserError(f"{folder}: not a readable TensorFlow checkpoint: {_one_line(error)}") from None

    def stored(name: str) -> Stored:
        def read() -> np.ndarray:
            try:
                return reader.get_tensor(name)
            except Exception as error:
                raise UserError(f"{folder}: {name} could not be read: {_one_line(error)}") from None

        dtype = np.dtype(dtypes[name].as_numpy_dtype)
        return Stored(tuple(shapes[name]), dtype, dtype.name, read)

    return {name: stored(name) for name in sorted(shapes) if not OPTIMIZER.fullmatch(name)}


def _config(path: Path) -> GPTConfig:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        sizes = [given[name] for name in ("n_vocab", "n_ctx", "n_embd", "n_layer", "n_head")]
        return GPTConfig(*sizes, qkv_bias=True, tie_embeddings=True)
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error.strerror}") from None
    except KeyError as error:
        raise UserError(f"{path}: lacks {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

"""OpenAI's GPT-2 checkpoints, read by TensorFlow: hparams.json, and the variables of a TensorFlow 1 Saver.

Query, key and value are one variable, model/h0/attn/c_attn/w, of shape (1, in, 3 in); so are all projections stored,
with a leading axis and (in, out). TensorFlow verifies a checksum of each variable as it reads it.

TensorFlow and PyTorch in one process may crash it. So TensorFlow has one of its own, `python -m gpt.weights.openai`,
which writes the variables under their names into a safetensors file in the cache, once for each checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

from gpt.data.catalogue import cache_folder
from gpt.data.files import replace
from gpt.errors import UserError, check_installed, require
from gpt.options import read_json
from gpt.weights.huggingface import read_tokenizer
from gpt.weights.names import FORMATS, to_ours
from gpt.weights.native import SavedModel
from gpt.weights.tensors import Stored, read_safetensors, write_safetensors
from reference.config import GPTConfig

__all__ = ["HPARAMS", "dump_of", "is_checkpoint", "read_checkpoint", "read_variables"]

HPARAMS = "hparams.json"
OPTIMIZER = re.compile(r".*/Adam(_\d+)?|beta\d_power.*|global_step")  # of those who trained further


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like one of these checkpoints."""
    return (folder / HPARAMS).exists()


def read_checkpoint(folder: Path) -> SavedModel:
    """The model in such a folder. Raises UserError, also where TensorFlow is not installed."""
    config = _config(folder / HPARAMS)
    params = to_ours(FORMATS["openai-gpt2"], config, read_variables(folder), str(folder))
    return SavedModel(params, config, read_tokenizer(folder, config))


def read_variables(folder: Path) -> dict[str, Stored]:
    """All variables of a TensorFlow checkpoint by name, without an optimizer's."""
    dump = dump_of(folder)
    if not dump.exists():
        check_installed("tensorflow", extra="openai")
        command = [sys.executable, "-m", "gpt.weights.openai", str(folder), str(dump)]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            why = done.stderr.strip().splitlines() or [f"TensorFlow's process ended with status {done.returncode}"]
            raise UserError(f"{folder}: {why[-1].removeprefix('error: ')}")
    return read_safetensors(dump)[0]


def dump_of(folder: Path) -> Path:
    """Where the cache keeps the variables of the checkpoint that is in this folder now. UserError if there is none."""
    indexes = sorted(folder.glob("*.index"))
    if not indexes:
        raise UserError(f"{folder}: holds no TensorFlow checkpoint, no *.index")
    files = [path for path in sorted(folder.iterdir()) if path.name == "checkpoint" or ".ckpt" in path.name]
    now = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in (*files, *indexes)]
    return cache_folder() / "weights" / f"tensorflow-{hashlib.sha256(repr(now).encode()).hexdigest()[:16]}.safetensors"


def _config(path: Path) -> GPTConfig:
    given = read_json(path)
    try:
        V, T, C, L, H = (given[name] for name in ("n_vocab", "n_ctx", "n_embd", "n_layer", "n_head"))
        return GPTConfig(V, T, C, L, H, qkv_bias=True, tie_embeddings=True)
    except KeyError as error:
        raise UserError(f"{path}: lacks {error}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None


def main(folder: Path, target: Path) -> None:
    """Write the variables of the checkpoint in `folder` to `target`, whole or not at all. Raises UserError."""
    tensorflow = require("tensorflow", extra="openai")
    try:
        # What the file `checkpoint` says first is the newest one's name, and in which folder that was written; the one
        # given may be a copy.
        state = tensorflow.train.get_checkpoint_state(str(folder))
        index = folder / f"{Path(state.model_checkpoint_path).name}.index" if state else None
        index = index if index and index.is_file() else sorted(folder.glob("*.index"))[0]
        reader = tensorflow.train.load_checkpoint(str(index).removesuffix(".index"))
        names = [name for name in sorted(reader.get_variable_to_shape_map()) if not OPTIMIZER.fullmatch(name)]
        arrays = {name: reader.get_tensor(name) for name in names}
    except Exception as error:  # what a damaged file raises is not documented
        raise UserError(f"not a readable TensorFlow checkpoint: {' '.join(str(error).split())[:300]}") from None
    part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(part, arrays, {})
        replace(part, target)
    except OSError as error:
        raise UserError(f"{target}: could not be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)

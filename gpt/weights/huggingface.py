"""Folders as Hugging Face's transformers has them: config.json, weights in one file or several, a tokenizer."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt import tokenizers
from gpt.errors import UserError
from gpt.weights.names import FORMATS, from_ours, to_ours
from gpt.weights.native import SavedModel, flush
from gpt.weights.tensors import Stored, read_pickle, read_safetensors, read_sharded, write_safetensors
from reference.config import GPTConfig

__all__ = ["read_folder", "read_tensors", "save_folder"]

CONFIG, INDEX = "config.json", ".index.json"
TOKENIZER = "twingrad.json"  # beside their files: the spec of a tokenizer that they have no form for
SHARD_SIZE = 5 * 10**9  # bytes; what is larger is written in several files
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # older files carry the causal mask, which is no parameter


def read_folder(folder: Path) -> SavedModel:
    """A model's folder, or the folder of a file of weights. Raises UserError with what does not fit, and where."""
    settings = _read_json(folder / CONFIG)
    config = _config(settings, folder / CONFIG)
    theirs, file = read_tensors(folder)
    theirs = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    theirs = {name: tensor for name, tensor in theirs.items() if not MASKS.fullmatch(name)}
    if config.tie_embeddings:
        theirs.pop("lm_head.weight", None)  # a copy of the embedding
    params = to_ours(FORMATS["huggingface-gpt2"], config, theirs, str(file))
    return SavedModel(params, config, _tokenizer(folder, config))


def read_tensors(folder: Path) -> tuple[dict[str, Stored], Path]:
    """All tensors of a folder by their names, and the file that they are in, or that lists theirs.

    safetensors come first; PyTorch's own files are read where there is nothing else.
    """
    for name, suffix, read in (
        ("model", "safetensors", lambda path: read_safetensors(path)[0]),
        ("pytorch_model", "bin", read_pickle),
    ):
        file, index = folder / f"{name}.{suffix}", folder / f"{name}.{suffix}{INDEX}"
        if file.exists():
            return read(file), file
        if index.exists():
            return read_sharded(index, read), index
    raise UserError(f"{folder}: holds no model.safetensors and no pytorch_model.bin, nor an index of several")


def save_folder(folder: str | Path, model: SavedModel, shard_size: int = SHARD_SIZE) -> None:
    """Write a folder that transformers' GPT2LMHeadModel loads. Raises UserError for a model that is no GPT-2 to it.

    A bias that this model lacks and theirs has is written as zeros, which changes nothing.
    """
    folder, part = Path(folder), Path(folder).with_name(f".{Path(folder).name}.{os.getpid()}.tmp")
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UserError(f"{folder}: exists, and is not an empty folder; nothing was written")
    config = model.config.replace(qkv_bias=True, bias=True)
    settings = _settings(config)
    theirs = from_ours(FORMATS["huggingface-gpt2"], config, _with_biases(model.params, config))
    theirs = {name if name.startswith("lm_head") else f"transformer.{name}": tensor for name, tensor in theirs.items()}
    settings["dtype"] = next(iter(theirs.values())).dtype.name
    try:
        part.mkdir(parents=True)
        _write_json(part / CONFIG, settings)
        _write_shards(part, theirs, shard_size, {"format": "pt"})
        if model.tokenizer:
            files = tokenizers.huggingface_files(model.tokenizer, config.context_length)
            for name, text in (files or {TOKENIZER: json.dumps({"tokenizer": model.tokenizer})}).items():
                (part / name).write_text(text, encoding="utf-8")
        for path in part.iterdir():
            flush(path)
        flush(part)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
        flush(folder.parent)
    except OSError as error:
        raise UserError(f"{folder}: could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _config(settings: dict[str, Any], path: Path) -> GPTConfig:
    """Their config.json as ours. Raises UserError naming what this project has no model for."""
    kind = settings.get("model_type")
    if kind != "gpt2":
        raise UserError(f"{path}: model_type {kind!r}, expected gpt2")
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        if settings.get(name):
            raise UserError(f"{path}: {name} is set, which no model here has")
    if not settings.get("scale_attn_weights", True):
        raise UserError(f"{path}: scale_attn_weights is off, which no model here has")
    activation = settings.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(f"{path}: activation_function {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    try:
        return GPTConfig(
            vocab_size=settings.get("vocab_size", 50257),
            context_length=settings.get("n_positions", 1024),
            emb_dim=settings.get("n_embd", 768),
            n_layers=settings.get("n_layer", 12),
            n_heads=settings.get("n_head", 12),
            mlp_dim=settings.get("n_inner") or 0,
            norm_eps=settings.get("layer_norm_epsilon", 1e-5),
            mlp=ACTIVATIONS[activation],
            qkv_bias=True,
            tie_embeddings=settings.get("tie_word_embeddings", True),
            emb_dropout=settings.get("embd_pdrop", 0.1),
            shortcut_dropout=settings.get("resid_pdrop", 0.1),
            attn_dropout=settings.get("attn_pdrop", 0.1),
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _settings(config: GPTConfig) -> dict[str, Any]:
    """Our config as theirs, `_config` reversed. Raises UserError naming what GPT2LMHeadModel cannot be."""
    for name, wanted in (
        ("head_dim", config.emb_dim // config.n_heads),
        ("n_kv_heads", config.n_heads),
        ("head_bias", False),
    ):
        if getattr(config, name) != wanted:
            raise UserError(
                f"{name}: {getattr(config, name)}, but Hugging Face's GPT-2 has {wanted}: it cannot be this model"
            )
    activation = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.mlp]
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.emb_dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.mlp_dim,
        "activation_function": activation,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "embd_pdrop": config.emb_dropout,
        "resid_pdrop": config.shortcut_dropout,
        "attn_pdrop": config.attn_dropout,
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
    }


def _with_biases(params: Mapping[str, Any], config: GPTConfig) -> dict[str, Any]:
    dtype = next(iter(params.values())).dtype
    shapes = config.parameter_shapes()
    return {name: params[name] if name in params else np.zeros(shape, dtype) for name, shape in shapes.items()}


def _write_shards(folder: Path, tensors: dict[str, Stored], shard_size: int, metadata: dict[str, str]) -> None:
    """One file, or several of at most `shard_size` bytes and an index of what is where."""
    shards: list[dict[str, Stored]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors, metadata)
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, metadata)
        where |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / f"model.safetensors{INDEX}", {"metadata": {"total_size": total}, "weight_map": where})


def _tokenizer(folder: Path, config: GPTConfig) -> dict[str, Any] | None:
    """The tokenizer that a folder carries; GPT-2's where there is none and the vocabulary has its size."""
    if (folder / TOKENIZER).exists():
        return _read_json(folder / TOKENIZER).get("tokenizer")
    spec = tokenizers.huggingface_spec(folder)
    if spec is None and config.vocab_size == tokenizers.GPT2Tokenizer.n_vocab:
        return {"name": "gpt2"}
    return spec


def _read_json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: could not be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

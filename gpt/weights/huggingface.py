"""Folders as Hugging Face's transformers has them: config.json, weights in one file or several, a tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt import tokenizers
from gpt.errors import UserError
from gpt.finetune.adapters import merge
from gpt.options import read_json_object
from gpt.weights.families import FAMILIES, family_of
from gpt.weights.names import Format, from_ours, to_ours
from gpt.weights.native import SavedModel, flush
from gpt.weights.tensors import Stored, read_pickle, read_safetensors, read_sharded, write_safetensors
from reference.config import GPTConfig

__all__ = ["read_folder", "read_tensors", "read_tokenizer", "save_folder"]

CONFIG, INDEX = "config.json", ".index.json"
HEAD = "lm_head.weight"
TOKENIZER = "twingrad.json"  # beside their files: the spec of a tokenizer that they have no form for
SHARD_SIZE = 5 * 10**9  # bytes; what is larger is written in several files


def read_folder(folder: Path) -> SavedModel:
    """A model's folder, or the folder of a file of weights. Raises UserError with what does not fit, and where."""
    settings = read_json_object(folder / CONFIG)
    try:
        family = family_of(settings)
        config = family.config(settings)
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    theirs, file = read_tensors(folder)
    theirs = {name.removeprefix(family.prefix): tensor for name, tensor in theirs.items()}
    if family.no_parameters:
        theirs = {name: tensor for name, tensor in theirs.items() if not family.no_parameters.fullmatch(name)}
    if config.tie_embeddings:
        theirs = _without_copy(family.format, config, theirs, file)
    params = to_ours(family.format, config, theirs, str(file))
    return SavedModel(params, config, read_tokenizer(folder, config))


def _without_copy(format: Format, config: GPTConfig, theirs: dict[str, Stored], file: Path) -> dict[str, Stored]:
    """A tied model's tensors without the head that some files hold as well. UserError if that is not the embedding."""
    embedding = next(row.theirs for row in format.rows(config) if row.ours == ("tok_emb.weight",))
    # Both are let go before anything else is read. A file without the embedding is refused afterwards, for that.
    if {HEAD, embedding} <= theirs.keys() and not _equal(theirs[HEAD], theirs[embedding]):
        raise UserError(
            f"{file}: {HEAD} differs from {embedding}, expected a copy of it, for {CONFIG} ties them "
            '("tie_word_embeddings": true)'
        )
    return {name: tensor for name, tensor in theirs.items() if name != HEAD}


def _equal(a: Stored, b: Stored) -> bool:
    """Whether two tensors hold the same numbers, NaN where the other has NaN."""
    if a.shape != b.shape:
        return False
    # Part by part, because NumPy's comparison with NaN copies what it compares.
    n_parts = 1 + a.nbytes // 2**22
    first, second = (np.array_split(np.asarray(tensor).reshape(-1), n_parts) for tensor in (a, b))
    return all(np.array_equal(one, other, equal_nan=True) for one, other in zip(first, second, strict=True))


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
    """Write a folder that transformers loads, as a GPT-2 or a Llama. Raises UserError for a model that is neither.

    A bias that this model lacks and theirs has is written as zeros, which changes nothing. Adapters, which theirs has
    not, are merged into the weights.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UserError(f"{folder}: exists, and is not an empty folder; nothing was written")
    place = folder.resolve()  # "." has no name
    part = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    params, config = merge(model.params, model.config) if model.config.lora else (model.params, model.config)
    family = FAMILIES["llama" if config.position == "rope" else "gpt2"]
    if family is FAMILIES["gpt2"] or config.qkv_bias != config.bias:
        config = config.replace(qkv_bias=True, bias=True)
    try:
        settings = {"architectures": [family.architecture], **family.settings(config)}
        if model.tokenizer:
            tokenizer = tokenizers.from_spec(model.tokenizer)
            settings |= {"bos_token_id": next(iter(tokenizer.begin), tokenizer.eot), "eos_token_id": tokenizer.eot}
    except ValueError as error:
        raise UserError(str(error)) from None
    theirs = from_ours(family.format, config, _with_biases(params, config))
    theirs = {name if name.startswith("lm_head") else family.prefix + name: t for name, t in theirs.items()}
    settings["dtype"] = np.result_type(*(tensor.dtype for tensor in theirs.values())).name
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
        if folder.exists():  # somebody may be in it, so it stays; what makes it a model comes last
            for path in sorted(part.iterdir(), key=lambda path: path.name == CONFIG):
                path.rename(place / path.name)
            flush(place)
        else:
            part.rename(place)
        flush(place.parent)
    except OSError as error:
        raise UserError(f"{folder}: could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


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


def read_tokenizer(folder: Path, config: GPTConfig) -> dict[str, Any] | None:
    """The tokenizer that a folder carries; GPT-2's where there is none and the vocabulary has its size."""
    if (folder / TOKENIZER).exists():
        return read_json_object(folder / TOKENIZER).get("tokenizer")
    spec = tokenizers.huggingface_spec(folder)
    if spec is None and config.vocab_size == tokenizers.GPT2Tokenizer.n_vocab:
        return {"name": "gpt2"}
    return spec


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

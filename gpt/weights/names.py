"""Whose tensor is whose: a table for each format, read in both directions and by both engines.

A row says that a tensor of theirs is tensors of ours, one below the other, stored (in, out) or (out, in). Query, key
and value are one tensor in GPT-2's files; a tied head is in none, because it is the token embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt.errors import UserError
from gpt.weights.tensors import Stored
from reference import rope
from reference.config import GPTConfig

__all__ = ["FORMATS", "Format", "Row", "check_layers", "from_ours", "to_ours"]


MLP = ("gate", "up", "down")  # Llama's projections


class Row(NamedTuple):
    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False  # matrices only
    halves: bool = False  # each head's rows are in the order of rope by halves, also where ours are interleaved


class Format(NamedTuple):
    """`rows` of a config's model. `leading`: matrices of projections have a first axis of size 1, as OpenAI's do."""

    name: str
    rows: Callable[[GPTConfig], list[Row]]
    leading: bool = False


def _huggingface_gpt2(config: GPTConfig) -> list[Row]:
    rows = [Row("wte.weight", ("tok_emb.weight",)), Row("wpe.weight", ("pos_emb.weight",))]
    for kind in ("weight", "bias"):
        rows.append(Row(f"ln_f.{kind}", (f"final_norm.{kind}",)))
        for i in range(config.n_layers):
            theirs, ours = f"h.{i}", f"blocks.{i}"
            qkv = tuple(f"{ours}.attn.{part}.{kind}" for part in ("query", "key", "value"))
            rows += [
                Row(f"{theirs}.ln_1.{kind}", (f"{ours}.norm1.{kind}",)),
                Row(f"{theirs}.attn.c_attn.{kind}", qkv, transposed=True),
                Row(f"{theirs}.attn.c_proj.{kind}", (f"{ours}.attn.out.{kind}",), transposed=True),
                Row(f"{theirs}.ln_2.{kind}", (f"{ours}.norm2.{kind}",)),
                Row(f"{theirs}.mlp.c_fc.{kind}", (f"{ours}.mlp.up.{kind}",), transposed=True),
                Row(f"{theirs}.mlp.c_proj.{kind}", (f"{ours}.mlp.down.{kind}",), transposed=True),
            ]
    if not config.tie_embeddings:
        rows.append(Row("lm_head.weight", ("head.weight",)))
    return rows


def _openai_gpt2(config: GPTConfig) -> list[Row]:
    """The same tensors under TensorFlow's names: model/h0/attn/c_attn/w is h.0.attn.c_attn.weight."""
    renamed = []
    for row in _huggingface_gpt2(config):
        *place, kind = row.theirs.split(".")
        if place[0] == "h":
            place[:2] = [f"h{place[1]}"]
        letter = {"bias": "b", "weight": "g" if place[-1].startswith("ln_") else "w"}[kind]
        path = place if place[0] in ("wte", "wpe") else [*place, letter]
        renamed.append(Row("/".join(["model", *path]), row.ours, row.transposed))
    return renamed


def _huggingface_llama(config: GPTConfig) -> list[Row]:
    rows = [Row("model.embed_tokens.weight", ("tok_emb.weight",)), Row("model.norm.weight", ("final_norm.weight",))]
    for i in range(config.n_layers):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        rows += [
            Row(f"{theirs}.input_layernorm.weight", (f"{ours}.norm1.weight",)),
            Row(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.norm2.weight",)),
        ]
        for kind in ("weight", "bias"):
            rows += [
                Row(f"{theirs}.self_attn.q_proj.{kind}", (f"{ours}.attn.query.{kind}",), halves=True),
                Row(f"{theirs}.self_attn.k_proj.{kind}", (f"{ours}.attn.key.{kind}",), halves=True),
                Row(f"{theirs}.self_attn.v_proj.{kind}", (f"{ours}.attn.value.{kind}",)),
                Row(f"{theirs}.self_attn.o_proj.{kind}", (f"{ours}.attn.out.{kind}",)),
                *(Row(f"{theirs}.mlp.{part}_proj.{kind}", (f"{ours}.mlp.{part}.{kind}",)) for part in MLP),
            ]
    if not config.tie_embeddings:
        rows.append(Row("lm_head.weight", ("head.weight",)))
    return rows


def _llama2_c(config: GPTConfig) -> list[Row]:
    """Of Meta's code and Karpathy's llama2.c; their rope turns interleaved pairs, as ours then does."""
    rows = [Row("tok_embeddings.weight", ("tok_emb.weight",)), Row("norm.weight", ("final_norm.weight",))]
    for i in range(config.n_layers):
        theirs, ours = f"layers.{i}", f"blocks.{i}"
        rows += [
            Row(f"{theirs}.attention_norm.weight", (f"{ours}.norm1.weight",)),
            Row(f"{theirs}.ffn_norm.weight", (f"{ours}.norm2.weight",)),
        ]
        for kind in ("weight", "bias"):
            attention = zip("qkvo", ("query", "key", "value", "out"), strict=True)
            rows += [
                Row(f"{theirs}.attention.w{letter}.{kind}", (f"{ours}.attn.{part}.{kind}",))
                for letter, part in attention
            ]
            numbered = zip("132", MLP, strict=True)
            rows += [Row(f"{theirs}.feed_forward.w{n}.{kind}", (f"{ours}.mlp.{part}.{kind}",)) for n, part in numbered]
    if not config.tie_embeddings:
        rows.append(Row("output.weight", ("head.weight",)))
    return rows


FORMATS = {
    "huggingface-gpt2": Format("huggingface-gpt2", _huggingface_gpt2),
    "huggingface-llama": Format("huggingface-llama", _huggingface_llama),
    "llama2.c": Format("llama2.c", _llama2_c),
    "openai-gpt2": Format("openai-gpt2", _openai_gpt2, leading=True),
}


def to_ours(format: Format, config: GPTConfig, theirs: Mapping[str, Stored], place: str) -> dict[str, Stored]:
    """Their tensors as the parameters of `config`, by name, in order; none is read before it is asked for.

    Raises UserError that names the tensor, both shapes and `place`, the file; and lists missing and unexpected names.
    """
    check_layers(place, config, theirs)
    shapes = config.parameter_shapes()
    rows = [row for row in format.rows(config) if row.ours[0] in shapes]
    known = {row.theirs for row in rows}
    missing = [row.theirs for row in rows if row.theirs not in theirs]
    unexpected = [name for name in theirs if name not in known]
    if missing or unexpected:
        listed = [
            f"{what} {_listed(names)}" for what, names in (("lacks", missing), ("has unexpected", unexpected)) if names
        ]
        raise UserError(f"{place}: does not fit its config: {'; '.join(listed)}")
    ours: dict[str, Stored] = {}
    for row in rows:
        parts, tensor = [shapes[name] for name in row.ours], theirs[row.theirs]
        expected = _their_shape(format, row, parts)
        if tensor.shape != expected:
            raise UserError(
                f"{place}: {row.theirs} ({', '.join(row.ours)}) has shape {tensor.shape}, "
                f"where the config says {expected}"
            )
        start = 0
        for name, shape in zip(row.ours, parts, strict=True):
            ours[name] = _part(row, config, tensor, start, shape)
            start += shape[0]
    return {name: ours[name] for name in shapes}


def check_layers(place: str | Path, config: GPTConfig, tensors: Collection[str]) -> None:
    """Refuse, before they are listed, layers by the billion that a damaged config asks for."""
    if config.n_layers > len(tensors):
        raise UserError(f"{place}: {len(tensors)} tensors, too few for the config's {config.n_layers} layers")


def from_ours(format: Format, config: GPTConfig, params: Mapping[str, Any]) -> dict[str, Stored]:
    """The parameters as their tensors, by their names; none is made before it is asked for."""
    shapes = config.parameter_shapes()
    theirs = {}
    for row in format.rows(config):
        if row.ours[0] not in shapes:
            continue
        parts = [shapes[name] for name in row.ours]
        dtype = np.result_type(*(params[name].dtype for name in row.ours))

        def read(row: Row = row, shape: tuple[int, ...] = _their_shape(format, row, parts)) -> np.ndarray:
            arrays = [np.asarray(params[name]) for name in row.ours]
            joined = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
            if row.halves and config.rope_interleaved:
                joined = _in_heads(joined, np.argsort(rope.interleave(config.head_dim)))
            return (joined.T if row.transposed else joined).reshape(shape)

        theirs[row.theirs] = Stored(_their_shape(format, row, parts), dtype, dtype.name, read)
    return theirs


def _their_shape(format: Format, row: Row, parts: list[tuple[int, ...]]) -> tuple[int, ...]:
    shape = (sum(part[0] for part in parts), *parts[0][1:])
    if row.transposed and len(shape) == 2:
        return (1, *shape[::-1]) if format.leading else shape[::-1]
    return shape


def _part(row: Row, config: GPTConfig, tensor: Stored, start: int, shape: tuple[int, ...]) -> Stored:
    def read() -> np.ndarray:
        array = np.asarray(tensor)
        array = array.reshape(array.shape[-len(shape) :])  # without a leading axis
        array = (array.T if row.transposed else array)[start : start + shape[0]]
        if row.halves and config.rope_interleaved:
            array = _in_heads(array, rope.interleave(config.head_dim))
        return array

    return Stored(shape, tensor.dtype, tensor.kind, read)


def _in_heads(array: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows (H D, ...) with each head's D in this order."""
    return array.reshape(-1, len(order), *array.shape[1:])[:, order].reshape(array.shape)


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

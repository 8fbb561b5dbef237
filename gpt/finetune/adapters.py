"""Low-rank adapters of a finished model: put on, merged into its weights, and kept in a file of their own.

adapt      the model under a changed config, with adapters or another head: what is new is drawn, the rest kept
merge      W + s B A in the place of W, A and B (reference/lora.py): the same model without a further product
unmerge    (W + s B A) - s B A, which is W but for one rounding

An adapter's file is safetensors, with A and B of each adapted layer and nothing else, and this in its header:

    twingrad_adapter   version of the format
    lora               the adapter's settings, JSON
    config             the architecture that the adapter belongs to, JSON
    base               fingerprint of the weights beside which it was learnt

The fingerprint is SHA-256 over all parameters but A and B, in the config's order: of each the line "NAME SHAPE", such
as "blocks.0.attn.query.weight 768x768", and at most 1,024 of its values as little-endian float32, at equal distances
from the first on. The distance is the least odd number that leaves no more; being odd, it does not stay in a column of
a matrix whose width is a power of two. Training, even for a step, changes most of a tensor, and so its sample.

Whatever was trained besides A and B, as a new head may be, belongs to the base: such a model is saved whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data.files import atomic_write
from gpt.engine import Tensor, check_arrays
from gpt.errors import UserError
from gpt.weights.native import check_shapes
from gpt.weights.tensors import Stored, read_safetensors
from reference.config import RATES, GPTConfig
from reference.init import initialize
from reference.lora import LoRA
from reference.torch_rng import Generator

__all__ = [
    "adapt",
    "changed_config",
    "fingerprint",
    "load_adapter",
    "merge",
    "model_fingerprint",
    "save_adapter",
    "unmerge",
]

FORMAT = 1
SAMPLE = 1024  # values of each tensor in a fingerprint
ROWS = 4096  # of a weight that are added to at a time, so that their float64 copies stay small

Tensors = dict[str, Tensor]


def adapt(
    params: Mapping[str, Tensor], config: GPTConfig, generator: Generator, **changes: Any
) -> tuple[Tensors, GPTConfig]:
    """A model's parameters under its config with `changes`, such as lora=LoRA(...), and that config.

    Parameters of the same name and shape are kept, unread; the others are drawn, float32, as the book's modules draw
    them (reference/init.py). A head with another number of outputs is new as a whole. A classifier of 2 classes:
    n_outputs=2, tie_embeddings=False, head_bias=True.

    UserError for an impossible change, and for parameters that are not those of `config`.
    """
    check_arrays(params, config.parameter_shapes())
    changed = changed_config(config, **changes)
    shapes = changed.parameter_shapes()
    new_head = changed.n_outputs != config.n_outputs
    kept = {
        name
        for name, shape in shapes.items()
        if name in params and tuple(params[name].shape) == shape and not (new_head and name.startswith("head."))
    }
    drawn = initialize(changed, generator, "book", names=shapes.keys() - kept)
    return {name: params[name] if name in kept else drawn[name] for name in shapes}, changed


def changed_config(config: GPTConfig, **changes: Any) -> GPTConfig:
    """A model's config with changes. UserError for an impossible one."""
    try:
        return config.replace(**changes)
    except ValueError as error:
        raise UserError(str(error)) from None


def merge(params: Mapping[str, Tensor], config: GPTConfig) -> tuple[Tensors, GPTConfig]:
    """The model without adapters that computes the same: its parameters, and its config.

    Each merged weight is computed when it is made an array, and not kept: a model of any size is written with the
    memory of one layer. It is computed in float64 and rounded once, to its base's type, so that it is the number
    nearest to the true sum whatever the rank; half-precision weights become float32, which can hold what is added.
    A head that shares the token embedding has a weight of its own afterwards.

    UserError where there are no adapters, and for parameters that are not those of `config`.
    """
    check_arrays(params, config.parameter_shapes())
    merged = _merged_config(config)
    weights = {f"{layer}.weight": layer for layer in _layers(config)}
    found: Tensors = {}
    for name in merged.parameter_shapes():
        if name not in weights:
            found[name] = params[name]
            continue
        layer = weights[name]
        base = params[_base_weight(layer, config)]
        found[name] = _sum(base, params[f"{layer}.lora_a"], params[f"{layer}.lora_b"], _scale(config))
    return found, merged


def unmerge(
    params: Mapping[str, Tensor], config: GPTConfig, adapter: Mapping[str, Tensor]
) -> tuple[Tensors, GPTConfig]:
    """The base of a merged model, up to rounding, and its config: the way back from `merge`.

    `config` is the one that was merged, with its adapters; `adapter` has their A and B, and may have more. Weights are
    computed as in `merge`. UserError for parameters that do not fit.
    """
    merged = _merged_config(config)
    check_arrays(params, merged.parameter_shapes())
    shapes = _adapter_shapes(config)
    check_arrays({name: adapter[name] for name in shapes if name in adapter}, shapes)
    base = config.replace(lora=None)
    weights = {f"{layer}.weight": layer for layer in _layers(config)}
    found: Tensors = {}
    for name in base.parameter_shapes():
        if name not in weights:
            found[name] = params[name]
            continue
        layer = weights[name]
        found[name] = _sum(params[name], adapter[f"{layer}.lora_a"], adapter[f"{layer}.lora_b"], -_scale(config))
    return found, base


def save_adapter(path: str | Path, params: Mapping[str, Tensor], config: GPTConfig) -> None:
    """Write one file of the A and B of a model, whole or not at all; see the module for what is in it.

    UserError where there are no adapters, for parameters that are not those of `config`, and where nothing can be
    written.
    """
    from safetensors.numpy import save

    if config.lora is None:
        raise UserError(f"{path}: not written, the model has no adapters")
    check_arrays(params, config.parameter_shapes())
    base = config.replace(lora=None)
    metadata = {
        "twingrad_adapter": str(FORMAT),
        "lora": json.dumps(dataclasses.asdict(config.lora)),
        "config": json.dumps(base.to_dict()),
        "base": fingerprint(params, base),
    }
    # safetensors writes an array's memory from its start, so a transposed view would come out scrambled.
    content = save({name: np.asarray(params[name], order="C") for name in _adapter_shapes(config)}, metadata)
    with atomic_write(Path(path)) as file:
        file.write(content)


def load_adapter(path: str | Path, params: Mapping[str, Tensor], config: GPTConfig) -> tuple[Tensors, GPTConfig]:
    """A model with the adapter of a file: `params` and A and B, each read when it is made an array, and the config.

    UserError where the file is none of an adapter, is damaged, or belongs to another architecture or other weights; a
    model's rates of dropout may be others. UserError too for a model that has adapters already.
    """
    path = Path(path)
    if config.lora is not None:
        raise UserError(f"{path}: the model has an adapter already; merge it into the weights first")
    check_arrays(params, config.parameter_shapes())
    tensors, metadata = read_safetensors(path)
    saved, lora, base = _read_header(path, metadata)
    if differences := _differences(saved, config):
        raise UserError(f"{path}: an adapter of another architecture: {differences}")
    try:
        adapted = config.replace(lora=lora)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    check_shapes(path, tensors, _adapter_shapes(adapted))
    if base != fingerprint(params, config):
        raise UserError(f"{path}: an adapter of other weights: it was learnt beside a model of the same architecture")
    return {name: tensors[name] if name in tensors else params[name] for name in adapted.parameter_shapes()}, adapted


def fingerprint(params: Mapping[str, Tensor], config: GPTConfig) -> str:
    """SHA-256, in hexadecimal, of the parameters without adapters; see the module for what is in it."""
    digest = hashlib.sha256()
    for name, shape in config.replace(lora=None).parameter_shapes().items():
        digest.update(f"{name} {'x'.join(map(str, shape))}\n".encode())
        values = np.asarray(params[name]).reshape(-1)
        distance = -(-values.size // SAMPLE) | 1
        digest.update(values[::distance].astype("<f4").tobytes())
    return digest.hexdigest()


def model_fingerprint(params: Mapping[str, Tensor], config: GPTConfig) -> str:
    """The fingerprint of all that a model computes with: of its weights with its adapters merged, if it has some."""
    return fingerprint(*(merge(params, config) if config.lora else (params, config)))


def _read_header(path: Path, metadata: Mapping[str, str]) -> tuple[GPTConfig, LoRA, str]:
    """Architecture, adapter's settings and fingerprint of the base. Raises UserError."""
    if "twingrad_adapter" not in metadata:
        what = "a whole model" if "twingrad" in metadata else "not a file of twingrad's"
        raise UserError(f"{path}: {what}, expected an adapter, as save_adapter writes it")
    try:
        version = int(metadata["twingrad_adapter"])
        if version > FORMAT:
            raise UserError(
                f"{path}: format {version}, written by a newer twingrad; this one reads up to format {FORMAT}"
            )
        config, lora = (json.loads(metadata[name]) for name in ("config", "lora"))
        return GPTConfig.from_dict(config), LoRA(**lora), metadata["base"]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a readable adapter: its header is damaged ({error!r})") from None


def _differences(saved: GPTConfig, ours: GPTConfig) -> str:
    """The fields in which two architectures differ. Dropout is no part of one."""
    mine = ours.to_dict()
    return ", ".join(
        f"{name} {value}, not {mine[name]}"
        for name, value in saved.to_dict().items()
        if value != mine[name] and name not in RATES
    )


def _merged_config(config: GPTConfig) -> GPTConfig:
    if config.lora is None:
        raise UserError("merge: the model has no adapters")
    return config.replace(lora=None, tie_embeddings=config.tie_embeddings and not config.adapts("head"))


def _layers(config: GPTConfig) -> Iterator[str]:
    """The adapted layers, by name."""
    for name in config.parameter_shapes():
        if name.endswith(".lora_a"):
            yield name.removesuffix(".lora_a")


def _base_weight(layer: str, config: GPTConfig) -> str:
    return "tok_emb.weight" if layer == "head" and config.tie_embeddings else f"{layer}.weight"


def _adapter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in config.parameter_shapes().items() if name.endswith((".lora_a", ".lora_b"))}


def _scale(config: GPTConfig) -> float:
    assert config.lora is not None
    return config.lora.scale


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Stored:
    """weight + scale b a, computed when it is read."""
    dtype = np.promote_types(weight.dtype, np.float32)
    return Stored(tuple(weight.shape), dtype, dtype.name, partial(_add, weight, a, b, scale, dtype))


def _add(weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: np.dtype) -> np.ndarray:
    w, a64, b64 = np.asarray(weight), np.asarray(a, np.float64), scale * np.asarray(b, np.float64)
    total = np.empty(w.shape, dtype)
    for start in range(0, len(w), ROWS):
        rows = slice(start, start + ROWS)
        total[rows] = b64[rows] @ a64 + w[rows]
    return total

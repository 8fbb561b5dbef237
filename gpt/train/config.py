"""What a training run is made from, as plain dataclasses that YAML and a command line can fill.

Field names are unique across the nested dataclasses, so ``epochs`` alone says as much as ``train.epochs``. `RunConfig`
names everything a run is built from; `TrainConfig` alone is what the trainer reads.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gpt.engine import OptimizerConfig
from gpt.errors import UserError

__all__ = ["LoaderConfig", "OptimizerConfig", "RunConfig", "TrainConfig", "from_dict"]


@dataclass
class LoaderConfig:
    """How a text becomes batches of (inputs, targets)."""

    sampling: Literal["windows", "random"] = "windows"
    """windows: sliding windows over the text, an epoch sees each once. random: batches at random positions."""
    batch_size: int = 2
    """Examples in a micro-batch."""
    max_length: int | None = None
    """Tokens in an example; none: the model's context length."""
    stride: int | None = None
    """Tokens from the start of one window to the next; none: max_length, no overlap."""
    shuffle: bool = True
    """Whether the training windows come in a new random order each epoch."""
    drop_last: bool = True
    """Whether a last, smaller training batch is left out."""
    validation_fraction: float = 0.1
    """The end of the text that is held out, measured in characters of a text and tokens of a token file."""

    def __post_init__(self) -> None:
        _require(self.sampling in ("windows", "random"), "sampling", self.sampling, "windows or random")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.max_length is None or self.max_length >= 1, "max_length", self.max_length, "at least 1")
        _require(self.stride is None or self.stride >= 1, "stride", self.stride, "at least 1")
        _require(0 <= self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "0 <= x < 1")


@dataclass
class TrainConfig:
    """How long the trainer goes on, with which learning rate, and when it evaluates, samples and saves.

    A step is one update of the parameters, from `accumulation` micro-batches (fewer at the end of an epoch).
    """

    epochs: int | None = None
    """Passes over the training loader; none and no `steps`: 1."""
    steps: int | None = None
    """Steps altogether, instead of `epochs`."""
    accumulation: int = 1
    """Micro-batches to a step, each weighted by its share of the step's counted tokens."""
    seed: int = 123
    """Of the initial parameters, the order of the data and dropout."""
    dropout_source: Literal["philox", "torch"] = "philox"
    """philox: a mask depends on seed, step, layer and element alone. torch: masks follow PyTorch's random stream."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warmup: the optimizer's `lr` throughout, or from there down to `min_lr` by a cosine."""
    warmup_steps: int = 0
    """Steps that raise the learning rate linearly from `initial_lr` to the optimizer's `lr`."""
    initial_lr: float = 0.0
    """Learning rate of the warmup's first step."""
    min_lr: float | None = None
    """Where the cosine ends; none: a tenth of `lr`."""
    max_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; none: never."""
    clip_from_step: int = 0
    """The first step, counted from 0, whose gradients are clipped."""
    eval_every: int = 50
    """Steps from one evaluation to the next; 0: never."""
    eval_batches: int | None = 5
    """Batches of each loader that an evaluation averages over; none: all."""
    first_eval: Literal["zero", "one"] = "zero"
    """Whether steps are counted from 0, so that the first is evaluated, or from 1. Evaluations fall on multiples of
    `eval_every`."""
    sample_every: int | None = None
    """Steps from one text sample to the next; none: one at the end of each epoch; 0: never."""
    save_every: int | None = None
    """Steps from one checkpoint to the next; none: one at the end of each epoch; 0: only at the end of the run."""
    save_best: bool = True
    """Whether to keep the parameters that had the lowest validation loss."""

    def __post_init__(self) -> None:
        _require(self.epochs is None or self.steps is None, "steps", self.steps, "epochs or steps, not both")
        for name in ("epochs", "steps", "sample_every", "save_every"):
            _require(getattr(self, name) is None or getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("warmup_steps", "clip_from_step", "eval_every", "initial_lr", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _require(self.accumulation >= 1, "accumulation", self.accumulation, "at least 1")
        _require(self.eval_batches is None or self.eval_batches >= 1, "eval_batches", self.eval_batches, "at least 1")
        _require(self.min_lr is None or self.min_lr >= 0, "min_lr", self.min_lr, "at least 0")
        _require(self.max_norm is None or self.max_norm > 0, "max_norm", self.max_norm, "more than 0")
        for name, choices in (
            ("dropout_source", ("philox", "torch")),
            ("schedule", ("constant", "cosine")),
            ("first_eval", ("zero", "one")),
        ):
            _require(getattr(self, name) in choices, name, getattr(self, name), " or ".join(choices))


@dataclass
class RunConfig:
    """A whole training run, from names: text, tokenizer, model, engine, and where the results go."""

    data: str = "stdlib"
    """A name of the data catalogue, or the path of a text file, a token file or a folder of texts."""
    tokenizer: str = "bytes"
    """gpt2, bytes, simple-v1 or simple-v2."""
    preset: str = "bytes-small"
    """The model's architecture, a name in reference.config.PRESETS."""
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of GPTConfig that differ from the preset. The vocabulary size follows the tokenizer unless set here."""
    engine: Literal["auto", "numpy", "torch"] = "auto"
    """auto: PyTorch where it is installed, else NumPy."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of parameters, gradients and moments."""
    init: Literal["book", "gpt2"] = "gpt2"
    """book: PyTorch's default initialisation. gpt2: normal 0.02 with scaled residual projections."""
    prompt: str | None = None
    """Where text samples begin; none: a few words from the training text."""
    out: str = "runs/latest"
    """The run's folder: config.yaml, log.csv, loss.png, loss.pdf, samples.txt and the checkpoints."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name, choices in (
            ("engine", ("auto", "numpy", "torch")),
            ("dtype", ("float32", "float64")),
            ("init", ("book", "gpt2")),
        ):
            _require(getattr(self, name) in choices, name, getattr(self, name), " or ".join(choices))

    def to_dict(self) -> dict[str, Any]:
        """All fields, nested, as YAML and JSON can hold them."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> RunConfig:
        """Inverse of `to_dict`; absent fields keep their defaults. Raises UserError naming a field that is wrong."""
        return from_dict(cls, settings)

    @classmethod
    def load(cls, path: str | Path) -> RunConfig:
        """Read a YAML file of settings. Raises UserError naming the file and what is wrong in it."""
        import yaml

        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{path}: not a readable YAML file: {' '.join(str(error).split())}") from None
        if settings is None:
            settings = {}
        if not isinstance(settings, dict):
            raise UserError(f"{path}: expected a YAML mapping of settings, got a {type(settings).__name__}")
        try:
            return cls.from_dict(settings)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def to_yaml(self) -> str:
        """The settings as the YAML text that `load` reads."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def from_dict(cls: type, settings: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of the dataclass `cls`, values converted to the fields' types. Raises UserError naming the field."""
    hints = get_type_hints(cls)
    for name in settings:
        if name not in hints:
            close = get_close_matches(str(name), hints, n=1)
            raise UserError(f"{prefix}{name}: no such option" + (f"; did you mean {close[0]}?" if close else ""))
    values = {name: _convert(f"{prefix}{name}", value, hints[name]) for name, value in settings.items()}
    try:
        return cls(**values)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{prefix.rstrip('.') or cls.__name__}: {error}") from None


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; text too, because YAML reads 4e-4 as text."""
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{name}: expected a group of settings, got {value!r}")
        return from_dict(hint, value, f"{name}.")
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return _convert(name, value, next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        if value not in args:
            raise UserError(f"{name}: expected {' or '.join(map(str, args))}, got {value!r}")
        return value
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or len(parts) != len(args):
            raise UserError(f"{name}: expected {len(args)} numbers, got {value!r}")
        return tuple(_convert(name, part, arg) for part, arg in zip(parts, args, strict=True))
    return _convert_scalar(name, value, hint)


def _convert_scalar(name: str, value: Any, hint: Any) -> Any:
    try:
        if hint is bool and isinstance(value, str):
            return {"true": True, "false": False}[value.lower()]
        if hint is int and isinstance(value, str):
            return int(value)
        if hint is float and isinstance(value, (str, int)) and not isinstance(value, bool):
            return float(value)
        expected = {dict: dict}.get(get_origin(hint), hint)
        if not isinstance(value, expected) or (hint is int and isinstance(value, bool)):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, "a mapping")
        raise UserError(f"{name}: expected {kind}, got {value!r}") from None
    return value


def _plain(value: Any) -> Any:
    """Tuples as lists, which is how YAML and JSON give them back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise UserError(f"{name}: expected {expected}, got {value!r}")

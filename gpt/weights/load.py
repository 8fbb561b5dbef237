"""One function for weights from anywhere: `load`."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np

from gpt.engine import Tensor
from gpt.errors import UserError
from gpt.options import read_json_object
from gpt.train.checkpoint import TRAINER, find_checkpoint
from gpt.weights import huggingface, llama2_c, native, openai, registry
from gpt.weights.native import SavedModel
from gpt.weights.tensors import Stored, read_pickle, read_safetensors

__all__ = ["find", "load", "tensors"]

MODEL = "model.safetensors"
CONVERTED = "twingrad.safetensors"
NO_MODEL = re.compile(r"adapter\.safetensors|step-\d+\.safetensors|\..*")  # of a run: adapters alone, snapshots
PICKLES = (".bin", ".pt", ".pth")


def load(source: str | Path) -> SavedModel:
    """The model at `source`: a name of the registry or of a Hugging Face repository, a folder, or a file.

    A folder may be a run's (its finished model, its best, else its last checkpoint; its last too where the best is of
    the first step and none was evaluated after it), one that transformers wrote, or
    one of OpenAI's. A name's files are downloaded when they are not there; OpenAI's are converted once. Parameters are
    read when they are made arrays; one with a NaN is warned of. Raises UserError with what is wrong and where.
    """
    path = find(source)
    saved = _read(path)
    return saved._replace(params={name: _watched(path, name, array) for name, array in saved.params.items()})


def find(source: str | Path) -> Path:
    """The file or folder that `source` means, downloaded if need be."""
    path = Path(source)
    if not str(source):
        raise UserError("expected weights, a name, a folder or a file, got an empty name")
    if path.exists():
        return path
    name = str(source)
    if path.parts[0] == "runs":  # where the commands put theirs: no owner's name
        raise UserError(f"{name}: there is no run; train one, or name a run's folder, a file, or other weights")
    if name in registry.ENTRIES:
        converted = registry.folder(name) / CONVERTED
        if not converted.exists():
            folder = registry.get(name)
            native.save_model(converted, *openai.read_checkpoint(folder))
            openai.dump_of(folder).unlink()
        return converted
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII) and not path.parent.exists():
        return registry.get(name)
    raise UserError(
        f"{name}: no such file or folder, and no name of the registry ({', '.join(registry.ENTRIES)}), "
        "nor a Hugging Face repository's, owner/name"
    )


def tensors(source: str | Path) -> dict[str, Stored]:
    """Every tensor of a file or folder under the name that it has there."""
    path = _model_file(find(source))
    if path.is_dir():
        return openai.read_variables(path) if openai.is_checkpoint(path) else huggingface.read_tensors(path)[0]
    if path.suffix in PICKLES:
        return read_pickle(path)
    return read_safetensors(path)[0]


def _read(path: Path) -> SavedModel:
    path = _model_file(path)
    if path.is_dir():
        if openai.is_checkpoint(path):
            return openai.read_checkpoint(path)
        if (path / huggingface.CONFIG).exists():
            return huggingface.read_folder(path)
        raise UserError(f"{path}: holds no model: no {MODEL}, no {huggingface.CONFIG}, no {openai.HPARAMS}")
    pickled = path.suffix in PICKLES
    if (path.parent / huggingface.CONFIG).exists() and (pickled or "twingrad" not in read_safetensors(path)[1]):
        return huggingface.read_folder(path.parent)
    return llama2_c.read_checkpoint(path) if pickled else native.read_model(path)


def _model_file(path: Path) -> Path:
    """Our own file in a run's or a checkpoint's folder; anything else as it is."""
    if not path.is_dir() or (path / huggingface.CONFIG).exists() or openai.is_checkpoint(path):
        return path
    if not (path / MODEL).exists():
        finished = [file for file in path.glob("*.safetensors") if not NO_MODEL.fullmatch(file.name)]
        if len(finished) == 1:
            return finished[0]
        path = _best(path) or find_checkpoint(path, "last") or path
    return path / MODEL if (path / MODEL).exists() else path


def _best(run: Path) -> Path | None:
    """The best checkpoint of a run; not one of its first step, if nothing was evaluated since: it had no rival."""
    best, last = find_checkpoint(run, "best"), find_checkpoint(run, "last")
    if best and last and (best / TRAINER).exists() and (last / TRAINER).exists():
        then, now = (read_json_object(path / TRAINER) for path in (best, last))
        if then.get("step") == 1 and then.get("val_loss") == now.get("val_loss"):
            return None
    return best


def _watched(path: Path, name: str, array: Tensor) -> Stored:
    """The same array; reading it warns of a NaN."""

    def read() -> np.ndarray:
        values = np.asarray(array)
        with np.errstate(over="ignore", invalid="ignore"):
            suspicious = not np.isfinite(values.sum(dtype=np.float32))  # overflow is no NaN, but cheap to rule out
        if suspicious and np.isnan(values).any():
            warnings.warn(f"{path}: {name} holds NaN", stacklevel=2)
        return values

    kind = array.kind if isinstance(array, Stored) else array.dtype.name
    return Stored(array.shape, array.dtype, kind, read)

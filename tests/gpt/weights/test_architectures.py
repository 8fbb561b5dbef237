"""The README's table of architectures says what is loaded here, file by file, and nothing else."""

from pathlib import Path

import numpy as np
import pytest

from gpt.engine import create_engine
from gpt.weights.load import load
from gpt.weights.names import FORMATS, from_ours
from gpt.weights.native import save_model
from reference import PRESETS
from reference.config import GPTConfig
from tests.gpt.weights.conftest import make_peer as make_gpt2
from tests.gpt.weights.test_llama import LLAMA3
from tests.gpt.weights.test_llama import make_peer as make_llama

torch = pytest.importorskip("torch")
README = Path(__file__).parents[3] / "README.md"
HEAD = "| model | norm | MLP | positions | heads | head | files |\n|---|---|---|---|---|---|---|\n"
NORMS = {"layer_norm": "layer norm", "rms_norm": "RMS norm"}
MLPS = {"gelu_tanh": "GELU (tanh)", "gelu": "GELU", "swiglu": "SwiGLU"}


def hugging_face(make, **settings):
    def write(folder):
        make(**settings).save_pretrained(folder)
        return folder

    return write


def training_checkpoint(folder):
    sizes = {"vocab_size": 97, "context_length": 64, "emb_dim": 24, "n_layers": 2, "n_heads": 4, "mlp_dim": 32}
    config = PRESETS["course-llama"].replace(**sizes)
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in config.parameter_shapes().items()}
    theirs = from_ours(FORMATS["llama2.c"], config, params)
    state = {f"_orig_mod.{name}": torch.from_numpy(np.array(tensor)) for name, tensor in theirs.items()}
    torch.save({"model": state, "model_args": {"n_heads": 4, "n_layers": 2, "max_seq_len": 64}}, folder / "best.pt")
    return folder / "best.pt"


def our_own(preset, **sizes):
    def write(folder):
        config = PRESETS[preset].replace(vocab_size=97, context_length=32, n_layers=2, **sizes)
        rng = np.random.default_rng(0)
        params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in config.parameter_shapes().items()}
        save_model(folder / "m.safetensors", params, config)
        return folder / "m.safetensors"

    return write


GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 2}
LOADED = [
    ("GPT-2", "OpenAI's TensorFlow checkpoint", None),  # which a fixture has written
    ("GPT-2", "Hugging Face", hugging_face(make_gpt2)),
    ("GPT-2, untied", "Hugging Face", hugging_face(make_gpt2, tie_word_embeddings=False, activation_function="gelu")),
    ("Llama 2", "Hugging Face", hugging_face(make_llama)),
    ("Llama 3.1", "Hugging Face", hugging_face(make_llama, **GROUPED, rope_parameters=LLAMA3)),
    (
        "Llama 3.2",
        "Hugging Face",
        hugging_face(make_llama, **GROUPED, rope_parameters=LLAMA3, tie_word_embeddings=True),
    ),
    ("Llama of a course (138M)", "a training checkpoint, as llama2.c's", training_checkpoint),
    ("GPT of a course (20M)", "our own", our_own("course-gpt")),
]


def positions(config: GPTConfig) -> str:
    if config.position == "learned":
        return "learned"
    pairs = "interleaved" if config.rope_interleaved else "halves"
    return f"rope, {pairs}" + (", scaled" if config.rope_scaling else "")


def row(model: str, files: str, config: GPTConfig) -> str:
    heads = "own keys" if config.n_kv_heads == config.n_heads else "shared keys"
    heads += "" if config.n_heads * config.head_dim == config.emb_dim else ", of any width"
    head = "tied" if config.tie_embeddings else "its own"
    cells = (model, NORMS[config.norm], MLPS[config.mlp], positions(config), heads, head, files)
    return f"| {' | '.join(cells)} |\n"


def test_the_table_of_the_readme_is_what_is_loaded(openai_folder, tmp_path):
    pytest.importorskip("transformers")
    table = HEAD
    for number, (model, files, write) in enumerate(LOADED):
        folder = tmp_path / str(number)
        folder.mkdir()
        saved = load(write(folder) if write else openai_folder[0])
        ours, theirs = (
            create_engine(name, saved.config, saved.params, dtype="float64").logits(np.arange(5)[None])
            for name in ("numpy", "torch")
        )
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11 * np.abs(theirs).max())
        table += row(model, files, saved.config)
    assert table in README.read_text(encoding="utf-8"), f"the README lacks this table:\n{table}"

"""What loading takes at its peak: the parameters' own size and little more, into either engine, from either layout."""

import json
import struct
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest

from gpt.weights.families import FAMILIES
from gpt.weights.names import FORMATS, from_ours
from reference.config import PRESETS, GPTConfig

ROOT = Path(__file__).parents[3]

# Prints the peak of the process's memory before and after, and the CPU seconds of loading.
MEASURE = """
import sys, time
import numpy as np
from gpt.engine import create_engine
from gpt.memory import peak_bytes
from gpt.weights.load import load
from reference import GPT, GPTConfig
tiny = GPTConfig(5, 4, 4, 1, 1)
create_engine(sys.argv[2], tiny, GPT.seeded(tiny, 1).params)  # brings in the libraries that loading needs
before, start = peak_bytes(), time.process_time()
saved = load(sys.argv[1])
engine = create_engine(sys.argv[2], saved.config, saved.params)
print(before, peak_bytes(), time.process_time() - start)
logits = engine.logits(np.arange(3)[None])
assert np.isfinite(logits).all()
"""


class Shape:
    """Stands for a parameter that is nowhere."""

    dtype = np.dtype("float32")


def write_folder(folder, config, copied=""):
    """A folder as transformers' with random weights, written piece by piece so that it may be larger than memory.

    `copied`: the name of a tensor that is written once more, as lm_head.weight.
    """
    shapes = from_ours(FORMATS["huggingface-gpt2"], config, dict.fromkeys(config.parameter_shapes(), Shape()))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in shapes.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    size = end
    if copied:
        begin, stop = header[copied]["data_offsets"]
        header["lm_head.weight"] = {**header[copied], "data_offsets": [end, end + stop - begin]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    piece = (0.02 * np.random.default_rng(0).standard_normal(1 << 22, np.float32)).tobytes()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, end, len(piece)):
            file.write(piece[: end - start])
    if copied:
        path, data = folder / "model.safetensors", 8 + len(text)
        with open(path, "ab") as file:
            file.write(np.memmap(path, np.uint8, "r", data + begin, stop - begin))
    (folder / "config.json").write_text(json.dumps(FAMILIES["gpt2"].settings(config)))
    assert size == 4 * sum(map(prod, config.parameter_shapes().values()))
    return size


def measure(folder, engine):
    command = [sys.executable, "-c", MEASURE, str(folder), engine]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_loading_takes_the_parameters_own_size(tmp_path, engine):
    """Beyond what Python and its libraries take, which is a constant."""
    pytest.importorskip("torch")
    size = write_folder(tmp_path, GPTConfig(5000, 64, 1024, 8, 16, qkv_bias=True, tie_embeddings=True))
    before, after, _ = measure(tmp_path, engine)
    assert after - before < 1.15 * size


def test_comparing_a_tied_head_with_its_embedding_takes_little_more(tmp_path):
    """Here most of the parameters are the embedding."""
    config = GPTConfig(50_000, 64, 768, 1, 12, qkv_bias=True, tie_embeddings=True)
    size = write_folder(tmp_path, config, copied="wte.weight")
    before, after, _ = measure(tmp_path, "numpy")
    assert after - before < 1.8 * size  # a copy of each, to compare them, would make it 2.9


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_one_and_a_half_billion_parameters_load_in_their_own_size(tmp_path, engine):
    """In all, Python and its libraries included."""
    pytest.importorskip("torch")
    size = write_folder(tmp_path, PRESETS["gpt2-xl"])
    _, after, seconds = measure(tmp_path, engine)
    (tmp_path / "model.safetensors").unlink()
    print(f"{engine}: {after / 1e9:.2f} GB for {size / 1e9:.2f} GB, {seconds:.1f} s of CPU")
    assert after < 1.15 * size
    assert after < 8e9

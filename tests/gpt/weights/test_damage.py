"""Damaged and malicious files: whatever is in them, the answer is a model or one documented error."""

import json
import pickle
import shutil
import struct
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt import tokenizers
from gpt.engine import create_engine
from gpt.errors import UserError
from gpt.tokenizers import ByteTokenizer
from gpt.weights.huggingface import save_folder
from gpt.weights.load import load, tensors
from gpt.weights.native import SavedModel, save_model
from gpt.weights.tensors import read_pickle, read_safetensors, write_safetensors
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

CONFIG = GPTConfig(11, 5, 8, 1, 2, qkv_bias=True, tie_embeddings=True)
PARAMS = initialize(CONFIG, Generator(1), "gpt2")
# Function-scoped folders are fine here: each example writes its file anew.
FUZZ = settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def assert_reads_or_says_why(path):
    """A model or UserError, for the whole way to an engine; the error is one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = load(path)
            create_engine("numpy", saved.config, saved.params)
    except UserError as error:
        assert_one_line(error)


def assert_one_line(error):
    assert "\n" not in str(error)


@pytest.fixture(scope="module")
def file_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "m.safetensors"
    save_model(path, PARAMS, CONFIG, ByteTokenizer().spec())
    return path.read_bytes()


@FUZZ
@given(data=st.data())
def test_a_file_with_bytes_changed(tmp_path, file_bytes, data):
    raw = bytearray(file_bytes)
    length = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, length + 20))] = data.draw(st.integers(0, 255))
    (tmp_path / "m.safetensors").write_bytes(raw)
    assert_reads_or_says_why(tmp_path / "m.safetensors")


@FUZZ
@given(cut=st.integers(0, 3000), tail=st.binary(max_size=20))
def test_a_file_cut_short_or_with_something_behind_it(tmp_path, file_bytes, cut, tail):
    (tmp_path / "m.safetensors").write_bytes(file_bytes[: len(file_bytes) - cut] + tail)
    assert_reads_or_says_why(tmp_path / "m.safetensors")


@FUZZ
@given(data=st.data())
def test_a_header_that_says_something_else(tmp_path, file_bytes, data):
    """JSON of the right kind with other values: shapes, types, offsets, metadata."""
    length = int.from_bytes(file_bytes[:8], "little")
    header, body = json.loads(file_bytes[8 : 8 + length]), file_bytes[8 + length :]
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3)):
        if name == "__metadata__":
            key = data.draw(st.sampled_from(["twingrad", "config", "tokenizer"]))
            header[name][key] = data.draw(st.text(max_size=6) | JSON.map(json.dumps) | JSON)
        elif isinstance(header[name], dict):
            numbers = st.lists(st.integers(-1, 2**40) | st.integers(0, 800), max_size=3)
            kinds = st.sampled_from(["F32", "F64", "BF16", "I8", "BOOL", "F8_E4M3", "C64", "X"])
            changed = {"shape": numbers, "data_offsets": numbers, "dtype": kinds}
            key = data.draw(st.sampled_from(sorted(changed)))
            header[name][key] = data.draw(changed[key] | JSON)
    if data.draw(st.booleans()):
        header[data.draw(st.text(max_size=5))] = data.draw(JSON)
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    assert_reads_or_says_why(tmp_path / "m.safetensors")


@pytest.fixture
def folder(tmp_path):
    save_folder(tmp_path / "hub", SavedModel(PARAMS, CONFIG, None), shard_size=1000)
    shutil.copytree(tmp_path / "hub", tmp_path / "whole")
    return tmp_path / "hub"


@FUZZ
@given(data=st.data())
def test_an_index_that_says_something_else(folder, data):
    path = folder / "model.safetensors.index.json"
    index = json.loads((folder.parent / "whole" / path.name).read_text())
    where = index["weight_map"]
    for name in data.draw(st.lists(st.sampled_from(sorted(where)), max_size=3)):
        where[name] = data.draw(st.sampled_from(sorted(set(map(str, where.values())))) | st.text(max_size=8) | JSON)
    if data.draw(st.booleans()):
        index["weight_map"] = data.draw(JSON)
    if data.draw(st.integers(0, 9)) == 0:
        index = data.draw(JSON)
    path.write_text(json.dumps(index))
    assert_reads_or_says_why(folder)
    path.write_text(data.draw(st.text(max_size=20)), encoding="utf-8")
    assert_reads_or_says_why(folder)


@FUZZ
@given(data=st.data())
def test_a_config_that_says_something_else(folder, data):
    path = folder / "config.json"
    config = json.loads((folder.parent / "whole" / path.name).read_text())
    for name in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[name] = data.draw(JSON)
    path.write_text(json.dumps(config))
    assert_reads_or_says_why(folder)


@settings(FUZZ, max_examples=200)
@given(data=st.data())
def test_a_tokenizer_that_says_something_else(tmp_path, data):
    letters = [bytes((value,)) for value in range(256)]
    tokens = {token: i for i, token in enumerate([*letters, b"ab", b"abc"])}
    files = tokenizers.huggingface_files(tokenizers.BPETokenizer(tokens, {"<|endoftext|>": 258}).spec(), 5)
    vocabulary, merges = json.loads(files["vocab.json"]), files["merges.txt"].splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(vocabulary)) | st.text(max_size=3))
        vocabulary[key] = data.draw(st.integers(-1, 300) | JSON)
        merges[data.draw(st.integers(0, len(merges) - 1))] = data.draw(st.text(max_size=6))
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    whole = {"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}, "pre_tokenizer": data.draw(JSON)}
    (tmp_path / "json").mkdir(exist_ok=True)
    (tmp_path / "json" / "tokenizer.json").write_text(json.dumps(data.draw(st.just(whole) | JSON)), encoding="utf-8")
    for place in (tmp_path, tmp_path / "json"):
        try:
            spec = tokenizers.huggingface_spec(place)
        except UserError as error:
            assert_one_line(error)
        else:
            assert spec is None or tokenizers.from_spec(spec).n_vocab


@settings(FUZZ, max_examples=200)
@given(data=st.data())
def test_a_pytorch_file_with_bytes_changed(tmp_path, data):
    torch = pytest.importorskip("torch")
    path = tmp_path / "state.pt"
    torch.save({"a": torch.arange(6.0).reshape(2, 3)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        for tensor in read_pickle(path).values():
            np.asarray(tensor)
    except UserError as error:
        assert_one_line(error)


class Malicious:
    def __reduce__(self):
        return pytest.fail, ("the pickle was run",)


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(2), "b": Malicious()}, tmp_path / "zip.bin")
    (tmp_path / "bare.bin").write_bytes(pickle.dumps({"a": Malicious()}))
    torch.save({"a": torch.zeros(2), "b": Malicious()}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("zip.bin", "bare.bin", "old.bin"):
        with pytest.raises(
            UserError, match=rf"{name}: refused, for it is broken or a pickle that asks for more than tensors"
        ):
            read_pickle(tmp_path / name)
    with pytest.raises(UserError, match=r"zip.bin: a pickle, which may run any code"):
        read_safetensors(tmp_path / "zip.bin")


def test_a_pickle_of_something_else_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(UserError, match=r"list.bin: expected a state_dict, tensors by name, got list"):
        read_pickle(tmp_path / "list.bin")
    torch.save({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "small.bin")
    with pytest.raises(UserError, match=r"small.bin: .*float8"):
        read_pickle(tmp_path / "small.bin")
    with pytest.raises(UserError, match="no such file"):
        read_pickle(tmp_path / "none.bin")


def add_head(folder, head, kind):
    """Put a head beside the tied embedding: into the one file, in safetensors or PyTorch's form, or as a shard."""
    arrays = {name: np.array(stored) for name, stored in tensors(folder).items()}
    if kind == "shards":
        write_safetensors(folder / "head.safetensors", {"lm_head.weight": head}, {})
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["lm_head.weight"] = "head.safetensors"
        path.write_text(json.dumps(index))
        return path
    for path in folder.glob("model*"):
        path.unlink()
    arrays["lm_head.weight"] = head
    if kind == "safetensors":
        write_safetensors(folder / "model.safetensors", arrays, {})
        return folder / "model.safetensors"
    torch = pytest.importorskip("torch")
    held = {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in arrays.items()}
    torch.save(held, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bfloat16 pickle"])
@pytest.mark.filterwarnings("ignore:.*holds NaN")
@pytest.mark.parametrize("change", ["none", "type", "value", "shape", "nan"])
def test_a_head_beside_the_embedding_it_is_tied_to_must_be_its_copy(folder, kind, change):
    embedding = PARAMS["tok_emb.weight"].copy()
    if change == "nan":  # in both: damaged, but a copy
        embedding[2, 3] = np.nan
        save_folder(folder.parent / "nan", SavedModel({**PARAMS, "tok_emb.weight": embedding}, CONFIG, None), 1000)
        folder = folder.parent / "nan"
    head = embedding[:-1] if change == "shape" else embedding.copy()
    head[4, 1] += change == "value"
    head = head.astype(np.float64 if change == "type" else np.float32)
    file = add_head(folder, head, kind)
    if change in ("none", "type", "nan"):
        saved = load(folder)
        assert "head.weight" not in saved.params
        if kind != "bfloat16 pickle":
            np.testing.assert_array_equal(saved.params["tok_emb.weight"], embedding)
        return
    with pytest.raises(UserError, match=r"lm_head.weight differs from wte.weight, expected a copy") as caught:
        load(folder)
    assert str(caught.value).startswith(f"{file}: ")
    assert_one_line(caught.value)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "c:x", "", None, 3])
def test_an_index_that_names_a_file_elsewhere_is_refused(folder, name):
    save_model(folder.parent / "outside.safetensors", PARAMS, CONFIG)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json: (names the file|not an index)"):
        load(folder)


def test_an_index_that_promises_what_its_file_lacks_names_it(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"].values()))
    index["weight_map"]["transformer.ln_f.bias"] = first
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"{first}: lacks transformer.ln_f.bias, which model.safetensors.index.json"):
        load(folder)
    (folder / first).unlink()
    with pytest.raises(UserError, match=rf"{first}: could not be read: No such file"):
        load(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON|Expecting"),
        ("[]", "hparams.json"),
        ("{}", "lacks 'n_vocab'"),
        ('{"n_vocab": 5, "n_ctx": 4, "n_embd": 7, "n_head": 2, "n_layer": 1}', "n_heads: 2 does not divide emb_dim 7"),
        ('{"n_vocab": "x", "n_ctx": 4, "n_embd": 8, "n_head": 2, "n_layer": 1}', "vocab_size"),
    ],
)
def test_hparams_that_make_no_model_are_refused(tmp_path, text, message):
    (tmp_path / "hparams.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_folder_without_a_checkpoint_of_tensorflow_says_so(tmp_path):
    (tmp_path / "hparams.json").write_text('{"n_vocab": 5, "n_ctx": 4, "n_embd": 8, "n_head": 2, "n_layer": 1}')
    with pytest.raises(UserError, match="holds no TensorFlow checkpoint, no .*index"):
        load(tmp_path)
    with pytest.raises(UserError, match="holds no TensorFlow checkpoint, no .*index"):
        tensors(tmp_path)


def test_a_type_that_nobody_computes_in_is_named(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"abcd")
    with pytest.raises(UserError, match="w has the type F8_E4M3, expected one of F64"):
        read_safetensors(tmp_path / "w.safetensors")


def test_empty_and_scalar_tensors_are_read(tmp_path):
    from safetensors.numpy import save_file

    arrays = {"none": np.zeros((0, 3), np.float32), "one": np.array(5, np.int64), "half": np.ones(3, np.float16)}
    save_file(arrays, tmp_path / "a.safetensors")
    for name, tensor in read_safetensors(tmp_path / "a.safetensors")[0].items():
        np.testing.assert_array_equal(tensor, arrays[name])
        assert (tensor.shape, tensor.dtype) == (arrays[name].shape, arrays[name].dtype)

"""Files of parameters and checkpoints: what is written is read again, and what is damaged is refused in one line."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest

from gpt.errors import UserError
from gpt.train import checkpoint
from gpt.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from gpt.weights import native
from gpt.weights.load import load
from gpt.weights.native import save_model
from reference.config import GPTConfig

CONFIG = GPTConfig(11, 4, 6, 1, 2)
STATE = {"step": 7, "tokens": np.int64(99), "best_loss": None}


def arrays(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in CONFIG.parameter_shapes().items()}


def moments():
    return {f"{m}.{name}": array for m in "mv" for name, array in arrays(1).items()} | {"step": np.array(7)}


def save(run_dir, step=7, kind="last", seed=0):
    optimizer = moments() if kind == "last" else None
    return save_checkpoint(run_dir, kind, {**STATE, "step": step}, arrays(seed), CONFIG, {"name": "bytes"}, optimizer)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parameters_come_back(tmp_path, dtype):
    params = arrays(dtype=dtype)
    params["head.weight"] = np.asfortranarray(params["head.weight"])
    save_model(tmp_path / "new" / "model.safetensors", params, CONFIG, {"name": "bytes"})
    found = load(tmp_path / "new" / "model.safetensors")
    assert found.config == CONFIG
    assert found.tokenizer == {"name": "bytes"}
    assert set(found.params) == set(params)
    for name, array in params.items():
        assert found.params[name].dtype == dtype
        np.testing.assert_array_equal(found.params[name], array)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_any_safetensors_reader_reads_them(tmp_path):
    from safetensors.numpy import load_file

    save(tmp_path)
    np.testing.assert_array_equal(
        load_file(tmp_path / "last-00000007" / "model.safetensors")["head.weight"], arrays()["head.weight"]
    )


def test_checkpoint_comes_back(tmp_path):
    path = save(tmp_path)
    for given in (tmp_path, path):
        found = load_checkpoint(given)
        assert found.path == path
        assert found.state == {"step": 7, "tokens": 99, "best_loss": None}
        assert set(found.optimizer) == set(moments())
        for name, array in moments().items():
            np.testing.assert_array_equal(found.optimizer[name], array)


def test_parameters_of_a_run_are_its_best_else_its_last(tmp_path):
    save(tmp_path, step=9)
    np.testing.assert_array_equal(load(tmp_path).params["head.weight"], arrays()["head.weight"])
    save(tmp_path, step=5, kind="best", seed=2)
    np.testing.assert_array_equal(load(tmp_path).params["head.weight"], arrays(2)["head.weight"])


def test_only_the_newest_of_each_kind_is_kept(tmp_path):
    for step in (3, 10, 99999999, 100000000):
        save(tmp_path, step)
    save(tmp_path, 5, "best")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-00000005", "last-100000000"]


def test_clean_removes_what_a_killed_process_left(tmp_path):
    save(tmp_path)
    shutil.copytree(tmp_path / "last-00000007", tmp_path / ".last-00000009.123.tmp")
    shutil.copytree(tmp_path / "last-00000007", tmp_path / "last-00000005")
    (tmp_path / ".log.csv.123.tmp").write_text("half")
    (tmp_path / "notes").mkdir()
    (tmp_path / ".mine.tmp").mkdir()
    checkpoint.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "last-00000007", "notes"]


def test_full_disk_leaves_the_checkpoint_before(tmp_path):
    """The limit on a file's size fails a write half-way, as a full disk does."""
    resource = pytest.importorskip("resource", reason="needs Unix")
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))  # enough for the parameters, not for the moments
        with pytest.raises(UserError, match=r"last-00000008: .*could not be written: .*intact: .*last-00000007"):
            save(tmp_path, step=8)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(UserError, match="could not be written"):
            save_model(tmp_path / "alone.safetensors", arrays(), CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["last-00000007"]
    assert load_checkpoint(tmp_path).state["step"] == 7


def damage_header_lies(path):
    data = bytearray(path.read_bytes())
    data[:8] = (2**40).to_bytes(8, "little")
    path.write_bytes(data)


def damage_text(path):
    path.write_text("these are not the weights that you are looking for")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:50]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        damage_header_lies,
        damage_text,
    ],
)
def test_damaged_arrays_are_refused(tmp_path, name, damage):
    path = save(tmp_path) / name
    damage(path)
    with pytest.raises(UserError, match=rf"^[^\n]*{name}: [^\n]+$"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "new"}', "\xff"])
def test_damaged_state_is_refused(tmp_path, text):
    (save(tmp_path) / "trainer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"trainer.json: not a readable checkpoint"):
        load_checkpoint(tmp_path)


def test_newer_formats_are_refused(tmp_path, monkeypatch):
    for module in (checkpoint, native):
        monkeypatch.setattr(module, "FORMAT", 2)
    path = save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"trainer.json: format 2, .*newer"):
        load_checkpoint(path)
    with pytest.raises(UserError, match=r"model.safetensors: format 2, .*newer"):
        load(path)


def test_other_shapes_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for change, message in (
        ({"head.weight": np.zeros((3, 6), np.float32)}, r"head.weight: expected shape \(11, 6\), got \(3, 6\)"),
        ({"extra": np.zeros(1, np.float32)}, "unexpected extra"),
    ):
        save_model(path, arrays() | change, CONFIG)
        with pytest.raises(UserError, match=message):
            load(path)
    params = arrays()
    del params["blocks.0.attn.key.weight"]
    save_model(path, params, CONFIG)
    with pytest.raises(UserError, match=r"missing blocks.0.attn.key.weight"):
        load(path)


def test_foreign_safetensors_are_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file(arrays(), tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not a twingrad model"):
        load(tmp_path / "foreign.safetensors")


def test_impossible_config_is_refused(tmp_path):
    from safetensors.numpy import save_file

    settings = {**CONFIG.to_dict(), "n_kv_heads": 5}
    metadata = {"twingrad": "1", "config": json.dumps(settings), "tokenizer": "null"}
    save_file(arrays(), tmp_path / "m.safetensors", metadata)
    with pytest.raises(UserError, match="n_kv_heads"):
        load(tmp_path / "m.safetensors")


class Malicious:
    def __reduce__(self):
        return pytest.fail, ("the pickle was run",)


def test_a_header_whose_length_looks_like_the_start_of_a_pickle_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    for padding in range(256):
        save_model(path, arrays(), CONFIG, {"name": "x" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no header came out at this length")
    assert load(path).config == CONFIG


def test_pickles_are_refused_and_not_run(tmp_path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Malicious()))
    (tmp_path / "model.pth").write_bytes(b"PK\x03\x04 and a pickle in a zip archive")
    for name in ("model.pt", "model.pth"):
        with pytest.raises(UserError, match=r"(refused, for it is broken or a pickle|not a file of tensors)"):
            load(tmp_path / name)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"holds no model: no model.safetensors"):
        load(tmp_path)
    assert find_checkpoint(tmp_path, "last") is None


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_files_are_for_whom_the_user_s_files_are(tmp_path):
    """safetensors itself writes such as their owner alone can read."""
    before = os.umask(0o027)
    try:
        path = save(tmp_path)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {"0o640"}


@pytest.mark.parametrize(
    ("first", "latest", "chosen"),
    [
        ((1, 5.0), (40, 5.0), "last"),  # the only one that was evaluated, before it had learnt anything
        ((1, 5.0), (40, 6.0), "best"),
        ((30, 5.0), (40, 5.0), "best"),
    ],
)
def test_a_run_s_model_is_the_best_that_had_a_rival_else_the_last(tmp_path, first, latest, chosen):
    for kind, (step, val_loss), seed in (("best", first, 1), ("last", latest, 2)):
        state = {**STATE, "step": step, "val_loss": val_loss}
        save_checkpoint(tmp_path, kind, state, arrays(seed), CONFIG, {"name": "bytes"}, moments())
    loaded = np.asarray(load(tmp_path).params["tok_emb.weight"])
    assert np.array_equal(loaded, arrays(1 if chosen == "best" else 2)["tok_emb.weight"])


def test_a_run_that_is_not_there_is_looked_for_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^runs/latest: there is no run; train one, or name a run's folder"):
        load("runs/latest")

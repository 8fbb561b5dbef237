"""What is captured of attention, and that a head which must learn to look back is seen to do so."""

import numpy as np
import pytest

from gpt.cli import main
from gpt.engine import Batch, OptimizerConfig, create_engine
from gpt.errors import UserError
from gpt.study.attention import AttentionConfig, animate, capture, plot_maps, plot_track, show, snapshots
from gpt.tokenizers import ByteTokenizer
from gpt.weights.native import save_model
from reference import PRESETS, attention
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

LENGTH = 6  # of a text that is then said again


def copies(rng, rows=32):
    """Random tokens below 10, and the same again: what comes next in the second half is LENGTH - 1 tokens back."""
    first = rng.integers(0, 10, (rows, LENGTH))
    tokens = np.concatenate([first, first], axis=1)
    targets = tokens[:, 1:].copy()
    targets[:, : LENGTH - 1] = -100
    return Batch(tokens[:, :-1], targets)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Snapshots of a model with one head while it learns to copy."""
    folder = tmp_path_factory.mktemp("run")
    config = GPTConfig(257, 2 * LENGTH, 32, 1, 1, qkv_bias=True, tie_embeddings=True)
    params, optimizer = initialize(config, Generator(1), "gpt2"), OptimizerConfig(weight_decay=0)
    engine = create_engine("numpy", config, params, optimizer, "float64")  # what is learnt when hangs on every rounding
    rng = np.random.default_rng(0)
    for step in range(751):
        if step % 150 == 0:
            save_model(folder / f"step-{step:08d}.safetensors", engine.parameters(), config, ByteTokenizer().spec())
        engine.accumulate(copies(rng))
        engine.step(2e-3, max_norm=1.0)
    save_model(folder / "model.safetensors", engine.parameters(), config, ByteTokenizer().spec())
    return folder


@pytest.mark.parametrize("preset", ["bytes-tiny", "bytes-llama"])
def test_rows_sum_to_one_nothing_is_seen_ahead_and_both_engines_agree(preset):
    pytest.importorskip("torch")
    config = PRESETS[preset]
    params = initialize(config, Generator(1), "gpt2")
    tokens = np.arange(20, 33)
    maps = [capture(create_engine(name, config, params, dtype="float64"), tokens) for name in ("numpy", "torch")]
    assert maps[0].shape == (config.n_layers, config.n_heads, 13, 13)
    np.testing.assert_allclose(maps[0].sum(axis=-1), 1, rtol=1e-12)
    assert not np.triu(maps[0], 1).any()
    assert (maps[0][..., 0, 0] == 1).all()
    np.testing.assert_allclose(maps[1], maps[0], atol=1e-12)


def test_what_is_captured_is_what_the_model_computes_with(monkeypatch):
    """The probabilities that the reference's own attention saved in the same pass."""
    config = PRESETS["bytes-llama"]
    engine, seen = create_engine("numpy", config, initialize(config, Generator(1), "gpt2")), []
    forward = attention.forward

    def spy(*arguments):
        y, saved = forward(*arguments)
        seen.append(attention.weights(saved)[0])
        return y, saved

    monkeypatch.setattr(attention, "forward", spy)
    maps = capture(engine, np.arange(9))
    np.testing.assert_array_equal(maps, np.stack(seen[: config.n_layers]))


def test_the_head_that_must_learn_to_look_back_does_and_is_seen(run):
    """At position t of the second half the next token stands at t + 1 - LENGTH."""
    from gpt.weights.load import load

    tokens = np.tile(np.random.default_rng(9).permutation(10)[:LENGTH], 2)[:-1]
    tracked = []
    for path in snapshots(run).values():
        saved = load(path)
        maps = capture(create_engine("numpy", saved.config, saved.params), tokens)
        tracked.append(np.mean([maps[0, 0, t, t + 1 - LENGTH] for t in range(LENGTH, 2 * LENGTH - 1)]))
    assert len(tracked) == 6
    assert tracked[0] < 0.2
    assert tracked[-1] > 0.8
    assert tracked[-1] > tracked[1]


def test_the_command_draws_maps_an_animation_and_a_track(run, tmp_path, capsys):
    options = ["--model", str(run), "--text", "repeatrepea", "--engine", "numpy", "--out", str(tmp_path / "out")]
    assert main(["attention", *options, "--pair", "8,3"]) == 0
    paths = capsys.readouterr().out.split()
    names = ["maps.png", "maps.pdf", "evolution.gif", "track.png", "track.pdf"]
    assert [path.rpartition("/")[2] for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    from PIL import Image

    with Image.open(tmp_path / "out" / "evolution.gif") as animation:
        assert animation.n_frames == 6
    with Image.open(tmp_path / "out" / "maps.png") as image:
        assert min(image.size) > 300


def test_figures_show_every_layer_and_head():
    maps = np.tril(np.ones((2, 3, 4, 4)))
    maps /= maps.sum(axis=-1, keepdims=True)
    figure = plot_maps(maps, list("abcd"), "title")
    drawn = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in drawn] == [f"layer {i}, head {h}" for i in range(2) for h in range(3)]
    assert [label.get_text() for label in drawn[0].get_xticklabels()] == list("abcd")
    np.testing.assert_array_equal(drawn[4].images[0].get_array(), maps[1, 1])
    track = plot_track([0, 10, 20], np.arange(18).reshape(3, 2, 3) / 18, ("a", "b"))
    assert len(track.axes[0].lines) == 6


def test_dollars_in_a_text_are_no_formula(tmp_path):
    figures = plot_maps(np.eye(3)[None, None], ["$", r"\alph$", "$$"]), plot_track([0], np.ones((1, 1, 1)), ("$", "a$"))
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")


def test_training_keeps_snapshots_from_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a short text that is read again and again. " * 20)
    options = [
        "--data",
        "text.txt",
        "--preset",
        "bytes-tiny",
        "--engine",
        "numpy",
        "--steps",
        "7",
        "--max_length",
        "16",
    ]
    assert main(["train", *options, "--study-every", "3", "--out", "run"]) == 0
    assert list(snapshots(tmp_path / "run")) == [0, 3, 6]
    assert [path.name for path in show(AttentionConfig("run", "a short", "out"))] == [
        "maps.png",
        "maps.pdf",
        "evolution.gif",
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "text: expected a text"),
        (["--text", "abc", "--pair", "9,0"], "pair: (9, 0) is not in the text, which has 3 tokens"),
        (["--text", "abc", "--pair", "2"], "pair: expected integer,integer"),
        (["--text", "abc", "--pair", "2,1"], "has no snapshots to track it over"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    config = PRESETS["bytes-tiny"]
    save_model(tmp_path / "m.safetensors", initialize(config, Generator(1)), config, ByteTokenizer().spec())
    assert main(["attention", "--model", "m.safetensors", "--engine", "numpy", *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_an_animation_replaces_an_older_one_whole(tmp_path):
    maps = np.tril(np.ones((2, 1, 1, 3, 3))) / 3
    for _ in range(2):
        animate(tmp_path / "a.gif", [0, 5], maps, list("abc"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]
    with pytest.raises(UserError, match="cannot write"):
        animate(tmp_path / "a.gif" / "b.gif", [0, 5], maps, list("abc"))

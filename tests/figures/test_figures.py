"""Every printed figure, with each engine; the whole training runs are marked slow."""

import os

import pytest

from gpt.weights.native import SavedModel
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator
from tests.figures import engines, pretrained, registry

REPRODUCTIONS = registry.load_all()
HERE = {name: reproduction for name, reproduction in REPRODUCTIONS.items() if name not in registry.PRETRAINED}
DATA = {
    "the-verdict": "the-verdict.txt",
    "sms-spam": "SMSSpamCollection.tsv",
    "instruction-data": "instruction-data.json",
}
NEEDS = {
    **{
        name: ("TWINGRAD_DATA" in os.environ, f"TWINGRAD_DATA names no folder with {file}")
        for name, file in DATA.items()
    },
    "gpt2": ("TIKTOKEN_CACHE_DIR" in os.environ, "TIKTOKEN_CACHE_DIR names no folder with GPT-2's vocabulary"),
    "torch": (True, ""),
}
SLOW = {("ch05.initial_losses", "torch")}  # a quarter of a minute on top of NumPy's, and no other figure


def case(name, engine):
    marks = [pytest.mark.slow] if HERE[name].slow or (name, engine) in SLOW else []
    return pytest.param(name, engine, id=f"{name}-{engine}" if engine else name, marks=marks)


CASES = [case(name, engine) for name, reproduction in HERE.items() for engine in reproduction.engines]


@pytest.mark.parametrize("name, engine", CASES)
def test_figure(name, engine):
    entry = registry.FIGURES[name]
    for need in entry["needs"]:
        present, reason = NEEDS[need]
        if not present:
            pytest.skip(reason)
    if engine == "torch" or "torch" in entry["needs"]:
        pytest.importorskip("torch")
    ours = REPRODUCTIONS[name].function(*([engines.layers(engine)] if engine else []))
    assert registry.error(name, ours) <= entry["atol"], f"{entry['setup']}: {ours}"


def test_every_figure_has_a_source_and_a_reproduction():
    assert REPRODUCTIONS.keys() == registry.REPRODUCTIONS.keys()
    for entry in registry.FIGURES.values():
        assert list(entry) == ["id", "source", "setup", "printed", "value", "atol", "needs"]
        assert registry.difference(entry["value"], entry["value"]) == 0


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [
        ([1.0, {"a": 2}], [1.5, {"a": 1}], 1.0),
        ([1.0], [1.0, 2.0], float("inf")),
        ({"a": 1}, {"b": 1}, float("inf")),
        (float("nan"), 1.0, float("inf")),
        ([None, "x", True], [None, "x", True], 0.0),
        ("x", "y", float("inf")),
        (True, 1, float("inf")),
        (None, 0.0, float("inf")),
    ],
)
def test_difference(ours, theirs, expected):
    assert registry.difference(ours, theirs) == expected


def test_figures_of_the_pretrained_models_are_computed_and_differ_for_another_model(monkeypatch):
    """With a random model of GPT-2's vocabulary: each figure has the form of the printed one, and is not it."""
    for need in ("the-verdict", "gpt2"):
        present, reason = NEEDS[need]
        if not present:
            pytest.skip(reason)
    config = GPTConfig(50257, 256, 8, 1, 2, qkv_bias=True, tie_embeddings=True)
    saved = SavedModel(initialize(config, Generator(1), "gpt2"), config, {"name": "gpt2"})
    monkeypatch.setattr(pretrained, "load", lambda name: saved)
    pretrained.engine.cache_clear()
    for name in registry.PRETRAINED:
        for engine in REPRODUCTIONS[name].engines:
            if engine == "torch":
                pytest.importorskip("torch")
            ours = REPRODUCTIONS[name].function(*([engines.layers(engine)] if engine else []))
            assert registry.error(name, ours) > registry.FIGURES[name]["atol"], name
            if not isinstance(ours, str) and "shape" not in ours:
                assert registry.error(name, ours) < float("inf"), name
    pretrained.engine.cache_clear()

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import PRESETS, GPTConfig

SMALL = {"vocab_size": 37, "context_length": 16, "emb_dim": 12, "n_layers": 2, "n_heads": 3}
TIED = {"gpt2-small": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


@pytest.mark.parametrize("name, count", TIED.items())
def test_gpt2_has_the_published_number_of_parameters(name, count):
    """Those of OpenAI's checkpoints, whose attention has biases."""
    assert PRESETS[name].n_parameters == count


@pytest.mark.parametrize(
    "name, count, tied",
    [
        ("gpt2-small", 163_009_536, 124_412_160),
        ("gpt2-medium", 406_212_608, 354_749_440),
        ("gpt2-large", 838_220_800, 773_891_840),
        ("gpt2-xl", 1_637_792_000, 1_557_380_800),
    ],
)
def test_the_books_models_have_the_printed_number_of_parameters(name, count, tied):
    """Its head is a matrix of its own, its attention has no biases; tied, the count that the book compares with."""
    config = PRESETS[name].replace(qkv_bias=False, tie_embeddings=False)
    assert config.n_parameters == count
    assert config.replace(tie_embeddings=True).n_parameters == tied


def test_the_books_model_in_megabytes_and_by_part():
    config = PRESETS["book-124m"]
    assert config.n_parameters == 163_009_536
    assert round(config.n_parameters * 4 / 2**20, 2) == 621.83
    of_block = {name: math.prod(shape) for name, shape in config.parameter_shapes().items() if "blocks.0." in name}
    assert sum(count for name, count in of_block.items() if ".mlp." in name) == 4_722_432
    assert sum(count for name, count in of_block.items() if ".attn." in name) == 2_360_064
    with_bias = config.replace(qkv_bias=True).parameter_shapes()
    assert sum(math.prod(s) for name, s in with_bias.items() if "blocks.0.attn." in name) == 2_362_368


def test_the_courses_model():
    """7 heads of 54 do not fill 384 dimensions: nothing has to."""
    config = PRESETS["course-gpt"]
    assert config.n_parameters == 19_837_954
    shapes = config.parameter_shapes()
    assert shapes["blocks.0.attn.query.weight"] == (378, 384)
    assert shapes["blocks.0.attn.out.weight"] == (384, 378)


def test_sizes_that_are_left_out_follow_from_the_others():
    config = GPTConfig(**SMALL)
    assert (config.n_kv_heads, config.head_dim, config.mlp_dim) == (3, 4, 48)
    wider = config.replace(emb_dim=24)
    assert (wider.head_dim, wider.mlp_dim) == (8, 96)
    assert config.replace(mlp_dim=50).replace(emb_dim=24).mlp_dim == 50


def test_parameters_by_what_is_chosen():
    names = set(GPTConfig(**SMALL).parameter_shapes())
    assert "head.weight" in names
    assert not {"head.bias", "blocks.0.attn.query.bias"} & names
    assert "head.weight" not in GPTConfig(**SMALL, tie_embeddings=True).parameter_shapes()
    assert "head.bias" in GPTConfig(**SMALL, head_bias=True).parameter_shapes()
    assert "blocks.1.attn.key.bias" in GPTConfig(**SMALL, qkv_bias=True).parameter_shapes()
    assert not [name for name in GPTConfig(**SMALL, bias=False).parameter_shapes() if name.endswith("bias")]
    grouped = GPTConfig(**{**SMALL, "n_heads": 6, "emb_dim": 24}, n_kv_heads=2).parameter_shapes()
    assert grouped["blocks.0.attn.query.weight"] == (24, 24)
    assert grouped["blocks.0.attn.key.weight"] == grouped["blocks.0.attn.value.weight"] == (8, 24)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name):
    config = PRESETS[name]
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_single_rate_stands_in_for_all_three():
    config = GPTConfig.from_dict({**SMALL, "drop_rate": 0.1, "attn_dropout": 0.0})
    assert (config.emb_dropout, config.shortcut_dropout, config.attn_dropout) == (0.1, 0.1, 0.0)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["gpt2-small"].n_layers = 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n_layer": 2}, "n_layer: no such field of a GPTConfig; did you mean n_layers?"),
        ({"n_heads": 5}, "n_heads: 5 does not divide emb_dim 12; choose one that does, or set head_dim"),
        ({"n_kv_heads": 2}, "n_kv_heads: 2 does not divide n_heads 3"),
        ({"tie_embeddings": True, "head_bias": True}, "head_bias: a head tied to the token embedding has no bias"),
        ({"mlp": "relu"}, "mlp: 'relu' is not one of "),
        ({"norm_eps": 0.0}, "norm_eps: 0.0 is not a positive number"),
        ({"emb_dropout": 1.0}, "emb_dropout: 1.0 is not a rate, 0 <= rate < 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_fields_name(settings, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        GPTConfig.from_dict({**SMALL, **settings})
    assert str(caught.value).startswith(message)


def test_a_size_that_is_not_given_is_named():
    with pytest.raises(ValueError, match="n_layers: not given, and it has no default"):
        GPTConfig.from_dict({name: value for name, value in SMALL.items() if name != "n_layers"})


sizes = ("vocab_size", "context_length", "emb_dim", "n_layers", "n_heads")
no_size = st.one_of(st.integers(max_value=0), st.floats(), st.booleans(), st.none(), st.text())
no_rate = st.one_of(st.floats(max_value=-1e-9), st.floats(min_value=1.0), st.just(math.nan), st.none(), st.text())
no_truth = st.one_of(st.integers(), st.none(), st.text())


@given(
    st.one_of(
        st.tuples(st.sampled_from(sizes), no_size),
        st.tuples(st.sampled_from(["n_kv_heads", "head_dim", "mlp_dim"]), st.integers(max_value=-1)),
        st.tuples(st.sampled_from(["emb_dropout", "shortcut_dropout", "attn_dropout"]), no_rate),
        st.tuples(st.sampled_from(["qkv_bias", "bias", "head_bias", "tie_embeddings"]), no_truth),
        st.tuples(st.just("norm_eps"), st.sampled_from([0.0, -1e-5, math.inf, math.nan, "small", None])),
        st.tuples(st.sampled_from(["norm", "mlp", "position"]), st.one_of(st.text(max_size=3), st.none())),
    )
)
def test_any_impossible_value_is_refused_with_the_fields_name(change):
    name, value = change
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        GPTConfig(**{**SMALL, name: value})
    assert str(caught.value).startswith(f"{name}: ")


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40))
def test_heads_either_fit_or_are_refused(n_heads, n_kv_heads, emb_dim):
    settings = {**SMALL, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "emb_dim": emb_dim}
    if emb_dim % n_heads == 0 and n_heads % n_kv_heads == 0:
        config = GPTConfig(**settings)
        assert config.head_dim * n_heads == emb_dim
        assert config.n_parameters == sum(math.prod(shape) for shape in config.parameter_shapes().values())
    else:
        with pytest.raises(ValueError, match="^n_"):
            GPTConfig(**settings)

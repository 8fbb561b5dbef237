"""What chapter 4 of the book, and the course, show about the layers and the whole model, on both engines."""

import math

import numpy as np
import pytest

from gpt.engine import Batch, create_engine
from gpt.study.flow import SAMPLE, deep_network
from reference import GPT, PRESETS, GPTConfig, cross_entropy, gelu, layer_norm, linear, philox
from reference.init import initialize
from reference.torch_rng import Generator
from tests.capabilities import demonstrations
from tests.figures.engines import draw_linear

RNG = np.random.default_rng(5)
TINY = GPTConfig(31, 8, 24, 2, 3)


def batch(config, rows=2, seed=3):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (rows, config.context_length + 1))
    return Batch(tokens[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 768)])
def test_layer_norm_gives_mean_0_and_variance_1_and_is_pytorchs(shape):
    torch = pytest.importorskip("torch")
    x = (3 + 2 * RNG.normal(size=shape)).astype(np.float32)
    weight, bias = RNG.normal(size=(2, shape[-1])).astype(np.float32)
    plain, _ = layer_norm.forward(x, np.ones_like(weight), np.zeros_like(bias))
    np.testing.assert_allclose(plain.mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(plain.var(axis=-1), 1, atol=1e-4)
    x, weight, bias = (array.astype(np.float64) for array in (x, weight, bias))
    theirs = torch.nn.functional.layer_norm(
        *map(torch.from_numpy, (x,)), shape[-1:], *map(torch.from_numpy, (weight, bias))
    )
    np.testing.assert_allclose(layer_norm.forward(x, weight, bias)[0], theirs.numpy(), atol=1e-12)


def test_gelu_is_pytorchs():
    torch = pytest.importorskip("torch")
    x = np.linspace(-6, 6, 1001)
    for approximate in ("none", "tanh"):
        theirs = torch.nn.functional.gelu(torch.from_numpy(x), approximate=approximate).numpy()
        np.testing.assert_allclose(gelu.forward(x, approximate)[0], theirs, atol=1e-14)


def test_gelu_and_relu_are_plotted_side_by_side(tmp_path):
    figure = demonstrations.plot_activations(tmp_path / "activations.png")
    assert [axes.get_title() for axes in figure.axes] == ["GELU", "ReLU"]
    assert (tmp_path / "activations.png").stat().st_size > 1000
    gelu_line, relu_line = (axes.lines[0].get_ydata() for axes in figure.axes)
    assert relu_line.min() == 0
    assert -0.18 < gelu_line.min() < -0.16


def test_shortcuts_keep_the_gradients_of_the_first_layers_alive():
    without, with_shortcuts = (demonstrations.gradient_means(shortcuts) for shortcuts in (False, True))
    assert len(without) == len(with_shortcuts) == 5
    assert max(without[:3]) < 1e-3
    assert min(with_shortcuts) > 0.2
    print(demonstrations.gradient_table())


@pytest.mark.parametrize("shortcuts", [False, True])
def test_gradients_through_shortcuts_are_those_of_autograd(shortcuts):
    torch = pytest.importorskip("torch")
    layers = deep_network()
    parameters = [torch.tensor(array, requires_grad=True) for weight_and_bias in layers for array in weight_and_bias]
    x = torch.tensor(SAMPLE)
    for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        y = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias), approximate="tanh")
        x = x + y if shortcuts and x.shape == y.shape else y
    torch.nn.functional.mse_loss(x, torch.zeros(1, 1, dtype=torch.float64)).backward()
    theirs = [weight.grad.abs().mean().item() for weight in parameters[::2]]
    np.testing.assert_allclose(demonstrations.gradient_means(shortcuts), theirs, rtol=1e-12)


def test_a_block_keeps_the_shape_and_is_the_same_forward_and_backward_in_both_engines():
    pytest.importorskip("torch")
    config = GPTConfig(13, 4, 768, 1, 12)
    traces = []
    for name in ("numpy", "torch"):
        engine = create_engine(name, config, initialize(config, Generator(1)), dtype="float64")
        tensors = []
        engine.trace(batch(config), lambda name, array, note=tensors.append: note((name, array.copy())))
        traces.append(dict(tensors))
    ours, theirs = traces
    assert ours["emb"].shape == ours["blocks.0.shortcut2"].shape == (2, 4, 768)
    for name in ("blocks.0.shortcut1", "blocks.0.shortcut2", "d.blocks.0.shortcut1", "d.emb"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-12 * np.abs(theirs[name]).max())


def test_a_tied_head_adds_the_gradients_of_both_uses_and_is_saved_once():
    tied, untied = TINY.replace(tie_embeddings=True), TINY
    params = initialize(tied, Generator(2))
    apart = {**params, "head.weight": params["tok_emb.weight"].copy()}
    of_tied, of_untied = (
        create_engine("numpy", config, p, dtype="float64") for config, p in ((tied, params), (untied, apart))
    )
    assert of_tied.accumulate(batch(TINY)) == of_untied.accumulate(batch(TINY))
    both = of_untied.gradients()["tok_emb.weight"] + of_untied.gradients()["head.weight"]
    np.testing.assert_allclose(of_tied.gradients()["tok_emb.weight"], both, rtol=1e-10, atol=1e-14)
    assert "head.weight" not in of_tied.parameters()
    assert untied.n_parameters - tied.n_parameters == 31 * 24


def test_all_sizes_build_without_memory():
    torch = pytest.importorskip("torch")
    from gpt import model
    from tests.figures.chapter4 import SIZES, size

    for name in SIZES:
        with torch.device("meta"):
            built = model.GPT(size(name))
        assert sum(p.numel() for p in built.parameters()) == size(name).n_parameters


@pytest.mark.parametrize(
    "rates, sites",
    [
        ({"emb_dropout": 0.1}, {philox.EMBEDDING}),
        ({"attn_dropout": 0.2}, {philox.ATTENTION}),
        ({"shortcut_dropout": 0.3}, {philox.ATTENTION_SHORTCUT, philox.MLP_SHORTCUT}),
    ],
)
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_each_dropout_rate_reaches_its_own_places(name, rates, sites):
    if name == "torch":
        pytest.importorskip("torch")
    asked = set()

    def noise(layer, site, shape, rate):
        asked.add((site, rate))
        return np.ones(shape, bool)

    config = TINY.replace(**rates)
    create_engine(name, config, initialize(config, Generator(1))).accumulate(batch(config), noise=noise)
    assert asked == {(site, *rates.values()) for site in sites}


def test_one_dropout_rate_stands_in_for_those_not_given():
    config = GPTConfig.from_dict({**TINY.to_dict(), "drop_rate": 0.3} | {"attn_dropout": 0.0})
    assert config.attn_dropout == 0.0
    sizes = {"vocab_size": 31, "context_length": 8, "emb_dim": 24, "n_layers": 2, "n_heads": 3}
    config = GPTConfig.from_dict({**sizes, "drop_rate": 0.3, "attn_dropout": 0.1})
    assert (config.emb_dropout, config.shortcut_dropout, config.attn_dropout) == (0.3, 0.3, 0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_any_preset_can_be_changed(name):
    config = PRESETS[name]
    assert config.replace() == config
    changed = config.replace(vocab_size=99, context_length=16)
    assert (
        changed.parameter_shapes()["blocks.0.attn.out.weight"] == config.parameter_shapes()["blocks.0.attn.out.weight"]
    )


def test_the_course_model_starts_where_guessing_would():
    """Weights N(0, 0.02), embeddings too: the loss is near log 4096, the loss of equal probabilities."""
    config = PRESETS["course-gpt"]
    assert config.n_parameters == 19_837_954
    model = GPT.seeded(config.replace(context_length=64), seed=1, scheme="gpt2")
    assert model.params["tok_emb.weight"].std() == pytest.approx(0.02, rel=0.01)
    assert model.params["pos_emb.weight"].std() == pytest.approx(0.02, rel=0.02)
    tokens = RNG.integers(0, 4096, (2, 65))
    assert model.loss(tokens[:, :-1], tokens[:, 1:]) == pytest.approx(math.log(4096), abs=0.15)


def test_cross_entropy_is_pytorchs_and_stable():
    torch = pytest.importorskip("torch")
    logits, targets = RNG.normal(size=(6, 50)).astype(np.float32), RNG.integers(0, 50, 6)
    theirs = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets)).item()
    assert cross_entropy.forward(logits, targets)[0] == pytest.approx(theirs, abs=1e-6)
    by_hand = -np.log(np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True))[np.arange(6), targets].mean()
    assert cross_entropy.forward(logits, targets)[0] == pytest.approx(by_hand, abs=1e-6)
    loss, saved = cross_entropy.forward(logits * 1e3, targets)
    assert np.isfinite(loss)
    assert np.isfinite(cross_entropy.backward(1.0, saved)).all()


def test_feed_forward_layers_widen_four_times_and_come_back():
    generator = Generator(1)
    up, down = draw_linear(generator, 768, 4 * 768), draw_linear(generator, 4 * 768, 768)
    x = generator.rand((2, 3, 768))
    wide = gelu.forward(linear.forward(x, *up)[0], "tanh")[0]
    assert wide.shape == (2, 3, 3072)
    assert linear.forward(wide, *down)[0].shape == x.shape

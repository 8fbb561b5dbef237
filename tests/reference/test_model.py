"""The whole model by hand: against central differences and, tensor by tensor, against PyTorch."""

import numpy as np
import pytest

from gpt.parity import check
from gpt.parity import model as parity
from reference import GPT, GPTConfig, cross_entropy, model
from reference.config import CHOICES
from reference.philox import PhiloxNoise

CONFIG = GPTConfig(vocab_size=37, context_length=16, emb_dim=12, n_layers=2, n_heads=3, qkv_bias=True)
DROPOUTS = ("emb_dropout", "shortcut_dropout", "attn_dropout")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with check.one_thread():
        yield


def tokens(shape=(2, 9), seed=0):
    return np.random.default_rng(seed).integers(0, 37, shape)


@pytest.mark.parametrize("function", parity.CHECKS)
@pytest.mark.parametrize("name", parity.CONFIGS)
def test_every_model_passes_every_check(name, function):
    run, needs = parity.CHECKS[function]
    if check.missing(needs):
        pytest.skip(f"{needs} is not installed")
    results = list(run(name))
    assert len(results) > 10
    assert not [str(result) for result in results if not result.passed]


def test_the_models_that_are_checked_cover_what_a_config_can_choose():
    configs = parity.CONFIGS.values()
    for field in ("tie_embeddings", "qkv_bias", "bias", "head_bias"):
        assert {getattr(config, field) for config in configs} == {True, False}, field
    for field, choices in CHOICES.items():
        assert {getattr(config, field) for config in configs} == set(choices), field
    assert {config.n_kv_heads < config.n_heads for config in configs} == {True, False}
    assert all(getattr(config, rate) for config in configs for rate in DROPOUTS)
    assert any(config.head_dim * config.n_heads != config.emb_dim for config in configs)
    batch = parity.batch(next(iter(configs)))
    assert 0 < batch.counted < batch.targets.size
    assert batch.inputs.shape[1] < next(iter(configs)).context_length


def test_gradients_add_up_over_two_passes():
    params = parity.parameters(CONFIG)
    first, second = parity.batch(CONFIG, 0), parity.batch(CONFIG, 1)
    alone = [parity.model_gradients(CONFIG, params, batch, None)[1] for batch in (first, second)]
    logits, saved = model.forward(params, CONFIG, first.inputs)
    grads = model.backward(cross_entropy.backward(1.0, cross_entropy.forward(logits, first.targets)[1]), saved)
    logits, saved = model.forward(params, CONFIG, second.inputs)
    same = model.backward(cross_entropy.backward(1.0, cross_entropy.forward(logits, second.targets)[1]), saved, grads)
    assert same is grads
    for name in params:
        np.testing.assert_allclose(grads[name], alone[0][name] + alone[1][name], rtol=0, atol=1e-14, err_msg=name)


def test_gradients_have_the_parameters_names_and_shapes():
    for config in parity.CONFIGS.values():
        gradients = parity.model_gradients(config, parity.parameters(config), parity.batch(config), parity.noise())[1]
        assert {name: gradient.shape for name, gradient in gradients.items()} == config.parameter_shapes()


@pytest.mark.parametrize("poison", [np.nan, 7.0])
def test_spare_memory_changes_nothing_and_is_used(poison):
    config = parity.CONFIGS["tied"]
    params, batch = parity.parameters(config), parity.batch(config)
    expected = parity.model_gradients(config, params, batch, None)[1]
    spare = {name: np.full_like(gradient, poison) for name, gradient in expected.items()}
    memory = dict(spare)
    logits, saved = model.forward(params, config, batch.inputs)
    dlogits = cross_entropy.backward(1.0, cross_entropy.forward(logits, batch.targets)[1])
    grads = model.backward(dlogits, saved, spare=spare)
    for name, gradient in expected.items():
        np.testing.assert_array_equal(grads[name], gradient, err_msg=name)
    assert grads["blocks.0.mlp.up.weight"] is memory["blocks.0.mlp.up.weight"]
    assert not {name for name in spare if grads[name] is spare[name]}


def test_a_changed_future_token_changes_nothing_before_it():
    gpt = GPT(CONFIG, parity.parameters(CONFIG))
    before = tokens()
    after = before.copy()
    after[:, 6:] = (after[:, 6:] + 1) % 37
    np.testing.assert_array_equal(gpt(before)[:, :6], gpt(after)[:, :6])
    assert (gpt(before)[:, 6:] != gpt(after)[:, 6:]).any()


def test_some_positions_give_the_logits_of_those_positions():
    params, inputs = parity.parameters(CONFIG), tokens()
    whole, _ = model.forward(params, CONFIG, inputs)
    last, _ = model.forward(params, CONFIG, inputs, positions=slice(-1, None))
    np.testing.assert_allclose(last, whole[:, -1:], rtol=1e-13)


@pytest.mark.parametrize(
    "positions",
    [
        slice(-1, None),
        slice(None, None, -1),
        np.array([[4], [2]]),
        np.array([[3, 3, -1], [0, 5, 0]]),
        np.array([[*range(8, -1, -1)]] * 2),
    ],
    ids=["last", "reversed", "one each", "twice", "all of them reversed"],
)
def test_gradients_of_some_positions_are_those_of_no_gradient_elsewhere(positions):
    params, inputs = parity.parameters(CONFIG), tokens()
    chosen, saved = model.forward(params, CONFIG, inputs, positions=positions)
    dchosen = np.random.default_rng(1).normal(size=chosen.shape)
    some = model.backward(dchosen, saved)
    whole, saved = model.forward(params, CONFIG, inputs)
    dlogits = np.zeros_like(whole)
    for row, of_row in enumerate(dchosen):
        for place, d in zip(np.broadcast_to(np.arange(9)[positions], chosen.shape[:2])[row], of_row, strict=True):
            dlogits[row, place] += d
    for name, gradient in model.backward(dlogits, saved).items():
        np.testing.assert_allclose(some[name], gradient, rtol=0, atol=1e-12 * np.abs(gradient).max() + 1e-15)


def test_the_loss_of_an_adapted_head_and_its_gradients_are_those_of_its_logits():
    config = CONFIG.replace(lora={"rank": 2, "alpha": 4.0, "targets": ("query", "head")})
    params, batch = parity.parameters(config), parity.batch(config)
    logits, saved = model.forward(params, config, batch.inputs)
    loss, saved_loss = cross_entropy.forward(logits, batch.targets)
    expected = model.backward(cross_entropy.backward(1.0, saved_loss), saved)
    fused, saved = model.forward(params, config, batch.inputs, targets=batch.targets)
    assert fused == loss
    grads = model.backward(1.0, saved)
    assert sorted(grads) == sorted(expected)
    assert grads["head.lora_b"].any()
    for name, gradient in grads.items():
        np.testing.assert_array_equal(gradient, expected[name])


@pytest.mark.parametrize("rate", DROPOUTS)
def test_each_dropout_acts_in_training_and_only_there(rate):
    config = CONFIG.replace(**{rate: 0.5})
    gpt, plain = (GPT(c, parity.parameters(CONFIG)) for c in (config, CONFIG))
    np.testing.assert_array_equal(gpt(tokens()), plain(tokens()))
    dropped = gpt(tokens(), PhiloxNoise(1, step=0))
    assert (dropped != plain(tokens())).any()
    np.testing.assert_array_equal(dropped, gpt(tokens(), PhiloxNoise(1, step=0)))
    assert (dropped != gpt(tokens(), PhiloxNoise(1, step=1))).any()
    assert (dropped != gpt(tokens(), PhiloxNoise(2, step=0))).any()


def test_a_micro_batch_drops_what_the_whole_batch_would_have():
    config = parity.CONFIGS["untied"]
    params, inputs = parity.parameters(config), parity.batch(config).inputs
    whole, _ = model.forward(params, config, inputs, PhiloxNoise(1, step=3))
    part, _ = model.forward(params, config, inputs[2:], PhiloxNoise(1, step=3, first_example=2))
    np.testing.assert_allclose(part, whole[2:], rtol=0, atol=1e-12)


def test_a_trace_names_every_tensor_once_in_the_order_of_execution():
    config, names = parity.CONFIGS["untied"], []
    params, batch = parity.parameters(config), parity.batch(config)
    logits, saved = model.forward(params, config, batch.inputs, parity.noise(), lambda name, y: names.append(name))
    forward = list(names)
    assert len(set(forward)) == len(forward)
    assert forward[:4] == ["tok_emb", "pos_emb", "emb", "emb.dropout"]
    assert forward[-2:] == ["final_norm", "head"]
    dlogits = cross_entropy.backward(1.0, cross_entropy.forward(logits, batch.targets)[1])
    model.backward(dlogits, saved, trace=lambda name, dy: names.append(name))
    backward = names[len(forward) :]
    assert sorted(backward) == sorted(f"d.{name}" for name in forward)
    assert backward[0] == "d.head"


def test_the_loss_of_an_untrained_model_is_near_that_of_a_uniform_one():
    gpt = GPT.seeded(GPTConfig(257, 16, 24, 2, 3), seed=1, scheme="gpt2")
    assert gpt.loss(tokens(), tokens(seed=1)) == pytest.approx(np.log(257), rel=0.02)


def test_the_class_gives_what_the_functions_give():
    params, batch = parity.parameters(CONFIG), parity.batch(CONFIG)
    gpt = GPT(CONFIG, params)
    loss, gradients = gpt.loss_and_gradients(batch.inputs, batch.targets)
    expected, same = parity.model_gradients(CONFIG, params, batch, None)
    assert loss == expected == gpt.loss(batch.inputs, batch.targets)
    for name in same:
        np.testing.assert_array_equal(gradients[name], same[name])


def test_too_many_positions_are_refused():
    gpt = GPT(CONFIG, parity.parameters(CONFIG))
    with pytest.raises(ValueError, match="tokens: 17 positions, more than the context length of 16"):
        gpt(tokens((1, 17)))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda params: params.pop("final_norm.bias"), "params: final_norm.bias is missing"),
        (lambda params: params.update(x=np.ones(1)), "params: x is not a parameter of this model"),
        (
            lambda params: params.update({"head.weight": np.ones((12, 37))}),
            r"params: head.weight has shape \(12, 37\), expected \(37, 12\)",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_refused_by_name(change, message):
    params = parity.parameters(CONFIG)
    change(params)
    with pytest.raises(ValueError, match=message):
        GPT(CONFIG, params)

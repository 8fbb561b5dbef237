"""Gradients without shortcuts, held against PyTorch's autograd and central differences; and the book's experiment."""

import dataclasses
import itertools

import numpy as np
import pytest

from gpt.parity.model import CONFIGS, batch, noise, parameters
from gpt.study.flow import BOUND, DEPTH, SAMPLE, deep_network, experiment, flow, run_deep, without_shortcuts
from gpt.study.record import operations, record
from reference.gradcheck import numeric_gradient
from reference.optim import global_norm

T = 7


def recorded(name, dropout=False):
    config = CONFIGS[name]
    inputs, targets = (part[:2, :T] for part in batch(config))
    return record(config, parameters(config), inputs, targets, noise() if dropout else None)


def plain_pass(recording):
    chain = without_shortcuts([step.operation for step in recording.steps])
    tensors = recording.tensors
    params = {name: tensors[name] for name in recording.config.parameter_shapes()}
    return record(recording.config, params, tensors["tokens"], tensors["targets"], chain=chain)


@pytest.mark.parametrize("name", CONFIGS)
def test_shortcuts_are_left_out_and_nothing_else(name):
    config = CONFIGS[name]
    before = operations(config, (2, T), noise())
    after = without_shortcuts(before)
    gone = [operation.name for operation in before if operation.name not in {kept.name for kept in after}]
    assert gone == [f"blocks.{i}.shortcut{k}" for i in range(config.n_layers) for k in (1, 2)]
    known = {"tokens", "targets", "positions", *config.parameter_shapes()}
    for operation in after:
        assert set(operation.tensors.values()) <= known
        known.add(operation.name)
    again = without_shortcuts(after)
    assert again == after


def test_a_pass_without_shortcuts_is_pytorchs():
    """The model written out in PyTorch, where each block is branch after branch."""
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(CONFIGS["tied"], emb_dropout=0.0, shortcut_dropout=0.0, attn_dropout=0.0)
    inputs, targets = (part[:2, :T] for part in batch(config))
    params = parameters(config)
    recording = record(config, params, inputs, targets)
    plain = plain_pass(recording)
    w = {name: torch.tensor(array, requires_grad=True) for name, array in params.items()}
    F = torch.nn.functional

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], config.norm_eps)

    def attend(name, x):
        q, k, v = (
            linear(f"{name}.{part}", x).view(2, T, -1, config.head_dim).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return linear(f"{name}.out", y.transpose(1, 2).reshape(2, T, -1))

    x = w["tok_emb.weight"][torch.tensor(inputs)] + w["pos_emb.weight"][:T]
    for i in range(config.n_layers):
        x = attend(f"blocks.{i}.attn", norm(f"blocks.{i}.norm1", x))
        up = linear(f"blocks.{i}.mlp.up", norm(f"blocks.{i}.norm2", x))
        x = linear(f"blocks.{i}.mlp.down", F.gelu(up, approximate="tanh"))
    logits = F.linear(norm("final_norm", x), w["tok_emb.weight"])
    loss = F.cross_entropy(logits.reshape(-1, config.vocab_size), torch.tensor(targets).reshape(-1), ignore_index=-100)
    loss.backward()
    np.testing.assert_allclose(plain.loss, loss.item(), rtol=1e-12)
    largest = max(np.abs(plain.gradients[name]).max() for name in params)
    for name in params:
        np.testing.assert_allclose(plain.gradients[name], w[name].grad.numpy(), atol=1e-12 * largest)


@pytest.mark.parametrize("name", ["untied", "llama", "adapted"])
def test_gradients_without_shortcuts_are_central_differences(name):
    recording = recorded(name, dropout=True)
    plain, rng = plain_pass(recording), np.random.default_rng(0)
    for tensor in recording.config.parameter_shapes():
        if tensor.endswith("key.bias"):
            continue  # its true gradient is 0
        x, gradient = plain.tensors[tensor], plain.gradients[tensor]
        indices = [tuple(int(rng.integers(n)) for n in x.shape) for _ in range(2)]
        true = numeric_gradient(lambda value, tensor=tensor: plain.loss_with(tensor, value), x, indices=indices)
        for index in indices:
            assert abs(gradient[index] - true[index]) <= 1e-7 * max(1e-3, np.abs(gradient).max()), (tensor, index)


@pytest.mark.parametrize("name", ["tied", "llama"])
def test_the_sections_norms_are_those_of_both_passes(name):
    recording = recorded(name)
    data, plain = flow(recording), plain_pass(recording)
    assert data["parameters"] == list(recording.config.parameter_shapes())
    for side, one in (("with", recording), ("without", plain)):
        gradients = {name: one.gradients[name] for name in data["parameters"]}
        np.testing.assert_allclose(data[side]["norms"], [np.linalg.norm(g) for g in gradients.values()], rtol=1e-12)
        np.testing.assert_allclose(data[side]["mean_sizes"], [np.abs(g).mean() for g in gradients.values()])
        np.testing.assert_allclose(data[side]["global_norm"], global_norm(gradients), rtol=1e-12)
        np.testing.assert_allclose(data[side]["global_norm"] ** 2, np.sum(np.square(data[side]["norms"])))
        assert data[side]["loss"] == one.loss
    ends = [recording.gradients[f"blocks.{i}.shortcut2"] for i in range(2)]
    np.testing.assert_allclose(data["with"]["arriving"], [np.linalg.norm(end) for end in ends])
    ends = [plain.gradients[f"blocks.{i}.mlp.down"] for i in range(2)]
    np.testing.assert_allclose(data["without"]["arriving"], [np.linalg.norm(end) for end in ends])
    assert recording.loss != plain.loss
    groups = dict(zip(data["parameters"], data["groups"], strict=True))
    assert groups["tok_emb.weight"] == "before"
    assert groups["final_norm.weight"] == "after"
    assert groups["blocks.1.mlp.down.weight"] == "1"
    assert data["sizes"] == [int(np.prod(shape)) for shape in recording.config.parameter_shapes().values()]


def test_the_books_numbers_come_out():
    """The mean absolute gradients that it prints, which were computed in float32."""
    plain, short = (experiment(shortcuts) for shortcuts in (False, True))
    printed = [0.00020173587836, 0.00012011161016, 0.00071520416532, 0.00139887386467, 0.00504964636639]
    np.testing.assert_allclose(plain["means"], printed, rtol=1e-5)
    printed = [0.22169792652130, 0.20694105327129, 0.32896995544434, 0.26657325029373, 1.32585418224335]
    np.testing.assert_allclose(short["means"], printed, rtol=1e-5)
    assert [len(one["means"]) for one in (plain, short)] == [5, 5]
    assert max(plain["means"][:3]) < 1e-3
    assert min(short["means"]) > 0.2
    assert plain["passed"]
    assert short["passed"]
    assert max(plain["errors"] + short["errors"]) <= BOUND


@pytest.mark.parametrize("shortcuts", [False, True])
def test_the_small_networks_gradients_are_autograds(shortcuts):
    torch = pytest.importorskip("torch")
    torch.manual_seed(123)
    modules = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(DEPTH)]
    layers = deep_network()
    for module, (weight, bias) in zip(modules, layers, strict=True):
        np.testing.assert_array_equal(module.weight.detach().double().numpy(), weight)
        np.testing.assert_array_equal(module.bias.detach().double().numpy(), bias)
        module.double()
    x = torch.tensor(SAMPLE)
    for module in modules:
        y = torch.nn.functional.gelu(module(x), approximate="tanh")
        x = x + y if shortcuts and x.shape == y.shape else y
    loss = torch.nn.functional.mse_loss(x, torch.zeros(1, 1, dtype=torch.float64))
    loss.backward()
    ours, gradients = run_deep(layers, shortcuts)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-12)
    for module, (dweight, dbias) in zip(modules, gradients, strict=True):
        np.testing.assert_allclose(dweight, module.weight.grad.numpy(), rtol=1e-11)
        np.testing.assert_allclose(dbias, module.bias.grad.numpy(), rtol=1e-11)


def test_an_experiment_with_a_wrong_gradient_does_not_pass(monkeypatch):
    from reference import gelu

    true = gelu.backward
    monkeypatch.setattr(gelu, "backward", lambda dy, saved: true(dy, saved) * (1 + 1e-6))
    assert not experiment(True)["passed"]

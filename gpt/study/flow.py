"""What the page shows of how gradients reach the first layers: through shortcuts, past clipping.

With a shortcut a block's output is x + branch(x), so that of the gradient dy that arrives, dy itself goes on to the
block below, beside what the branch passes on. Without it the branch alone is left, y = branch(x), and every block
multiplies once more by the derivatives of its layers.

Here the recorded model is run both ways with the same parameters, and so is a network small enough to be followed by
eye: five linear layers, each followed by GELU, in which a shortcut leads past each layer that keeps the width. There
every gradient is held against central differences.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from gpt.study.record import Operation, Recording, record
from reference import gelu, linear
from reference.gradcheck import numeric_gradient
from reference.optim import global_norm
from reference.torch_rng import Generator

__all__ = ["DEPTH", "Layers", "deep_network", "experiment", "flow", "run_deep", "without_shortcuts"]

Layers = list[tuple[np.ndarray, np.ndarray]]  # weight and bias

DEPTH = (3, 3, 3, 3, 3, 1)  # widths of the small network
SAMPLE = np.array([[1.0, 0.0, -1.0]])
BOUND = 1e-7  # of a gradient against central differences, relative to the tensor's largest entry


def flow(recording: Recording) -> dict[str, Any]:
    """The section's data: gradient norms of the recorded model with shortcuts and without, and the experiment."""
    config, tensors = recording.config, recording.tensors
    chain = without_shortcuts([step.operation for step in recording.steps])
    params = {name: tensors[name] for name in config.parameter_shapes()}
    plain = record(config, params, tensors["tokens"], tensors["targets"], chain=chain)
    names = list(params)
    return {
        "parameters": names,
        "groups": [_group(name) for name in names],
        "sizes": [params[name].size for name in names],
        "blocks": config.n_layers,
        "with": _measured(recording, names),
        "without": _measured(plain, names),
        "experiment": [experiment(shortcuts) for shortcuts in (False, True)],
        "widths": list(DEPTH),
    }


def _measured(recording: Recording, names: Sequence[str]) -> dict[str, Any]:
    """Norms of the gradients of parameters, and of what arrives at the end of each block."""
    gradients = {name: recording.gradients[name] for name in names}
    ends = [_end(recording, block) for block in range(recording.config.n_layers)]
    return {
        "loss": recording.loss,
        "norms": [global_norm({name: gradient}) for name, gradient in gradients.items()],
        "mean_sizes": [float(np.abs(gradient).mean()) for gradient in gradients.values()],
        "global_norm": global_norm(gradients),
        "arriving": [float(np.linalg.norm(recording.gradients[end])) for end in ends],
    }


def _end(recording: Recording, block: int) -> str:
    """The last operation of a block: the end of its second shortcut, or, without, of its branch."""
    return [step.name for step in recording.steps if step.name.startswith(f"blocks.{block}.")][-1]


def _group(name: str) -> str:
    """Which part of the model a parameter is in: the number of its block, or before, or after."""
    first, second = name.split(".")[:2]
    return second if first == "blocks" else "before" if first.endswith("emb") else "after"


def without_shortcuts(operations: Sequence[Operation]) -> list[Operation]:
    """The same operations but for the ends of the blocks' shortcuts: what read x + branch reads the branch."""
    branch_of: dict[str, str] = {}
    kept = []
    for operation in operations:
        tensors = {argument: branch_of.get(of, of) for argument, of in operation.tensors.items()}
        if operation.name.rpartition(".")[2] in ("shortcut1", "shortcut2"):
            branch_of[operation.name] = tensors["branch"]
        else:
            kept.append(dataclasses.replace(operation, tensors=tensors))
    return kept


def deep_network(seed: int = 123, widths: Sequence[int] = DEPTH) -> Layers:
    """Weight (O, I) and bias (O,) of each layer as PyTorch's linear layers begin from this seed, in float64."""
    generator, layers = Generator(seed), []
    for d_in, d_out in itertools.pairwise(widths):
        bound = d_in**-0.5
        weight, bias = (generator.uniform(shape, -bound, bound) for shape in ((d_out, d_in), (d_out,)))
        layers.append((weight.astype(np.float64), bias.astype(np.float64)))
    return layers


def run_deep(layers: Layers, shortcuts: bool, x: np.ndarray = SAMPLE) -> tuple[float, Layers]:
    """The mean squared output of the network, and its gradient by weight and bias, in order."""
    saved = []
    for weight, bias in layers:
        z, of_linear = linear.forward(x, weight, bias)
        y, of_gelu = gelu.forward(z, "tanh")
        skipped = shortcuts and x.shape == y.shape
        saved.append((of_linear, of_gelu, skipped))
        x = x + y if skipped else y
    loss, dx = float(np.mean(x**2)), 2 * x / x.size
    gradients: Layers = []
    for of_linear, of_gelu, skipped in reversed(saved):
        through, dweight, dbias = linear.backward(gelu.backward(dx, of_gelu), of_linear)
        assert dweight is not None  # no layer is frozen,
        assert dbias is not None  # nor without a bias
        gradients.append((dweight, dbias))
        dx = dx + through if skipped else through
    return loss, gradients[::-1]


def experiment(shortcuts: bool, layers: Layers | None = None) -> dict[str, Any]:
    """Loss, the mean size of each weight's gradient, and how far it is from central differences, layer by layer."""
    layers = layers or deep_network()
    loss, gradients = run_deep(layers, shortcuts)
    means, norms, errors = [], [], []
    for number, (weight, bias) in enumerate(layers):
        dweight, _ = gradients[number]

        def loss_with(value: np.ndarray, number: int, bias: np.ndarray) -> float:
            return run_deep([*layers[:number], (value, bias), *layers[number + 1 :]], shortcuts)[0]

        true = numeric_gradient(partial(loss_with, number=number, bias=bias), weight)
        means.append(float(np.abs(dweight).mean()))
        norms.append(float(np.linalg.norm(dweight)))
        errors.append(float(np.abs(dweight - true).max() / np.abs(true).max()))
    return {
        "shortcuts": shortcuts,
        "loss": loss,
        "means": means,
        "norms": norms,
        "errors": errors,
        "bound": BOUND,
        "passed": max(errors) <= BOUND,
    }

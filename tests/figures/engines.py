"""Each engine's own layers under one face, NumPy arrays in and out, and the book's seeded models on either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from gpt.engine import Engine, OptimizerConfig, create_engine
from gpt.errors import require
from reference import GPT, PRESETS, attention, cross_entropy, dropout, embedding, gelu, layer_norm, linear, optim
from reference.config import GPTConfig
from reference.init import initialize
from reference.torch_rng import Generator

BOOK = PRESETS["book-124m"]  # chapter 4
BOOK_256 = BOOK.replace(context_length=256)  # chapter 5, and appendix D


class NumpyLayers:
    """The layers of `reference`."""

    name = "numpy"

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        return linear.forward(x, weight, bias)[0]

    def embedding(self, ids: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return embedding.forward(ids, weight)[0]

    def layer_norm(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> np.ndarray:
        return layer_norm.forward(x, weight, bias, eps)[0]

    def gelu(self, x: np.ndarray) -> np.ndarray:
        return gelu.forward(x, "tanh")[0]

    def dropout(self, x: np.ndarray, rate: float, keep: np.ndarray) -> np.ndarray:
        return dropout.forward(x, rate, keep)[0]

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, **settings: Any) -> np.ndarray:
        return attention.forward(q, k, v, **settings)[0]

    def cross_entropy(self, logits: np.ndarray, targets: np.ndarray) -> float:
        return float(cross_entropy.forward(logits, targets)[0])

    def clip(self, gradient: np.ndarray, max_norm: float) -> tuple[float, np.ndarray]:
        norm = optim.global_norm({"g": gradient})
        return norm, gradient * optim.clip_scale(norm, max_norm)

    def perceptron(self, params: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return _perceptron(params, x)[0]

    def perceptron_gradients(
        self, params: Mapping[str, np.ndarray], x: np.ndarray, targets: np.ndarray
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Mean cross entropy of appendix A's perceptron and its gradient by parameter name, by hand."""
        logits, saved = _perceptron(params, x)
        loss, saved_loss = cross_entropy.forward(logits, targets)
        dx = cross_entropy.backward(1.0, saved_loss)
        gradients = {}
        for i in reversed(range(len(saved))):
            of_layer, positive = saved[i]
            dx, gradients[f"{i}.weight"], gradients[f"{i}.bias"] = linear.backward(dx * positive, of_layer)
        return float(loss), gradients

    def model(self, config: GPTConfig, params: Mapping[str, np.ndarray]) -> Callable[..., np.ndarray]:
        """A function of tokens (B, T) and optionally noise: logits (B, T, V)."""
        return GPT(config, dict(params))


class TorchLayers:
    """The operators that the PyTorch model runs on."""

    name = "torch"

    def __init__(self) -> None:
        self.torch = require("torch", extra="torch")
        from gpt.ops import TORCH

        self.operators = TORCH

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        return self._run(self.torch.nn.functional.linear, x, weight, bias)

    def embedding(self, ids: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return self._run(self.torch.nn.functional.embedding, ids, weight)

    def layer_norm(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> np.ndarray:
        return self._run(self.operators.layer_norm, x, weight, bias, eps=eps)

    def gelu(self, x: np.ndarray) -> np.ndarray:
        return self._run(self.operators.gelu, x, approximate="tanh")

    def dropout(self, x: np.ndarray, rate: float, keep: np.ndarray) -> np.ndarray:
        return self._run(self.operators.dropout, x, rate=rate, noise=keep)

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, **settings: Any) -> np.ndarray:
        return self._run(self.operators.attention, q, k, v, **settings)

    def cross_entropy(self, logits: np.ndarray, targets: np.ndarray) -> float:
        return float(self._run(self.operators.cross_entropy, logits, targets))

    def clip(self, gradient: np.ndarray, max_norm: float) -> tuple[float, np.ndarray]:
        parameter = self.torch.zeros(gradient.shape, requires_grad=True)
        parameter.grad = self.torch.from_numpy(gradient.copy())
        norm = self.torch.nn.utils.clip_grad_norm_(parameter, max_norm)
        return float(norm), parameter.grad.numpy()

    def perceptron(self, params: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return self._perceptron(params)(self.torch.from_numpy(x)).detach().numpy()

    def perceptron_gradients(
        self, params: Mapping[str, np.ndarray], x: np.ndarray, targets: np.ndarray
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Mean cross entropy of appendix A's perceptron and its gradient by parameter name, by autograd."""
        model = self._perceptron(params)
        loss = self.operators.cross_entropy(model(self.torch.from_numpy(x)), self.torch.from_numpy(targets))
        loss.backward()
        gradients = [p.grad.numpy() for p in model.parameters()]
        return loss.item(), dict(zip(params, gradients, strict=True))

    def model(self, config: GPTConfig, params: Mapping[str, np.ndarray]) -> Callable[..., np.ndarray]:
        """A function of tokens (B, T) and optionally noise: logits (B, T, V)."""
        from gpt.model import GPT

        with self.torch.device("meta"):
            model = GPT(config)
        model.load_state_dict({name: self.torch.from_numpy(p) for name, p in params.items()}, assign=True)
        return lambda tokens, noise=None: self._run(model, tokens, noise=noise)

    def _run(self, function: Callable[..., Any], *arrays: np.ndarray | None, **settings: Any) -> np.ndarray:
        tensors = [None if array is None else self.torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        with self.torch.no_grad():
            return function(*tensors, **settings).numpy()

    def _perceptron(self, params: Mapping[str, np.ndarray]) -> Any:
        layers: list[Any] = []
        for weight, bias in _pairs(params):
            layer = self.torch.nn.Linear(*weight.shape[::-1])
            with self.torch.no_grad():
                layer.weight[:], layer.bias[:] = map(self.torch.from_numpy, (weight, bias))
            layers += [layer, self.torch.nn.ReLU()]
        return self.torch.nn.Sequential(*layers[:-1])


Layers = NumpyLayers | TorchLayers


@lru_cache
def layers(name: str) -> Layers:
    """Of the engine "numpy" or "torch"."""
    return NumpyLayers() if name == "numpy" else TorchLayers()


def draw_linear(generator: Generator, d_in: int, d_out: int, bias: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight (d_out, d_in) and bias (d_out,) that torch.nn.Linear(d_in, d_out) draws."""
    bound = d_in**-0.5
    weight = generator.uniform((d_out, d_in), -bound, bound)
    return weight, generator.uniform(d_out, -bound, bound) if bias else None


@lru_cache(maxsize=1)  # one model of 124M parameters at a time
def seeded(config: GPTConfig) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The model's parameters after torch.manual_seed(123), and the state of the random stream after them."""
    generator = Generator(123)
    return initialize(config, generator), generator.state()


@lru_cache(maxsize=1)
def seeded_model(name: str, config: GPTConfig) -> Callable[..., np.ndarray]:
    return layers(name).model(config, seeded(config)[0])


def seeded_engine(name: str, config: GPTConfig, optimizer: OptimizerConfig | None = None) -> Engine:
    return create_engine(name, config, seeded(config)[0], optimizer)


def _pairs(params: Mapping[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(params[f"{i}.weight"], params[f"{i}.bias"]) for i in range(len(params) // 2)]


def _perceptron(params: Mapping[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, list[Any]]:
    """Linear layers with ReLU between them -> logits, and for each layer what it saved and where its output passed."""
    pairs, saved = _pairs(params), []
    for i, (weight, bias) in enumerate(pairs):
        x, of_layer = linear.forward(x, weight, bias)
        positive = x > 0 if i < len(pairs) - 1 else np.ones_like(x, bool)
        x = x * positive
        saved.append((of_layer, positive))
    return x, saved

"""The engine on `reference`: NumPy, no autograd, no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from gpt import engine as face
from gpt import memory, parts
from gpt.engine import (
    IGNORE,
    Arrays,
    Batch,
    Examples,
    Noise,
    NonFiniteError,
    OptimizerConfig,
    Preferences,
    Tensor,
    TokenLogps,
    Trace,
)
from gpt.work import spans
from reference import cross_entropy, dpo, model, optim, orpo, token_logps
from reference.cache import Cache
from reference.config import GPTConfig
from reference.philox import PhiloxNoise

LARGE = 1 << 26  # logits, 256 MiB of float32, beyond which they are made and used some at a time


class NumpyEngine:
    """See gpt.engine.Engine."""

    name = "numpy"

    def __init__(
        self,
        config: GPTConfig,
        params: Mapping[str, Tensor],
        optimizer: OptimizerConfig,
        dtype: str = "float32",
        checkpoint_activations: bool = False,
    ) -> None:
        face.check_arrays(params, config.parameter_shapes())
        self.config, self._dtype, self._recompute = config, dtype, checkpoint_activations
        self._params = {name: np.array(params[name], dtype, order="C") for name in config.parameter_shapes()}
        self.trained = face.trained_names(config, optimizer.trained)
        self._learns = None if len(self.trained) == len(self._params) else frozenset(self.trained)
        learning = {name: self._params[name] for name in self.trained}
        self._optimizer = optim.AdamW(
            learning, optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.decay
        )
        self._grads: Arrays = {}
        self._spare: Arrays = {}  # the last step's gradients: memory for the next one's

    def loss(self, batch: Examples) -> float:
        face.check_batch(batch, self.config)
        fused = self._fuses(batch)

        def loss(part: parts.Part) -> float:
            own = _share(batch, part.share)
            return self._forward(own, part, keep=False, fused=fused)[0] * own.counted / max(1, batch.counted)

        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite shows in the loss
            return sum(parts.run(loss, self._shares(batch)))

    def accumulate(self, batch: Examples, weight: float = 1.0, noise: Noise | None = None, last: bool = True) -> float:
        face.check_batch(batch, self.config)
        face.check_noise(noise, self._recompute)
        memory.keep_freed()
        fused = self._fuses(batch)

        def learn(part: parts.Part) -> float:
            own, own_noise = _share(batch, part.share), noise
            if isinstance(noise, PhiloxNoise):
                own_noise = PhiloxNoise(noise.seed, noise.step, noise.first_example + part.share.examples.start)
            fraction = own.counted / max(1, batch.counted)
            loss, backward = self._forward(own, part, own_noise, fused=fused)
            if not np.isfinite(loss):
                raise FloatingPointError(loss)
            backward(weight * fraction)
            return loss * fraction

        try:
            with np.errstate(over="ignore", invalid="ignore"):
                return sum(parts.run(learn, self._shares(batch, noise)))
        except FloatingPointError as error:
            loss = error.args[0]
            self.forget_gradients()  # to which another part may have added its own
        raise NonFiniteError(f"loss is {loss}, first in {face.first_non_finite(self, batch, noise)}")

    def threads(self, batch: Examples) -> int:
        """How many compute this batch at once, without dropout."""
        return len(self._shares(batch))

    def _shares(self, batch: Examples, noise: Noise | None = None) -> list[parts.Share]:
        """What each part has. Masks of a stream, and those of pairs, are for all examples together."""
        drops, pairs = noise is not None and self.config.drops, isinstance(batch, Preferences)
        if drops and (pairs or not isinstance(noise, PhiloxNoise)):
            return [parts.Share(slice(0, batch.examples))]
        whole = drops or pairs or self._recompute
        split = parts.whole if whole else partial(spans, self.config, batch.shape[1])
        return parts.divide(batch.examples, math.prod(batch.shape) * self.config.emb_dim, split)

    def _fuses(self, batch: Examples) -> bool:
        """Whether no logits are to be kept: where they are large, and the head's gradients of the parts are not."""
        tokens, head = math.prod(batch.shape), model.head_weight(self.config)
        large = tokens * self.config.n_outputs > LARGE and tokens > 4 * self.config.emb_dim
        learns = head in self.trained and not self.config.adapts("head")
        return large and learns and not isinstance(batch, Preferences)

    def _forward(
        self, batch: Examples, part: parts.Part, noise: Noise | None = None, keep: bool = True, fused: bool = False
    ) -> tuple[float, Callable[[float], None]]:
        """The mean loss, and what adds the gradient of so many times it to the others."""
        y, saved = model.forward(
            self._params, self.config, batch.inputs, noise, keep=keep, trained=self._learns,
            targets=batch.targets if fused else None, recompute=self._recompute, part=part,
        )  # fmt: skip
        loss, saved_loss = (y, None) if fused else _loss(y, batch)
        del y

        def gradient(weight: float) -> Any:
            """Of the logits, which are free then, or of the loss itself."""
            nonlocal saved_loss
            of_loss, saved_loss = saved_loss, None
            return weight if fused else _loss_gradient(weight, of_loss, batch)

        def backward(weight: float) -> None:
            model.backward(gradient(weight), saved, self._grads, self._spare)

        return float(loss), backward

    def token_logps(self, batch: Examples) -> TokenLogps:
        face.check_tokens(batch.inputs, self.config)
        logits, _ = model.forward(self._params, self.config, batch.inputs, keep=False)
        logps, _ = token_logps.forward(logits, batch.targets)
        chosen = np.take_along_axis(logits, np.maximum(batch.targets, 0)[..., None], axis=-1)[..., 0]
        best = (chosen >= logits.max(axis=-1)) & (batch.targets != IGNORE)
        return TokenLogps(logps.astype(np.float64), best)

    def gradients(self) -> Arrays:
        return self._grads

    def gradient_norm(self) -> float:
        return optim.global_norm(self._grads)

    def step(self, lr: float, max_norm: float | None = None) -> float:
        norm = self.gradient_norm()
        if not math.isfinite(norm):
            wrong = [name for name, gradient in self._grads.items() if not np.isfinite(gradient).all()]
            where = wrong[0] if wrong else "its sum of squares"
            raise NonFiniteError(f"the gradient's norm is {norm}, first in {where}")
        scale = 1.0 if max_norm is None else optim.clip_scale(norm, max_norm)
        self._optimizer.step(self._grads, lr, scale)
        self.forget_gradients()
        return norm

    def forget_gradients(self) -> None:
        self._spare, self._grads = self._grads, {}

    def logits(
        self, tokens: np.ndarray, cache: face.KeyValueCache | None = None, counts: np.ndarray | None = None
    ) -> np.ndarray:
        face.check_tokens(tokens, self.config, 0 if cache is None else int(cache.lengths.max()))
        assert cache is None or isinstance(cache, Cache)
        last = slice(-1, None) if counts is None else counts[:, None] - 1
        logits, _ = model.forward(self._params, self.config, tokens, positions=last, keep=False, cache=cache)
        if cache is not None:
            cache.advance(tokens.shape[1] if counts is None else counts)
        return logits[:, 0]

    def new_cache(self, rows: int, capacity: int) -> Cache:
        return Cache(self.config, rows, capacity, self._dtype)

    def parameters(self) -> Arrays:
        return self._params

    def load_parameters(self, params: Mapping[str, Tensor]) -> None:
        face.check_arrays(params, self.config.parameter_shapes())
        for name, array in self._params.items():
            array[...] = params[name]

    def optimizer_state(self) -> Arrays:
        state = self._optimizer.state()
        moments = {f"{moment}.{name}": array for moment in "mv" for name, array in state[moment].items()}
        return {"step": np.array(state["step"], np.int64)} | moments

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        face.check_arrays(state, face.optimizer_shapes(self.config, self.trained))
        self._optimizer.steps = int(np.asarray(state["step"]))
        for moment, arrays in (("m", self._optimizer.m), ("v", self._optimizer.v)):
            for name, array in arrays.items():
                array[...] = state[f"{moment}.{name}"]

    def trace(self, batch: Examples, trace: Trace, noise: Noise | None = None) -> None:
        logits, saved = model.forward(self._params, self.config, batch.inputs, noise, trace)
        loss, saved_loss = _loss(logits, batch)
        trace("loss", np.asarray(loss))
        model.backward(_loss_gradient(1.0, saved_loss, batch), saved, trace=trace)


def _share(batch: Examples, share: parts.Share) -> Examples:
    own = batch.part(share.examples)
    return Batch(own.inputs[:, share.positions], own.targets[:, share.positions]) if isinstance(own, Batch) else own


def _loss(logits: np.ndarray, batch: Examples) -> tuple[np.floating, Any]:
    """logits (B, T, V) -> the mean loss of the batch, saved."""
    if not isinstance(batch, Preferences):
        return cross_entropy.forward(logits, batch.targets)
    logps, saved_logps = token_logps.forward(logits, batch.targets)
    sums = logps.sum(axis=1, dtype=np.float64)  # few numbers, whose differences count
    if batch.objective == "dpo":
        (chosen, rejected), (chosen0, rejected0) = sums.reshape(2, -1), np.asarray(batch.reference).reshape(2, -1)
        loss, saved = dpo.forward(chosen, rejected, chosen0, rejected0, batch.beta)
    else:
        chosen, rejected = (sums / batch.lengths).reshape(2, -1)
        loss, saved = orpo.forward(chosen, rejected, batch.beta)
    return loss, (saved, saved_logps)


def _loss_gradient(weight: float, saved: Any, batch: Examples) -> np.ndarray:
    """The gradient of `weight` times the loss with respect to the logits (B, T, V)."""
    if not isinstance(batch, Preferences):
        return cross_entropy.backward(weight, saved)
    saved, saved_logps = saved
    if batch.objective == "dpo":
        dsums = np.concatenate(dpo.backward(weight, saved))
    else:
        dsums = np.concatenate(orpo.backward(weight, saved)) / batch.lengths
    dtype = saved_logps[1].dtype
    return token_logps.backward(np.repeat(dsums.astype(dtype)[:, None], batch.targets.shape[1], axis=1), saved_logps)

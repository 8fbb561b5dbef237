"""Losses and gradients of a part of a batch, or of all of it, by `reference`: forward, loss, and all the way back."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpt.engine import Arrays, Examples, Noise, OptimizerConfig, Preferences
from gpt.parts import Part, Share
from reference import cross_entropy, dpo, model, optim, orpo, token_logps
from reference.config import GPTConfig

__all__ = ["Job", "Learner", "Setup", "loss", "loss_gradient"]


class Job(NamedTuple):
    """What there is to do of a batch."""

    share: Share
    examples: Examples  # of this share
    fraction: float  # of what counts in the batch's mean loss
    fused: bool  # head and loss in one, so that there are no logits
    weight: float = 1.0  # of the gradient
    noise: Noise | None = None


class Setup(NamedTuple):
    """A model, the names of the parameters that learn, and how."""

    config: GPTConfig
    trained: tuple[str, ...]
    optimizer: OptimizerConfig
    dtype: str
    recompute: bool  # activations of a block, rather than keep them

    def new_optimizer(self, params: Arrays) -> optim.AdamW:
        """Of those that learn."""
        learning, o = {name: params[name] for name in self.trained}, self.optimizer
        return optim.AdamW(learning, o.lr, o.betas, o.eps, o.weight_decay, o.decay)


class Learner:
    """A model and its parameters."""

    def __init__(self, setup: Setup, params: Arrays) -> None:
        self.config, self.params, self._recompute = setup.config, params, setup.recompute
        self._trained = None if len(setup.trained) == len(params) else frozenset(setup.trained)

    def loss(self, part: Part, job: Job) -> float:
        """What this part adds to the batch's mean loss."""
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite shows in the loss
            return self._forward(part, job, keep=False)[0] * job.fraction

    def learn(self, part: Part, job: Job, grads: Arrays, spare: Arrays) -> float:
        """The same, and its gradient is added to `grads`; see model.backward, of `spare` too.

        FloatingPointError where the loss is not finite, before anything has been added.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            value, saved, saved_loss = self._forward(part, job)
            if not np.isfinite(value):
                raise FloatingPointError(value)
            model.backward(_beginning(job, saved_loss), saved, grads, spare)
        return value * job.fraction

    def _forward(self, part: Part, job: Job, keep: bool = True) -> tuple[float, Any, list[Any]]:
        """The mean loss of these examples, what the model saved, and in a list what the loss did."""
        y, saved = model.forward(
            self.params, self.config, job.examples.inputs, job.noise, keep=keep, trained=self._trained,
            targets=job.examples.targets if job.fused else None, recompute=self._recompute, part=part,
        )  # fmt: skip
        if job.fused:
            return float(y), saved, []
        value, saved_loss = loss(y, job.examples)
        return float(value), saved, [saved_loss]


def _beginning(job: Job, saved_loss: list[Any]) -> Any:
    """Where the backward pass begins: the gradient of the logits, which are free then, or of the loss itself."""
    weight = job.weight * job.fraction
    return weight if job.fused else loss_gradient(weight, saved_loss.pop(), job.examples)


def loss(logits: np.ndarray, batch: Examples) -> tuple[np.floating, Any]:
    """logits (B, T, V) -> the mean loss of the batch, saved."""
    if not isinstance(batch, Preferences):
        return cross_entropy.forward(logits, batch.targets)
    logps, saved_logps = token_logps.forward(logits, batch.targets)
    sums = logps.sum(axis=1, dtype=np.float64)  # few numbers, whose differences count
    if batch.objective == "dpo":
        (chosen, rejected), (chosen0, rejected0) = sums.reshape(2, -1), np.asarray(batch.reference).reshape(2, -1)
        value, saved = dpo.forward(chosen, rejected, chosen0, rejected0, batch.beta)
    else:
        chosen, rejected = (sums / batch.lengths).reshape(2, -1)
        value, saved = orpo.forward(chosen, rejected, batch.beta)
    return value, (saved, saved_logps)


def loss_gradient(weight: float, saved: Any, batch: Examples) -> np.ndarray:
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

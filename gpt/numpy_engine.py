"""The engine on `reference`: NumPy, no autograd, no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from gpt import engine as face
from gpt import learner, memory, parts
from gpt.crew import Crew
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
from gpt.learner import Job, Learner, Setup
from gpt.work import spans
from reference import model, optim, token_logps
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
        self.trained = face.trained_names(config, optimizer.trained)
        setup = Setup(config, self.trained, optimizer, dtype, checkpoint_activations)
        shapes = config.parameter_shapes()
        gradients = sum(math.prod(shapes[name]) for name in self.trained) * np.dtype(dtype).itemsize
        self._apart = parts.are_apart(gradients, parts.threads())
        self._team: Threads | Crew = Crew(setup) if self._apart else Threads(setup)
        self._params, self._optimizer = self._team.params, self._team.optimizer
        for name, array in self._params.items():
            array[...] = params[name]

    def loss(self, batch: Examples) -> float:
        face.check_batch(batch, self.config)
        return self._team.loss(self._jobs(batch))

    def accumulate(self, batch: Examples, weight: float = 1.0, noise: Noise | None = None, last: bool = True) -> float:
        face.check_batch(batch, self.config)
        face.check_noise(noise, self._recompute)
        memory.keep_freed()
        try:
            return self._team.learn(self._jobs(batch, weight, noise))
        except FloatingPointError as error:
            loss = error.args[0]
            self.forget_gradients()  # to which another part may have added its own
        except BaseException:
            self.forget_gradients()
            raise
        raise NonFiniteError(f"loss is {loss}, first in {face.first_non_finite(self, batch, noise)}")

    def _jobs(self, batch: Examples, weight: float = 1.0, noise: Noise | None = None) -> list[Job]:
        """One for each part."""
        fused, jobs = self._fuses(batch), []
        for share in self._shares(batch, noise):
            own = _share(batch, share)
            fraction = own.counted / max(1, batch.counted)
            jobs.append(Job(share, own, fraction, fused, weight, self._own_noise(noise, share)))
        return jobs

    def _own_noise(self, noise: Noise | None, share: parts.Share) -> Noise | None:
        if not self.config.drops:
            return None
        if isinstance(noise, PhiloxNoise):
            return PhiloxNoise(noise.seed, noise.step, noise.first_example + share.examples.start)
        return noise

    def _shares(self, batch: Examples, noise: Noise | None = None) -> list[parts.Share]:
        """What each part has. Masks of a stream, and those of pairs, are for all examples together."""
        drops, pairs = noise is not None and self.config.drops, isinstance(batch, Preferences)
        if drops and (pairs or not isinstance(noise, PhiloxNoise)):
            return [parts.Share(slice(0, batch.examples))]
        whole = drops or pairs or self._recompute
        split = parts.whole if whole else partial(spans, self.config, batch.shape[1])
        return parts.divide(batch.examples, math.prod(batch.shape) * self.config.emb_dim, split, self._apart)

    def _fuses(self, batch: Examples) -> bool:
        """Whether no logits are to be kept: where they are large, and the head's gradients of the parts are not."""
        tokens, head = math.prod(batch.shape), model.head_weight(self.config)
        large = tokens * self.config.n_outputs > LARGE and tokens > 4 * self.config.emb_dim
        learns = head in self.trained and not self.config.adapts("head")
        return large and learns and not isinstance(batch, Preferences)

    def token_logps(self, batch: Examples) -> TokenLogps:
        face.check_tokens(batch.inputs, self.config)
        logits, _ = model.forward(self._params, self.config, batch.inputs, keep=False)
        logps, _ = token_logps.forward(logits, batch.targets)
        chosen = np.take_along_axis(logits, np.maximum(batch.targets, 0)[..., None], axis=-1)[..., 0]
        best = (chosen >= logits.max(axis=-1)) & (batch.targets != IGNORE)
        return TokenLogps(logps.astype(np.float64), best)

    def gradients(self) -> Arrays:
        return self._team.gradients()

    def gradient_norm(self) -> float:
        return self._team.norm()

    def step(self, lr: float, max_norm: float | None = None) -> float:
        norm = self.gradient_norm()
        if not norm and not self.gradients():
            raise RuntimeError("step: no gradient has been accumulated")
        if not math.isfinite(norm):
            wrong = [name for name, gradient in self.gradients().items() if not np.isfinite(gradient).all()]
            where = wrong[0] if wrong else "its sum of squares"
            raise NonFiniteError(f"the gradient's norm is {norm}, first in {where}")
        self._team.step(lr, 1.0 if max_norm is None else optim.clip_scale(norm, max_norm))
        return norm

    def forget_gradients(self) -> None:
        self._team.forget()

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
        loss, saved_loss = learner.loss(logits, batch)
        trace("loss", np.asarray(loss))
        model.backward(learner.loss_gradient(1.0, saved_loss, batch), saved, trace=trace)


def _share(batch: Examples, share: parts.Share) -> Examples:
    own = batch.part(share.examples)
    return Batch(own.inputs[:, share.positions], own.targets[:, share.positions]) if isinstance(own, Batch) else own


class Threads:
    """Parts of a batch in threads of this process. A Crew (crew.py) has them in processes, and the same methods."""

    def __init__(self, setup: Setup) -> None:
        shapes = setup.config.parameter_shapes()
        self.params = {name: np.empty(shape, setup.dtype) for name, shape in shapes.items()}
        self.optimizer = setup.new_optimizer(self.params)
        self._learner = Learner(setup, self.params)
        self._grads: Arrays = {}
        self._spare: Arrays = {}  # the last step's gradients: memory for the next one's

    def loss(self, jobs: Sequence[Job]) -> float:
        """The batch's mean loss."""
        return sum(_in_threads(self._learner.loss, jobs))

    def learn(self, jobs: Sequence[Job]) -> float:
        """The same, and its gradient is added up."""
        return sum(_in_threads(partial(self._learner.learn, grads=self._grads, spare=self._spare), jobs))

    def gradients(self) -> Arrays:
        """What has been added up since the last step."""
        return self._grads

    def norm(self) -> float:
        """Of the gradients, global L2."""
        return optim.global_norm(self._grads)

    def step(self, lr: float, scale: float) -> None:
        """AdamW's, along the gradients times `scale`, which are forgotten."""
        self.optimizer.step(self._grads, lr, scale)
        self.forget()

    def forget(self) -> None:
        """The gradients."""
        self._spare, self._grads = self._grads, {}


def _in_threads(method: Callable[[parts.Part, Job], float], jobs: Sequence[Job]) -> list[float]:
    return parts.run(lambda part: method(part, jobs[part.number]), [job.share for job in jobs])

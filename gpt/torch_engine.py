"""The engine on PyTorch: autograd, the operators of gpt/ops.py, PyTorch's AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch

from gpt import engine as face
from gpt.cache import Cache
from gpt.devices import available_devices
from gpt.engine import (
    IGNORE,
    Arrays,
    Examples,
    Noise,
    NonFiniteError,
    OptimizerConfig,
    Preferences,
    Tensor,
    TokenLogps,
    Trace,
)
from gpt.errors import UserError
from gpt.model import GPT
from gpt.ops import CompiledNoise, Operators, choose, dpo, orpo, separate, token_logps
from reference.config import GPTConfig

SCALE, GROWTH = f"{face.OWN}gradient_scale", f"{face.OWN}steps_of_this_scale"  # float16's, beside the optimizer's state


class TorchEngine:
    """See gpt.engine.Engine."""

    _without_gradient: type[torch.inference_mode] | type[torch.no_grad] = torch.inference_mode
    _compiles_step = True  # the optimizer's, where anything is compiled

    def __init__(
        self,
        config: GPTConfig,
        params: Mapping[str, Tensor],
        optimizer: OptimizerConfig,
        dtype: str = "float32",
        device: str = "auto",
        operators: str | Operators = "auto",
        precision: str = "full",
        compile: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        self.config = config
        self.device = _device(device)
        chosen = choose(operators, self.device)
        self.name = chosen.name
        with torch.device("meta"):
            model = GPT(config, chosen, checkpoint_activations).to(getattr(torch, dtype))
        self.model = self._place(model)
        self._params = dict(self.model.named_parameters())
        self.load_parameters(params)
        self.trained = face.trained_names(config, optimizer.trained)
        for name, p in self._params.items():
            p.requires_grad_(name in self.trained)
        self._trained = {name: self._params[name] for name in self.trained}
        matrices = [p for p in self._trained.values() if p.ndim >= 2 or optimizer.decay == "all"]
        others = [p for p in self._trained.values() if p.ndim < 2 and optimizer.decay != "all"]
        decays = (matrices, optimizer.weight_decay), (others, 0.0)
        groups = [{"params": group, "weight_decay": decay} for group, decay in decays if group]
        self._lower = getattr(torch, precision) if precision in ("bfloat16", "float16") else None
        if precision == "tf32":  # says nothing to a CPU
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        self._loss, self._logps = self.model.loss, self.model.token_logps
        self._logits: Callable[..., torch.Tensor] = self.model
        self._compiled, self._step_compiled = compile, compile and self._compiles_step
        if compile:
            self._compile()
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=self._number(optimizer.lr) if self._step_compiled else optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            capturable=self._step_compiled and self.device.type == "cuda",
        )
        if self._step_compiled:  # what changes from step to step is in tensors, and nothing is compiled again
            for p in self._trained.values():
                self._remember(p, 0, torch.zeros_like(p), torch.zeros_like(p))
            step = torch.optim.AdamW.step  # within, what only labels it for a profiler
            step = torch.compile(getattr(step, "__wrapped__", step))
            self._optimizer.step = partial(step, self._optimizer)  # type: ignore[method-assign]

    def loss(self, batch: Examples) -> float:
        face.check_batch(batch, self.config)
        with torch.no_grad(), self._autocast():
            return float(self._mean_loss(batch))

    def accumulate(self, batch: Examples, weight: float = 1.0, noise: Noise | None = None, last: bool = True) -> float:
        face.check_batch(batch, self.config)
        face.check_noise(noise, self.model.checkpoint_activations)
        with self._autocast():
            loss = self._mean_loss(batch, noise)
        if not torch.isfinite(loss):
            self.forget_gradients()
            raise NonFiniteError(f"loss is {loss.item()}, first in {face.first_non_finite(self, batch, noise)}")
        self._scaler.scale(loss * weight).backward()
        return loss.item()

    def _mean_loss(self, batch: Examples, noise: Noise | None = None) -> torch.Tensor:
        if self._compiled and noise is not None:
            noise = CompiledNoise(noise, self.config)
        if isinstance(batch, Preferences):
            return self._preference_loss(batch, self._logps(*self._to_device(batch), noise))
        return self._loss(*self._to_device(batch), noise)

    def _preference_loss(self, batch: Preferences, logps: torch.Tensor) -> torch.Tensor:
        """logps (2 P, T) -> the loss, in float64: few numbers, whose differences count."""
        sums = logps.sum(dim=1, dtype=torch.float64)
        if batch.objective == "dpo":
            chosen0, rejected0 = torch.from_numpy(np.asarray(batch.reference, np.float64)).to(self.device).chunk(2)
            chosen, rejected = sums.chunk(2)
            return dpo(chosen, rejected, chosen0, rejected0, batch.beta)
        chosen, rejected = (sums / torch.from_numpy(batch.lengths).to(self.device)).chunk(2)
        return orpo(chosen, rejected, batch.beta)

    def token_logps(self, batch: Examples) -> TokenLogps:
        face.check_tokens(batch.inputs, self.config)
        inputs, targets = self._to_device(batch)
        with self._without_gradient(), self._autocast():
            logits = self._logits(inputs)
            logps = token_logps(logits, targets)
            chosen = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            best = (chosen >= logits.amax(dim=-1)) & (targets != IGNORE)
        return TokenLogps(logps.double().cpu().numpy(), best.cpu().numpy())

    def gradients(self) -> Arrays:
        scale = self._scaler.get_scale()
        grads = {name: p.grad for name, p in self._trained.items() if p.grad is not None}
        return {name: self._whole(grad / scale if scale != 1 else grad).cpu().numpy() for name, grad in grads.items()}

    def gradient_norm(self) -> float:
        grads = [p.grad for p in self._trained.values() if p.grad is not None]
        return self._whole(torch.nn.utils.get_total_norm(grads)).item() / self._scaler.get_scale()

    def step(self, lr: float, max_norm: float | None = None) -> float:
        grads = {name: p.grad for name, p in self._trained.items() if p.grad is not None}
        if not grads:
            raise RuntimeError("step: no gradient has been accumulated")
        self._scaler.unscale_(self._optimizer)
        total = self._whole(torch.nn.utils.get_total_norm(grads.values()))
        norm = total.item()
        # Of float16 the scale may have been too large: no step, and less. Below 1 it is not to blame.
        if not np.isfinite(norm) and self._scaler.get_scale() <= 1:
            wrong = [name for name, gradient in grads.items() if not torch.isfinite(self._whole(gradient)).all()]
            where = wrong[0] if wrong else "its sum of squares"
            raise NonFiniteError(f"the gradient's norm is {norm}, first in {where}")
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._trained.values(), max_norm, total)
        for group in self._optimizer.param_groups:
            group["lr"] = group["lr"].fill_(lr) if self._step_compiled else lr
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.forget_gradients()
        return norm

    def forget_gradients(self) -> None:
        self._optimizer.zero_grad()

    def logits(
        self, tokens: np.ndarray, cache: face.KeyValueCache | None = None, counts: np.ndarray | None = None
    ) -> np.ndarray:
        face.check_tokens(tokens, self.config, 0 if cache is None else int(cache.lengths.max()))
        assert cache is None or isinstance(cache, Cache)
        last: slice | torch.Tensor = slice(-1, None)
        if counts is not None:
            last = torch.from_numpy(counts[:, None] - 1).to(self.device)
        with self._without_gradient(), self._autocast():
            inputs = torch.from_numpy(tokens.astype(np.int64)).to(self.device)
            logits = self._logits(inputs, positions=last, cache=cache)
        if cache is not None:
            cache.advance(tokens.shape[1] if counts is None else counts)
        return logits[:, 0].float().cpu().numpy() if self._lower else logits[:, 0].cpu().numpy()

    def new_cache(self, rows: int, capacity: int) -> Cache:
        return Cache(self.config, rows, capacity, self._lower or self.model.tok_emb.weight.dtype, self.device)

    def parameters(self) -> Arrays:
        return {name: p.detach().cpu().numpy() for name, p in self._params.items()}

    def load_parameters(self, params: Mapping[str, Tensor]) -> None:
        face.check_arrays(params, self.config.parameter_shapes())
        with torch.no_grad():
            for name, p in self._params.items():
                self._fill(p, params[name])

    def optimizer_state(self) -> Arrays:
        state: Arrays = {"step": np.array(0, np.int64)}
        for name, p in self._trained.items():
            of_parameter = self._optimizer.state.get(p, {})
            for moment, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                state[f"{moment}.{name}"] = of_parameter.get(key, torch.zeros_like(p)).detach().cpu().numpy()
            if of_parameter:
                state["step"] = np.array(int(of_parameter["step"]), np.int64)
        if self._scaler.is_enabled():
            scaler = self._scaler.state_dict()
            state[SCALE], state[GROWTH] = np.array(scaler["scale"]), np.array(scaler["_growth_tracker"], np.int64)
        return state

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        face.check_arrays(state, face.optimizer_shapes(self.config, self.trained))
        for name, p in self._trained.items():
            m, v = torch.empty_like(p), torch.empty_like(p)
            with torch.no_grad():
                self._fill(m, state[f"m.{name}"])
                self._fill(v, state[f"v.{name}"])
            self._remember(p, int(np.asarray(state["step"])), m, v)
        if self._scaler.is_enabled() and SCALE in state:
            face.check_arrays({name: state[name] for name in (SCALE, GROWTH) if name in state}, {SCALE: (), GROWTH: ()})
            known = {"scale": float(np.asarray(state[SCALE])), "_growth_tracker": int(np.asarray(state[GROWTH]))}
            self._scaler.load_state_dict(self._scaler.state_dict() | known)

    def _remember(self, p: torch.Tensor, step: int, m: torch.Tensor, v: torch.Tensor) -> None:
        """Give the optimizer its memory of a parameter."""
        count = self._number(step) if self._step_compiled else torch.tensor(float(step))
        self._optimizer.state[p] = {"step": count, "exp_avg": m, "exp_avg_sq": v}

    def _number(self, value: float) -> torch.Tensor:
        """A number as a tensor, with all its digits."""
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def trace(self, batch: Examples, trace: Trace, noise: Noise | None = None) -> None:
        def note(name: str, tensor: torch.Tensor) -> None:
            trace(name, tensor.detach().cpu().numpy())

            def note_gradient(gradient: torch.Tensor) -> None:  # what a hook returns would replace the gradient
                trace(f"d.{name}", gradient.cpu().numpy())

            tensor.register_hook(note_gradient)

        inputs, targets = self._to_device(batch)
        params = {
            name: self._whole(p.detach()).requires_grad_() for name, p in self._params.items()
        }  # the frozen ones too
        with torch.device("meta"):
            model = GPT(self.config, separate(self.model.operators))
        logits = torch.func.functional_call(model, dict[str, torch.Tensor](params), (inputs, noise, note))
        if isinstance(batch, Preferences):
            loss = self._preference_loss(batch, token_logps(logits, targets))
        else:
            loss = self.model.operators.cross_entropy(logits, targets)
        trace("loss", loss.detach().cpu().numpy())
        torch.autograd.grad(loss, list(params.values()))

    def _compile(self) -> None:
        """What gives losses, as a whole."""
        self._loss, self._logps = torch.compile(self.model.loss), torch.compile(self.model.token_logps)

    def _place(self, model: GPT) -> GPT:
        """A model without data as one with memory for it."""
        return model.to_empty(device=self.device)

    def _fill(self, tensor: torch.Tensor, values: Tensor) -> None:
        """Copy an array into a parameter, or into what is kept of it."""
        on_host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
        np.copyto(on_host.detach().numpy(), values)  # converts and transposes, without another copy
        if on_host is not tensor:
            tensor.copy_(on_host)

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of which this process may hold a part only."""
        return tensor

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self._lower, enabled=self._lower is not None)

    def _to_device(self, batch: Examples) -> tuple[torch.Tensor, torch.Tensor]:
        both = batch.inputs, batch.targets
        inputs, targets = (torch.from_numpy(np.asarray(array, np.int64)).to(self.device) for array in both)
        return inputs, targets


def _device(name: str) -> torch.device:
    available = available_devices(torch)
    if name == "auto":
        return torch.device(available[0])
    if name.split(":")[0] not in available:
        raise UserError(f"device: {name!r} is not available here, choose from {', '.join(available)}")
    return torch.device(name)

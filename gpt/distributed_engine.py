"""The PyTorch engine shared by processes: each computes its rows of every batch, and the step is that of one process.

    loss of a batch    sum_r  (n_r / n) loss_r          n_r: what counts in the mean in the rows of process r, n: in all
    its gradient       sum_r  (n_r / n) dloss_r         the same step, however the rows fall

Process r of R has rows B r / R to B (r + 1) / R, so that shares differ by one row at most; one without a row computes
the first with weight 0, since all must take part in adding up. What decides dropout is the number of an example in its
step (reference/philox.py), so the masks are those of one process as well.

"ddp" keeps the whole model in each process (DistributedDataParallel) and adds gradients up while the backward pass goes
on; "fsdp" keeps a part of each parameter, gradient and moment (FSDP2, `fully_shard`), gathers a block when it is its
turn, and forgets it again. Both average where a sum is wanted, hence the factor R before their backward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gpt import engine as face
from gpt import world
from gpt.engine import Arrays, Examples, Noise, NonFiniteError, OptimizerConfig, Preferences, Tensor, TokenLogps
from gpt.errors import UserError
from gpt.model import GPT
from gpt.torch_engine import TorchEngine
from reference.config import GPTConfig
from reference.philox import PhiloxNoise, keep_mask

__all__ = ["ENGINES", "ReplicatedEngine", "ShardedEngine"]


class SharedEngine(TorchEngine, ABC):
    """What both ways of sharing have in common; see gpt.engine.Engine. All processes make every call, in one order."""

    def __init__(
        self,
        config: GPTConfig,
        params: Mapping[str, Tensor],
        optimizer: OptimizerConfig,
        dtype: str = "float32",
        device: str = "auto",
        operators: str = "auto",
        precision: str = "full",
        compile: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        world.start()
        device = str(world.device()) if device == "auto" else device
        super().__init__(
            config, params, optimizer, dtype, device, operators, precision, compile, checkpoint_activations
        )
        if compile and checkpoint_activations:  # what is compiled cannot be cut at DDP's buckets where blocks run twice
            torch._dynamo.config.optimize_ddp = False
        self.root = self._wrap(_Entry(self.model, self._loss, self._logps))
        self._loss, self._logps = partial(self.root, "loss"), partial(self.root, "token_logps")
        self._logits = partial(self.root, "logits")

    def loss(self, batch: Examples) -> float:
        own, part = self._own(batch)
        return world.sum_of(part * super().loss(own) if part else 0.0 * super().loss(own))

    def accumulate(self, batch: Examples, weight: float = 1.0, noise: Noise | None = None, last: bool = True) -> float:
        own, part = self._own(batch)
        face.check_batch(own, self.config)
        noise = self._own_noise(batch, noise)
        with self._adding_up(last):
            with self._autocast():
                loss = self._mean_loss(own, noise)
            total = world.sum_of(part * loss.item())
            if not np.isfinite(total):
                raise NonFiniteError(f"loss is {total}, first in {self._first_non_finite(own, noise)}")
            self._scaler.scale(loss * (weight * part * world.size())).backward()
        return total

    def token_logps(self, batch: Examples) -> TokenLogps:
        rows = self._rows(batch)
        found = super().token_logps(self._own(batch)[0])
        both = torch.zeros(2, *batch.shape, dtype=torch.float64)
        if len(rows):
            both[0, rows], both[1, rows] = torch.from_numpy(found.logps), torch.from_numpy(found.best).double()
        both = both.to(self.device)
        dist.all_reduce(both)  # of numbers that all others have as 0
        logps, best = both.cpu().numpy()
        return TokenLogps(logps, best > 0)

    def trace(self, batch: Examples, trace: face.Trace, noise: Noise | None = None) -> None:
        with torch.enable_grad():
            super().trace(batch, trace, noise)

    def _own(self, batch: Examples) -> tuple[Examples, float]:
        """This process's part of a batch, and how much of the batch's mean it is; without a part, another's, and 0."""
        share = world.share(batch.examples)
        if share.start == share.stop:
            return batch.part(slice(0, 1)), 0.0
        own = batch.part(share)
        return own, own.counted / max(1, batch.counted)

    def _rows(self, batch: Examples) -> np.ndarray:
        """The rows of `batch.inputs` that are this process's."""
        share = world.share(batch.examples)
        rows = np.arange(share.start, share.stop)
        return np.concatenate([rows, batch.examples + rows]) if isinstance(batch, Preferences) else rows

    def _own_noise(self, batch: Examples, noise: Noise | None) -> Noise | None:
        """The noise of this process's rows."""
        if noise is None:
            return None
        if not isinstance(noise, PhiloxNoise):
            raise UserError("dropout_source: torch is one stream for one process; choose philox")
        first = noise.first_example + world.share(batch.examples).start
        chosen = PhiloxNoise(noise.seed, noise.step, first)
        if not isinstance(batch, Preferences):
            return chosen
        if self.name == "triton":
            raise UserError(
                "dropout: the kernels' masks are of rows in a row, and pairs have two; choose --engine torch"
            )
        return _pairs_noise(chosen, PhiloxNoise(noise.seed, noise.step, first + batch.examples))

    def _first_non_finite(self, own: Examples, noise: Noise | None) -> str:
        """The first tensor, in the order of execution, that is not finite in some process."""
        names: list[str] = []
        wrong: list[int] = []

        def look(name: str, tensor: np.ndarray) -> None:
            names.append(name)
            if not wrong and not np.isfinite(tensor).all():
                wrong.append(len(names) - 1)

        for name, p in self._params.items():
            look(name, self._whole(p.detach()).cpu().numpy())
        self.trace(own, look, noise)
        everyones = [found for found in world.exchange(wrong[0] if wrong else None) if found is not None]
        return names[min(everyones)] if everyones else "loss"

    @abstractmethod
    def _wrap(self, entry: _Entry) -> nn.Module:
        """The model as it is shared."""

    @abstractmethod
    def _adding_up(self, last: bool) -> AbstractContextManager[Any]:
        """Within it, a backward pass adds gradients up over the processes, if it is the last before the step."""


class ReplicatedEngine(SharedEngine):
    """The whole model in each process, gradients added up."""

    def _wrap(self, entry: _Entry) -> nn.Module:
        # All processes have drawn or read the same parameters, which need not be sent.
        return DistributedDataParallel(entry, gradient_as_bucket_view=True, init_sync=False)

    def _adding_up(self, last: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.root, DistributedDataParallel)
        return nullcontext() if last else self.root.no_sync()


class ShardedEngine(SharedEngine):
    """A part of each parameter in each process, along its first axis; `parameters`, `optimizer_state` gather them."""

    _without_gradient = torch.no_grad  # what is gathered in inference mode, training could not gather into again
    _compiles_step = False  # of parameters in parts

    def __init__(
        self,
        config: GPTConfig,
        params: Mapping[str, Tensor],
        optimizer: OptimizerConfig,
        dtype: str = "float32",
        device: str = "auto",
        operators: str = "auto",
        precision: str = "full",
        compile: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        if precision == "float16":
            raise UserError("precision: float16 scales gradients that fsdp has in parts; choose bfloat16, or ddp")
        super().__init__(
            config, params, optimizer, dtype, device, operators, precision, compile, checkpoint_activations
        )
        if compile:
            self._logits = _eagerly(self._logits)  # texts grow, and each length would be compiled
        self._dtype = dtype
        self._waiting = False  # whether there are gradients that have not been added up

    def accumulate(self, batch: Examples, weight: float = 1.0, noise: Noise | None = None, last: bool = True) -> float:
        loss = super().accumulate(batch, weight, noise, last)
        self._waiting = not last
        return loss

    def step(self, lr: float, max_norm: float | None = None) -> float:
        self._sharded.reshard()
        return super().step(lr, max_norm)

    def forget_gradients(self) -> None:
        if self._waiting:  # FSDP keeps them where only adding up takes them from
            self.accumulate(face.Batch(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64)), 0.0)
        super().forget_gradients()

    def parameters(self) -> Arrays:
        whole = cast(dict[str, torch.Tensor], get_model_state_dict(self.model, options=_GATHERED))
        return {name: tensor.numpy() for name, tensor in whole.items()}

    def load_parameters(self, params: Mapping[str, Tensor]) -> None:
        if hasattr(self, "root"):
            self._sharded.reshard()  # a forward pass alone leaves what belongs to no block gathered, as it was
        super().load_parameters(params)

    def optimizer_state(self) -> Arrays:
        self._sharded.reshard()  # after an evaluation the model has other tensors than its optimizer
        if not self._optimizer.state:  # before the first step, where PyTorch would take one
            shapes = face.optimizer_shapes(self.config, self.trained)
            return {
                name: np.zeros(shape, np.int64 if name == "step" else self._dtype) for name, shape in shapes.items()
            }
        gathered = get_optimizer_state_dict(self.model, self._optimizer, options=_GATHERED)
        if not world.is_first():
            return {}
        of_parameter = cast(dict[str, dict[str, torch.Tensor]], gathered["state"])
        state: Arrays = {"step": np.array(int(of_parameter[self.trained[0]]["step"]), np.int64)}
        for moment, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            state |= {f"{moment}.{name}": of_parameter[name][key].numpy() for name in self.trained}
        return state

    @property
    def _sharded(self) -> FSDPModule:
        assert isinstance(self.root, FSDPModule)
        return self.root

    def _compile(self) -> None:
        """Each block alone, for between them parameters are gathered."""
        # All blocks have the same code, which is compiled for each, with gradients and without.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * self.config.n_layers)
        for block in self.model.blocks:
            block.forward = torch.compile(block.forward)

    def _place(self, model: GPT) -> GPT:
        """Each block is a unit that is gathered and forgotten, and what is outside of them another."""
        mesh = init_device_mesh(self.device.type, (world.size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        self._entry = _Entry(model)
        fully_shard(self._entry, mesh=mesh)
        return model.to_empty(device=self.device)

    def _fill(self, tensor: torch.Tensor, values: Tensor) -> None:
        assert isinstance(tensor, DTensor)
        whole = torch.from_numpy(np.array(values)).to(tensor.dtype)  # one at a time, of a mapped file
        tensor.copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None))

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _wrap(self, entry: _Entry) -> nn.Module:
        return self._entry

    def _adding_up(self, last: bool) -> AbstractContextManager[Any]:
        self._sharded.set_requires_gradient_sync(last)
        return nullcontext()


_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # in the first process; the others get nothing
ENGINES: dict[str, type[SharedEngine]] = {"ddp": ReplicatedEngine, "fsdp": ShardedEngine}


class _Entry(nn.Module):
    """One way into the model, because what wraps a module sees only calls of the module itself."""

    def __init__(
        self,
        model: GPT,
        loss: Callable[..., torch.Tensor] | None = None,
        logps: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.calls = {"loss": loss or model.loss, "token_logps": logps or model.token_logps, "logits": model.forward}

    def forward(self, call: str, *args: Any, **named: Any) -> torch.Tensor:
        return self.calls[call](*args, **named)


def _eagerly(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same without what is compiled in it."""

    def call(*args: Any, **named: Any) -> torch.Tensor:
        with torch.compiler.set_stance("force_eager"):
            return function(*args, **named)

    return call


def _pairs_noise(chosen: PhiloxNoise, rejected: PhiloxNoise) -> Noise:
    """Masks of chosen answers that begin at one example of the step and of rejected ones that begin at another."""

    def noise(layer: int, site: int, shape: tuple[int, ...], rate: float) -> np.ndarray:
        half = (shape[0] // 2, *shape[1:])
        return np.concatenate([keep_mask(of(layer, site, half, rate), half, rate) for of in (chosen, rejected)])

    return noise

"""Known mistakes, seeded one at a time: a check that does not notice them proves nothing.

A defect is data: which text of which reference module is replaced by what, and which check must then name which tensor.
Most are mistakes that public by-hand code was published with. A text that no longer occurs exactly once in its module
is an error, so that a defect cannot go stale in silence.

Beside each stands what a common loose test would have said: the same operator with inputs of 0.02 and all-ones upstream
gradients (a model with 0.02-normal weights), compared with an absolute tolerance of 1e-4.
"""

from __future__ import annotations

import importlib
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from gpt.engine import create_engine
from gpt.errors import UserError, require
from gpt.options import did_you_mean
from gpt.parity import check, model, ops, subjects
from gpt.parity.gates import Result


@dataclass(frozen=True)
class Defect:
    """`old`, which occurs once in the module's source, becomes `new`; then `check` must fail first at `tensor`."""

    name: str
    module: str  # of reference; or of kernels, "kernels.gelu"
    old: str
    new: str
    check: str  # an operator's row, that of its kernel, "triton gelu", or a model: "model tied"
    tensor: str

    @property
    def file(self) -> str:
        return self._module().__name__.replace(".", "/") + ".py"

    def source(self) -> str:
        """The module's source as it is."""
        return inspect.getsource(self._module())

    def altered_source(self) -> str:
        """The module's source with the defect. ValueError where the text is not there exactly once."""
        source = self.source()
        if source.count(self.old) != 1:
            raise ValueError(
                f"defect {self.name!r}: its text occurs {source.count(self.old)} times in {self.file}, "
                f"expected once: {self.old.strip()}"
            )
        return source.replace(self.old, self.new)

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """The module with the defect, for all who use it, until the context ends."""
        module, source = self._module(), self.altered_source()
        sound = dict(vars(module))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "altered.py")  # Triton reads a kernel's source from its file
            if "\noperator = " in source:  # which would be registered with PyTorch a second time
                source = source[: source.index("\noperator = ")]
            file.write_text(source)
            try:
                exec(compile(source, str(file), "exec"), vars(module))
                yield
            finally:
                vars(module).clear()
                vars(module).update(sound)

    def _module(self) -> ModuleType:
        return importlib.import_module(self.module if "." in self.module else f"reference.{self.module}")


DEFECTS: tuple[Defect, ...] = tuple(
    Defect(*fields)
    for fields in (
        (
            "missing transpose, hidden by a reshape", "linear",
            "np.matmul(dy_rows.T, x_rows, out=out)",
            "np.matmul(x_rows.T, dy_rows).reshape(weight.shape)",
            "linear", "dweight",
        ),
        (
            "bias gradient not summed over one axis", "linear",
            "pieces.sum_rows(dy_rows)",
            "pieces.sum_rows(dy_rows[:: dy.shape[-2]] if dy.ndim > 2 else dy_rows)",
            "linear", "dbias",
        ),
        (
            "bias left out", "linear",
            "        y += bias\n", "        y += 0 * bias\n",
            "linear", "dbias",
        ),
        (
            "rows of a repeated id not added up", "embedding",
            "one_hot @ rows[block]", "(one_hot * (one_hot.cumsum(axis=1) == 1)) @ rows[block]",
            "embedding", "dweight",
        ),
        (
            "tied head counted once", "embedding",
            "dweight[found] += one", "dweight[found] = one",
            "model tied", "tok_emb.weight",
        ),
        (
            "layer norm right only at weight 1", "layer_norm",
            "dx = dy * weight", "dx = dy.copy()",
            "layer_norm", "dx",
        ),
        (
            "layer norm without its mean term", "layer_norm",
            "    dx -= pieces.dot_rows(dy, weight) / C  # E[g]\n", "",
            "layer_norm", "dx",
        ),
        (
            "layer norm without its variance term", "layer_norm",
            "    dx -= h_part\n", "",
            "layer_norm", "dx",
        ),
        (
            "variance over C - 1", "layer_norm",
            "/ C  # (..., 1)", "/ max(1, C - 1)",
            "layer_norm", "dx",
        ),
        (
            "RMS norm right only at weight 1", "rms_norm",
            "dx = dy * weight", "dx = dy.copy()",
            "rms_norm", "dx",
        ),
        (
            "RMS norm without what it takes away along h", "rms_norm",
            "    dx -= h_part\n", "",
            "rms_norm", "dx",
        ),
        (
            "mean square over C - 1", "rms_norm",
            "/ x.shape[-1]  # (..., 1)", "/ max(1, x.shape[-1] - 1)",
            "rms_norm", "dx",
        ),
        (
            "RMS norm's eps outside the root", "rms_norm",
            "np.sqrt(mean_square + eps)", "(np.sqrt(mean_square) + eps)",
            "rms_norm", "dx",
        ),
        (
            "a gradient past the RMS norm forgotten", "add_rms_norm",
            "    dx += dtotal\n", "",
            "add_rms_norm", "dx",
        ),
        (
            "RMS norm of the branch alone", "add_rms_norm",
            "rms_norm.forward(total,", "rms_norm.forward(x,",
            "add_rms_norm", "dresidual",
        ),
        (
            "gradient turned on instead of back", "rope",
            "_rotated(dy, cos, -sin,", "_rotated(dy, cos, sin,",
            "rope", "dx",
        ),
        (
            "a reflection instead of a rotation", "rope",
            "y[second] += b * cos", "y[second] -= b * cos",
            "rope", "length of each pair",
        ),
        (
            "halves taken for interleaved pairs", "rope",
            "if interleaved else (np.s_", "if not interleaved else (np.s_",
            "rope", "length of each pair",
        ),
        (
            "all rows at the first one's positions", "rope",
            "cos[:, None], sin[:, None]", "cos[:1, None], sin[:1, None]",
            "rope-rows", "y",
        ),
        (
            "silu's slope without its 1", "swiglu",
            "        dgate += 1\n", "",
            "swiglu", "dgate",
        ),
        (
            "up forgotten in the gate's gradient", "swiglu",
            "        dgate *= up\n", "",
            "swiglu", "dgate",
        ),
        (
            "up's gradient from the gate before silu", "swiglu",
            "np.multiply(gate, s, out=dup)", "np.copyto(dup, gate)",
            "swiglu", "dgate",
        ),
        (
            "two digits of GELU's constant swapped", "gelu",
            "A = 0.044715", "A = 0.044175",
            "gelu-tanh", "y",
        ),
        (
            "inner derivative without its factor 3", "gelu",
            "dx *= 6 * A * C", "dx *= 2 * A * C",
            "gelu-tanh", "dx",
        ),
        (
            "normal density without its 2", "gelu",
            "dx *= 1 / math.sqrt(2 * math.pi)", "dx *= 1 / math.sqrt(math.pi)",
            "gelu", "dx",
        ),
        (
            "scores not scaled", "attention",
            " * q.dtype.type(scale)", "",
            "attention", "dq",
        ),
        (
            "gradient of q not scaled", "attention",
            "    dq *= scale\n", "",
            "attention", "dq",
        ),
        (
            "softmax backward without its row sum", "attention",
            '        dp -= np.einsum("bgrts,bgrts->bgrt", dp, p)[..., None]\n', "",
            "attention", "dq",
        ),
        (
            "mask hides a query's own key", "attention",
            "last.stop) > np.arange", "last.stop) >= np.arange",
            "attention", "y",
        ),
        (
            "mask shows one future key", "attention",
            "last.stop) > np.arange", "last.stop) > 1 + np.arange",
            "attention", "y of earlier queries",
        ),
        (
            "mask counts queries from the first key", "attention",
            "[:, None] + S - T\n", "[:, None]\n",
            "attention-past", "y of earlier queries",
        ),
        (
            "one head of each group counted", "attention",
            "dk.sum(axis=2)", "dk[:, :, 0]",
            "attention-grouped", "dk",
        ),
        (
            "attention dropout not in dp", "attention",
            "            dp *= kept\n", "",
            "attention-dropout", "dq",
        ),
        (
            "dv from weights before dropout", "attention",
            "np.matmul(dropped.swapaxes", "np.matmul(p.swapaxes",
            "attention-dropout", "dv",
        ),
        (
            "a cache's mask shows one future key", "cached_attention",
            "np.arange(S) > (starts", "np.arange(S) > 1 + (starts",
            "cached_attention", "y with other keys after a row's own",
        ),
        (
            "all rows of a cache as long as the longest", "cached_attention",
            "starts[:, None] + np", "starts.max() + np",
            "cached_attention", "y with other keys after a row's own",
        ),
        (
            "scores of a cache not scaled", "cached_attention",
            "    s *= 1 / math.sqrt(D) if scale is None else scale\n", "",
            "cached_attention", "y of rows alone",
        ),
        (
            "dropout not rescaled", "dropout",
            "dx *= 1 / (1 - rate)", "dx *= 1 - rate",
            "dropout", "y",
        ),
        (
            "loss's mean over all targets", "cross_entropy",
            "losses.dtype.type(max(1, len(counted)))", "losses.dtype.type(target.size)",
            "cross_entropy-ignored", "dlogits",
        ),
        (
            "gradient's mean over all targets", "cross_entropy",
            "dloss / max(1, len(counted))", "dloss / len(x)",
            "cross_entropy-ignored", "dlogits",
        ),
        (
            "target off by one", "cross_entropy",
            "dx[counted, chosen] -=", "dx[counted, chosen - 1] -=",
            "cross_entropy", "dlogits",
        ),
        (
            "largest logit not taken out", "cross_entropy",
            "m[:] = x.max(axis=-1, keepdims=True)", "m[:] = 0",
            "cross_entropy", "dlogits",
        ),
        (
            "scale missing in A's gradient", "lora",
            "da = du.T @", "da = (du / scale).T @",
            "lora", "da",
        ),
        (
            "A's gradient from inputs before dropout", "lora",
            ", (dropped, saved_dropout, u,", ", (x, saved_dropout, u,",
            "lora-dropout", "da",
        ),
        (
            "targets that do not count have a log-probability", "token_logps",
            "y = np.zeros(target.shape, x.dtype)", "y = x[:, 0].copy()",
            "token_logps", "dlogits",
        ),
        (
            "sign of a target's own gradient", "token_logps",
            "drows[np.arange(len(chosen)), chosen] +=", "drows[np.arange(len(chosen)), chosen] -=",
            "token_logps", "dlogits",
        ),
        (
            "reference model not subtracted", "dpo",
            "beta * ((chosen - chosen0) - (rejected - rejected0))", "beta * (chosen - rejected)",
            "dpo", "loss",
        ),
        (
            "beta missing in the gradient", "dpo",
            "(-beta * dloss", "(-dloss",
            "dpo", "dchosen",
        ),
        (
            "gradient without the chosen answer's cross entropy", "orpo",
            "-scale - beta * scale /", "-beta * scale /",
            "orpo", "dchosen",
        ),
        (
            "odds of the two answers swapped", "orpo",
            "r * (qb / qa)", "r * (qa / qb)",
            "orpo", "drejected",
        ),
        (
            "forgotten residual, forward", "model",
            'x + attend(i, norm(f"blocks.{i}.norm1", x))', 'attend(i, norm(f"blocks.{i}.norm1", x))',
            "model tied", "blocks.0.shortcut1",
        ),
        (
            "forgotten residual, backward", "model",
            'dx += norm(f"blocks.{i}.norm2"', 'dx = norm(f"blocks.{i}.norm2"',
            "model tied", "d.blocks.1.shortcut1",
        ),
        (
            "mask shared by two places", "model",
            'drop(f"{name}.dropout", i, philox.MLP_SHORTCUT', 'drop(f"{name}.dropout", i, philox.ATTENTION_SHORTCUT',
            "model tied", "blocks.0.mlp.dropout",
        ),
        (
            "mask shared by all layers", "model",
            "noise(i, philox.ATTENTION", "noise(0, philox.ATTENTION",
            "model tied", "blocks.1.attn.heads",
        ),
        (
            "key's share of dx forgotten", "model",
            'dx += project(f"{name}.key", dk)', 'project(f"{name}.key", dk)',
            "model tied", "d.blocks.1.norm1",
        ),
        (
            "heads not transposed back", "model",
            "part.transpose(0, 2, 1, 3).reshape(B, T, -1) for", "part.reshape(B, T, -1) for",
            "model tied", "d.blocks.1.attn.value",
        ),
        (
            "position gradient of one example only", "model",
            "dx.sum(axis=0)", "dx[0]",
            "model tied", "d.pos_emb",
        ),
        (
            "norm_eps ignored", "model",
            'params.get(f"{name}.bias"), config.norm_eps)', 'params.get(f"{name}.bias"))',
            "model untied", "blocks.0.norm1",
        ),
        (
            "gate's gradient forgotten", "model",
            'dx += project(f"{name}.gate", dgate)', 'project(f"{name}.gate", dgate)',
            "model llama", "d.blocks.1.norm2",
        ),
        (
            "keys not turned back", "model",
            'dk = rope.backward(note(f"{name}.key.rope", dk), saved.pop(f"{name}.key.rope"))',
            'note(f"{name}.key.rope", dk)',
            "model llama", "d.blocks.1.attn.key",
        ),
        (
            "tied head's adapter not added", "model",
            'y += run(f"{name}.lora", lora,', 'y += (not weight) * run(f"{name}.lora", lora,',
            "model adapted", "head",
        ),
        (
            "frozen parameters counted into the norm", "model",
            "return trained is None or name in trained", "return True",
            "model classifier", "norm",
        ),
        (
            "micro-batches not added up", "model",
            "grads[name] += gradient", "grads[name] = gradient",
            "model tied", "norm",
        ),
        (
            "no bias correction of m", "optim",
            "lr / (1 - b1**self.steps)", "lr",
            "model tied", "tok_emb.weight",
        ),
        (
            "no bias correction of v", "optim",
            "1 / math.sqrt(1 - b2**self.steps)", "1.0",
            "model tied", "tok_emb.weight",
        ),
        (
            "eps forgotten", "optim",
            "            part += eps\n", "",
            "model tied", "tok_emb.weight",
        ),
        (
            "decay not times the learning rate", "optim",
            "1 - lr * self.weight_decay", "1 - self.weight_decay",
            "model tied", "tok_emb.weight",
        ),
        (
            "decay of vectors too", "optim",
            'self.decay == "all" or w.ndim >= 2', "True",
            "model tied", "blocks.0.norm1.weight",
        ),
        (
            "norm without its square root", "optim",
            "return math.sqrt(total)", "return total",
            "model tied", "norm",
        ),
        (
            "clipped without PyTorch's 1e-6", "optim",
            "(norm + 1e-6)", "norm",
            "model tied", "tok_emb.weight",
        ),
        (
            "a causal mask without the query itself", "kernels.attention",
            "columns <= rows + (S - T)", "columns < rows + (S - T)",
            "triton attention", "y",
        ),
        (
            "keys beyond the last whole tile dropped", "kernels.attention",
            "        stop = S\n", "        stop = S // BLOCK_K * BLOCK_K\n",
            "triton attention-full", "y",
        ),
        (
            "the running sum not shrunk when the maximum grows", "kernels.attention",
            "l = l * shrink + tl.sum(p, 1)", "l = l + tl.sum(p, 1)",
            "triton attention", "y",
        ),
        (
            "values of the wrong group", "kernels.attention",
            "head(v_ptr, b, h // GROUP, v_b, v_h)\n    o = ", "head(v_ptr, b, h % (H // GROUP), v_b, v_h)\n    o = ",
            "triton attention-grouped", "y",
        ),
        (
            "dropout's mask of the next row", "kernels.attention",
            "philox.keep_mask(key, threshold, n, rows[:, None], first, BLOCK_K), p, 0.0)",
            "philox.keep_mask(key, threshold, n, rows[:, None] + 1, first, BLOCK_K), p, 0.0)",
            "triton attention-dropout", "y",
        ),
        (
            "scale missing in dq", "kernels.attention",
            "dq * SCALE, rows", "dq, rows",
            "triton attention", "dq",
        ),
        (
            "delta missing in dq", "kernels.attention",
            "ds = p * (dp - delta[:, None])", "ds = p * dp",
            "triton attention", "dq",
        ),
        (
            "strides of head and position swapped", "kernels.attention",
            "y = head(y_ptr, b, h, y_b, y_h) + offsets(rows, columns, y_t, y_d)\n    y = _load",
            "y = head(y_ptr, b, h, y_b, y_t) + offsets(rows, columns, y_h, y_d)\n    y = _load",
            "triton attention", "dq",
        ),
        (
            "keys that a later query does not see counted into dk", "kernels.attention",
            "tl.cdiv(tl.maximum(first_key + BLOCK_K - 1 - (S - T), 0), BLOCK_Q) * BLOCK_Q", "start",
            "triton attention", "dk",
        ),
        (
            "a row's own keys counted one too many", "kernels.cached_attention",
            "own = tl.minimum(start + T, S)", "own = tl.minimum(start + T + 1, S)",
            "triton cached_attention", "y",
        ),
        (
            "a split's maximum not used", "kernels.cached_attention",
            "tl.exp2(part_m - larger)", "tl.where(there, 1.0, 0.0)",
            "triton cached_attention", "y",
        ),
        (
            "the last split dropped where it is not full", "kernels.cached_attention",
            "tl.cdiv(tl.maximum(tl.minimum(start + t + 1, S), 0), split)",
            "tl.maximum(tl.minimum(start + t + 1, S), 0) // split",
            "triton cached_attention", "y",
        ),
        (
            "a group's queries taken in another order than stored", "kernels.cached_attention",
            "g * GROUP + rows // T, rows % T", "g * GROUP + rows % GROUP, rows // GROUP",
            "triton cached_attention-grouped", "y",
        ),
        (
            "mean over the block", "kernels.layer_norm",
            "mean = tl.sum(x, axis=0) / C", "mean = tl.sum(x, axis=0) / BLOCK",
            "triton layer_norm", "y",
        ),
        (
            "padding counted into the variance", "kernels.layer_norm",
            "centred = tl.where(inside, x - mean, 0)", "centred = x - mean",
            "triton layer_norm", "y",
        ),
        (
            "eps outside the root", "kernels.layer_norm",
            "tl.sqrt(tl.sum(centred * centred, axis=0) / C + EPS)",
            "(tl.sqrt(tl.sum(centred * centred, axis=0) / C) + EPS)",
            "triton layer_norm", "y",
        ),
        (
            "the mean of g forgotten", "kernels.layer_norm",
            "(g - tl.sum(g, axis=0) / C - h * g_along_h)", "(g - h * g_along_h)",
            "triton layer_norm", "dx",
        ),
        (
            "wide rows' dweight without rstd", "kernels.layer_norm",
            "dweight += dy * (x - mean) * rstd", "dweight += dy * (x - mean)",
            "triton layer_norm", "dweight",
        ),
        (
            "a gradient past the normalization forgotten", "kernels.add_layer_norm",
            "normalize_backward(dy, dtotal, *saved)", "normalize_backward(dy, None, *saved)",
            "triton add_layer_norm", "dx",
        ),
        (
            "mean square over the block", "kernels.rms_norm",
            "tl.sum(x * x, axis=0) / C", "tl.sum(x * x, axis=0) / BLOCK",
            "triton rms_norm", "y",
        ),
        (
            "what lies along h not taken away", "kernels.rms_norm",
            "(g - h * g_along_h)", "g",
            "triton rms_norm", "dx",
        ),
        (
            "wide rows' dweight from x instead of h", "kernels.rms_norm",
            "dy * x * tl.load(rstd_ptr + rows, mask=rows < N, other=0)", "dy * x",
            "triton rms_norm", "dweight",
        ),
        (
            "a gradient past the kernel's RMS norm forgotten", "kernels.add_rms_norm",
            "normalize_backward(dy, dtotal, *saved)", "normalize_backward(dy, None, *saved)",
            "triton add_rms_norm", "dx",
        ),
        (
            "the kernel's gradient turned on instead of back", "kernels.rope",
            "rotate(dy, *saved, -1)", "rotate(dy, *saved, 1)",
            "triton rope", "dx",
        ),
        (
            "pairs of a half with itself", "kernels.rope",
            "tl.load(x + tl.cast(HALF, tl.int64) * x_d,", "tl.load(x,",
            "triton rope", "y",
        ),
        (
            "angles of the first row for all", "kernels.rope",
            "b * T + t if PER_ROW else t", "t",
            "triton rope-rows", "y",
        ),
        (
            "silu's slope without its share of the gate", "kernels.swiglu",
            "(1 + (gate - silu))", "(1 - silu)",
            "triton swiglu", "dgate",
        ),
        (
            "up's gradient from the kernel's gate before silu", "kernels.swiglu",
            "dy * silu,", "dy * gate,",
            "triton swiglu", "dup",
        ),
        (
            "two digits of the kernel's constant swapped", "kernels.gelu",
            "0.044715", "0.047415",
            "triton gelu-tanh", "y",
        ),
        (
            "x forgotten beside the density", "kernels.gelu",
            "p + x * NORMAL_DENSITY_0", "p + NORMAL_DENSITY_0",
            "triton gelu", "dx",
        ),
        (
            "dbias summed from dy", "kernels.bias_gelu",
            "sums += dx", "sums += dy",
            "triton bias_gelu", "dbias",
        ),
        (
            "what is kept not scaled up", "kernels.dropout",
            "x * FACTOR", "x",
            "triton dropout", "y",
        ),
        (
            "rows counted on from one example to the next", "kernels.dropout",
            "rows % R,", "rows,",
            "triton dropout", "y",
        ),
        (
            "the sum of exponentials not shrunk", "kernels.cross_entropy",
            "z = z * tl.exp(m - larger) +", "z = z +",
            "triton cross_entropy", "loss",
        ),
        (
            "ignored targets counted", "kernels.cross_entropy",
            "(target != ignore_index).sum()", "(target == target).sum()",
            "triton cross_entropy-ignored", "loss",
        ),
        (
            "one_hot forgotten", "kernels.cross_entropy",
            "- tl.where(columns == target, 1.0, 0.0)", "",
            "triton cross_entropy", "dlogits",
        ),
        (
            "the first rows' targets for all", "kernels.linear_cross_entropy",
            "target[part], losses", "target[: len(logits)], losses",
            "triton linear_cross_entropy", "loss",
        ),
        (
            "dweight of the last chunk alone", "kernels.linear_cross_entropy",
            "total.addmm_(a, b)", "total.copy_(a @ b)",
            "triton linear_cross_entropy", "dweight",
        ),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a seeded defect: the first result that failed, and whether the loose test noticed too."""

    defect: Defect
    result: Result | None
    loose: bool

    @property
    def caught(self) -> bool:
        return self.result is not None and self.result.tensor == self.defect.tensor


@dataclass(frozen=True)
class Report:
    """All outcomes; passed where each defect was caught."""

    outcomes: list[Outcome]

    @property
    def passed(self) -> bool:
        return bool(self.outcomes) and all(outcome.caught for outcome in self.outcomes)

    def to_json(self) -> str:
        """One object: passed, and for each defect its text, what caught it, and whether the loose test would have."""
        outcomes = [
            {
                **vars(outcome.defect),
                "caught": outcome.caught,
                "caught_by": outcome.result and outcome.result.to_dict(),
                "loose_test": outcome.loose,
            }
            for outcome in self.outcomes
        ]
        return json.dumps({"passed": self.passed, "defects": outcomes}, indent=1)


def run(names: Sequence[str] = (), progress: Callable[[str], None] = lambda what: None) -> Report:
    """Seed the defects of these layers, modules or rows, or all of them; those of kernels where "kernels" is a name.

    UserError for a name that has none.
    """
    require("torch", extra="torch")
    names_of = ((defect.module.removeprefix("kernels."), defect.check.removeprefix("triton ")) for defect in DEFECTS)
    known = {name for pair in names_of for name in pair} | {"kernels"}
    for name in names:
        if name not in known:
            raise UserError(f"{name}: no defects are known of it{did_you_mean(name, known)}")
    layers = set(names) - {"kernels"}
    chosen = [
        defect
        for defect in DEFECTS
        if defect.module.startswith("kernels.") == ("kernels" in names)
        and (not layers or {defect.module.removeprefix("kernels."), defect.check.removeprefix("triton ")} & layers)
    ]
    outcomes = []
    with check.one_thread():
        for defect in chosen:
            progress(defect.name)
            outcomes.append(seed(defect))
    return Report(outcomes)


def seed(defect: Defect) -> Outcome:
    """Run the check that must notice the defect, up to its first failure, and the loose test."""
    sound = loose_test(defect.check)
    with defect.seeded(), np.errstate(all="ignore"):
        result = next((result for result in _results(defect.check) if not result.passed), None)
        defective = loose_test(defect.check)
    return Outcome(defect, result, differs_loosely(defective, sound))


def differs_loosely(defective: dict[str, np.ndarray], sound: dict[str, np.ndarray]) -> bool:
    """Whether a test with an absolute tolerance of 1e-4 tells them apart."""
    return any(not np.allclose(defective[name], true, rtol=0, atol=1e-4) for name, true in sound.items())


def _results(name: str) -> Iterator[Result]:
    """A check's results in order, a model's traces first: they say where it begins."""
    if name.startswith("model "):
        for function in (model.trace, model.gradients, model.optimizer, model.differences):
            yield from function(name.removeprefix("model "))
    else:
        yield from check.operator_results(_row(name), {})


def _row(name: str) -> ops.Row:
    if name.startswith("triton "):
        return ops.ROWS[name.removeprefix("triton ")].of(subjects.kernels())
    return ops.ROWS[name]


def loose_test(name: str) -> dict[str, np.ndarray]:
    """What the loose test compares: an operator's result and gradients, or a model's gradients and a step's result."""
    if name.startswith("model "):
        config = model.CONFIGS[name.removeprefix("model ")]
        rng = np.random.default_rng(0)
        params = {tensor: rng.normal(0, 0.02, shape) for tensor, shape in config.parameter_shapes().items()}
        engine = create_engine("numpy", config, params, dtype="float64")
        engine.accumulate(model.batch(config))
        gradients = {f"d{tensor}": gradient.copy() for tensor, gradient in engine.gradients().items()}
        engine.step(1e-5)
        return gradients | engine.parameters()
    row = _row(name)
    axes = min(2, max(len(case.size) for case in row.cases))  # a loss of pairs of numbers has one
    problem = row.problem(next(case for case in row.cases if len(case.size) >= axes and min(case.size) > 1))
    small = {
        tensor: 0.02 * value if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
        for tensor, value in problem.arguments.items()
    }
    dy = tuple(np.ones_like(dy) for dy in problem.upstream())
    return ops.Problem(row, "rows", small, dy if len(dy) > 1 else dy[0]).run()


def render(report: Report) -> str:
    """A few lines a defect: what was altered, and what caught it."""
    lines = []
    for outcome in report.outcomes:
        defect = outcome.defect
        lines.append(f"{defect.name}  ({defect.file})")
        lines += [f"    - {line.strip()}" for line in defect.old.strip().splitlines()]
        lines += [f"    + {line.strip()}" for line in defect.new.strip().splitlines()]
        found = str(outcome.result) if outcome.result else "nothing"
        if outcome.caught:
            lines.append(f"    caught: {found}")
        else:
            lines.append(f"    MISSED: {defect.check} must name {defect.tensor}, it found {found}")
        lines.append(f"    a loose test {'catches it too' if outcome.loose else 'misses it'}")
    caught = sum(outcome.caught for outcome in report.outcomes)
    loose = sum(outcome.loose for outcome in report.outcomes)
    return "\n".join([*lines, "", f"{caught} of {len(report.outcomes)} defects caught; a loose test catches {loose}"])

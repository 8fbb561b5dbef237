"""Every layer's passes as equations, in the steps in which they are derived.

A row here says of a layer of `reference` what its module's docstring says of it, with every index written out and every
intermediate result named: what `forward` computes, line by line, and then what `backward` does. Gradients are named
after what they are gradients of, "dx" of "x". The lines are no second implementation to be trusted: they are held
against the layer's own results, for every number that is shown.

Letters: b example, t and s token (query and key), c and o channel (in and out), h and g head (of queries and of keys),
d channel of a head, v word of the vocabulary, r rank, p pair of answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpt.study.equations import Equation
from reference import gelu as gelu_layer
from reference import philox

__all__ = ["DERIVATIONS", "Derivation", "derive"]

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Derivation:
    """A layer's equations, in order; `constants` are the numbers and the masks in them that are no arguments."""

    forward: tuple[Equation, ...]
    backward: tuple[Equation, ...]
    constants: dict[str, Any] = field(default_factory=dict)

    def evaluate(self, arguments: Arguments, upstream: Arguments) -> dict[str, np.ndarray]:
        """All tensors of both passes by name, from a layer's arguments and its upstream gradients ("dy", "dloss").

        `upstream` may hold results as well, to say the shape of those whose equations do not.
        """
        values = {name: value for name, value in arguments.items() if value is not None} | self.constants
        values |= upstream
        found: dict[str, np.ndarray] = {}
        for equation in (*self.forward, *self.backward):
            values[equation.tensor] = found[equation.tensor] = equation.evaluate(values)
        return found


def derive(layer: str, arguments: Arguments) -> Derivation:
    """The derivation of a layer's passes for these arguments: what is None or 0 does not appear in it."""
    return DERIVATIONS[layer](arguments)


def _derivation(forward: str, backward: str, **constants: Any) -> Derivation:
    lines = [
        tuple(Equation(line.strip()) for line in text.splitlines() if line.strip()) for text in (forward, backward)
    ]
    return Derivation(lines[0], lines[1], constants)


def _mask(a: Arguments, shape: tuple[int, ...]) -> dict[str, Any]:
    """What dropout's equations need: 1 where an element is kept, 0 elsewhere, and the rate."""
    return {"keep": philox.keep_mask(a["noise"], shape, a["rate"]).astype(np.float64), "rate": a["rate"]}


def embedding(a: Arguments) -> Derivation:
    rows = ",".join("bt"[-np.ndim(a["ids"]) :])
    return _derivation(
        f"y[{rows},c] = weight[ids[{rows}],c]",
        f"dweight[v,c] = sum({rows}, (ids[{rows}] == v) * dy[{rows},c])",
    )


def linear(a: Arguments) -> Derivation:
    bias = a.get("bias") is not None
    return _derivation(
        f"y[b,t,o] = sum(c, x[b,t,c] * weight[o,c]){' + bias[o]' * bias}",
        f"""
        dx[b,t,c] = sum(o, dy[b,t,o] * weight[o,c])
        dweight[o,c] = sum(b, t, dy[b,t,o] * x[b,t,c])
        {"dbias[o] = sum(b, t, dy[b,t,o])" * bias}
        """,
    )


def layer_norm(a: Arguments) -> Derivation:
    bias = a.get("bias") is not None
    return _derivation(
        f"""
        mean[b,t] = sum(c, x[b,t,c]) / C
        variance[b,t] = sum(c, (x[b,t,c] - mean[b,t])**2) / C
        rstd[b,t] = 1 / sqrt(variance[b,t] + eps)
        h[b,t,c] = (x[b,t,c] - mean[b,t]) * rstd[b,t]
        y[b,t,c] = h[b,t,c] * weight[c]{" + bias[c]" * bias}
        """,
        f"""
        dh[b,t,c] = dy[b,t,c] * weight[c]
        direct[b,t,c] = rstd[b,t] * dh[b,t,c]
        through_mean[b,t] = -rstd[b,t] * (sum(o, dh[b,t,o]) / C)
        through_variance[b,t,c] = -rstd[b,t] * h[b,t,c] * (sum(o, dh[b,t,o] * h[b,t,o]) / C)
        dx[b,t,c] = direct[b,t,c] + through_mean[b,t] + through_variance[b,t,c]
        dweight[c] = sum(b, t, dy[b,t,c] * h[b,t,c])
        {"dbias[c] = sum(b, t, dy[b,t,c])" * bias}
        """,
        C=a["x"].shape[-1],
        eps=a["eps"],
    )


def rms_norm(a: Arguments) -> Derivation:
    return _derivation(
        """
        rstd[b,t] = 1 / sqrt(sum(c, x[b,t,c]**2) / C + eps)
        h[b,t,c] = x[b,t,c] * rstd[b,t]
        y[b,t,c] = h[b,t,c] * weight[c]
        """,
        """
        dh[b,t,c] = dy[b,t,c] * weight[c]
        direct[b,t,c] = rstd[b,t] * dh[b,t,c]
        through_rstd[b,t,c] = -rstd[b,t] * h[b,t,c] * (sum(o, dh[b,t,o] * h[b,t,o]) / C)
        dx[b,t,c] = direct[b,t,c] + through_rstd[b,t,c]
        dweight[c] = sum(b, t, dy[b,t,c] * h[b,t,c])
        """,
        C=a["x"].shape[-1],
        eps=a["eps"],
    )


def rope(a: Arguments) -> Derivation:
    """An entry's partner is the other one of its pair; the first of the two is turned with -sin."""
    pair, first, partner = ("d % half", "d < half", "(d + half) % D")
    if a["interleaved"]:
        pair, first, partner = ("d // 2", "d % 2 == 0", "d + 1 - 2 * (d % 2)")
    angle = f"[b,t,{pair}]" if a["cos"].ndim == 3 else f"[t,{pair}]"
    return _derivation(
        f"y[b,h,t,d] = x[b,h,t,d] * cos{angle} + where({first}, -1, 1) * x[b,h,t,{partner}] * sin{angle}",
        f"dx[b,h,t,d] = dy[b,h,t,d] * cos{angle} - where({first}, -1, 1) * dy[b,h,t,{partner}] * sin{angle}",
        D=a["x"].shape[-1],
        half=a["x"].shape[-1] // 2,
    )


def attention(a: Arguments) -> Derivation:
    q, k = a["q"], a["k"]
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    drops = bool(a.get("rate") and a.get("noise") is not None)
    key = "h" if G == H else "h // R"
    seen = "(s <= t + past) * " if a["causal"] else ""
    used = "dropped" if drops else "p"
    group = "" if G == H else "(h // R == g) * "
    over, of = ("t", "h") if G == H else ("h, t", "g")
    constants = {"scale": 1 / math.sqrt(D) if a.get("scale") is None else a["scale"]}
    constants |= {"past": S - T} if a["causal"] else {}
    constants |= {"R": H // G} if G != H else {}
    constants |= _mask(a, (B, H, T, S)) if drops else {}
    return _derivation(
        f"""
        scores[b,h,t,s] = scale * sum(d, q[b,h,t,d] * k[b,{key},s,d])
        m[b,h,t] = max(s, {"where(s <= t + past, scores[b,h,t,s], -1e300)" if seen else "scores[b,h,t,s]"})
        z[b,h,t] = sum(s, {seen}exp(scores[b,h,t,s] - m[b,h,t]))
        p[b,h,t,s] = {seen}(exp(scores[b,h,t,s] - m[b,h,t]) / z[b,h,t])
        {"dropped[b,h,t,s] = p[b,h,t,s] * keep[b,h,t,s] / (1 - rate)" * drops}
        y[b,h,t,d] = sum(s, {used}[b,h,t,s] * v[b,{key},s,d])
        """,
        f"""
        dp[b,h,t,s] = sum(d, dy[b,h,t,d] * v[b,{key},s,d]){" * keep[b,h,t,s] / (1 - rate)" * drops}
        delta[b,h,t] = sum(s, p[b,h,t,s] * dp[b,h,t,s])
        dscores[b,h,t,s] = p[b,h,t,s] * (dp[b,h,t,s] - delta[b,h,t])
        dq[b,h,t,d] = scale * sum(s, dscores[b,h,t,s] * k[b,{key},s,d])
        dk[b,{of},s,d] = scale * sum({over}, {group}dscores[b,h,t,s] * q[b,h,t,d])
        dv[b,{of},s,d] = sum({over}, {group}{used}[b,h,t,s] * dy[b,h,t,d])
        """,
        **constants,
    )


def gelu(a: Arguments) -> Derivation:
    if a["approximate"] == "none":
        return _derivation(
            "y[b,t,c] = x[b,t,c] * cdf(x[b,t,c])",
            "dx[b,t,c] = dy[b,t,c] * (cdf(x[b,t,c]) + x[b,t,c] * exp(-x[b,t,c]**2 / 2) / sqrt(2 * pi))",
            pi=math.pi,
        )
    return _derivation(
        """
        u[b,t,c] = kappa * (x[b,t,c] + alpha * x[b,t,c]**3)
        y[b,t,c] = x[b,t,c] * (1 + tanh(u[b,t,c])) / 2
        """,
        """
        du[b,t,c] = dy[b,t,c] * x[b,t,c] * (1 - tanh(u[b,t,c])**2) / 2
        dx[b,t,c] = dy[b,t,c] * (1 + tanh(u[b,t,c])) / 2 + du[b,t,c] * kappa * (1 + 3 * alpha * x[b,t,c]**2)
        """,
        kappa=gelu_layer.C,
        alpha=gelu_layer.A,
    )


def bias_gelu(a: Arguments) -> Derivation:
    """GELU's equations of the sum."""
    inner = gelu(a)
    forward, backward = (
        tuple(Equation(re.sub(r"\bx\[", "s[", equation.text)) for equation in part)
        for part in (inner.forward, inner.backward)
    )
    first, last = Equation("s[b,t,c] = x[b,t,c] + bias[c]"), Equation("dbias[c] = sum(b, t, dx[b,t,c])")
    return Derivation((first, *forward), (*backward, last), inner.constants)


def swiglu(a: Arguments) -> Derivation:
    return _derivation(
        """
        opened[b,t,c] = 1 / (1 + exp(-gate[b,t,c]))
        y[b,t,c] = gate[b,t,c] * opened[b,t,c] * up[b,t,c]
        """,
        """
        dgate[b,t,c] = dy[b,t,c] * up[b,t,c] * opened[b,t,c] * (1 + gate[b,t,c] * (1 - opened[b,t,c]))
        dup[b,t,c] = dy[b,t,c] * gate[b,t,c] * opened[b,t,c]
        """,
    )


def dropout(a: Arguments) -> Derivation:
    return _derivation(
        "y[b,t,c] = x[b,t,c] * keep[b,t,c] / (1 - rate)",
        "dx[b,t,c] = dy[b,t,c] * keep[b,t,c] / (1 - rate)",
        **_mask(a, a["x"].shape),
    )


def lora(a: Arguments) -> Derivation:
    drops = bool(a.get("rate") and a.get("noise") is not None)
    x = "dropped" if drops else "x"
    return _derivation(
        f"""
        {"dropped[b,t,c] = x[b,t,c] * keep[b,t,c] / (1 - rate)" * drops}
        u[b,t,r] = sum(c, {x}[b,t,c] * a[r,c])
        y[b,t,o] = scale * sum(r, u[b,t,r] * b[o,r])
        """,
        f"""
        du[b,t,r] = scale * sum(o, dy[b,t,o] * b[o,r])
        dx[b,t,c] = sum(r, du[b,t,r] * a[r,c]){" * keep[b,t,c] / (1 - rate)" * drops}
        da[r,c] = sum(b, t, du[b,t,r] * {x}[b,t,c])
        db[o,r] = scale * sum(b, t, dy[b,t,o] * u[b,t,r])
        """,
        **(_mask(a, a["x"].shape) if drops else {}),
    )


def cross_entropy(a: Arguments) -> Derivation:
    counted = a["targets"] != a.get("ignore_index", -100)
    some = not counted.all()
    one = "log(z[b,t]) - (logits[b,t,targets[b,t]] - m[b,t])"
    return _derivation(
        f"""
        m[b,t] = max(v, logits[b,t,v])
        z[b,t] = sum(v, exp(logits[b,t,v] - m[b,t]))
        losses[b,t] = {f"counted[b,t] * ({one})" if some else one}
        loss = sum(b, t, losses[b,t]) / N
        """,
        f"""
        p[b,t,v] = exp(logits[b,t,v] - m[b,t]) / z[b,t]
        dlogits[b,t,v] = dloss * {"counted[b,t] * " * some}(p[b,t,v] - (targets[b,t] == v)) / N
        """,
        N=max(1, int(counted.sum())),
        **({"counted": counted.astype(a["logits"].dtype)} if some else {}),
    )


def linear_cross_entropy(a: Arguments) -> Derivation:
    """Cross entropy's equations, between those of a linear layer. All logits at once, which the layer avoids."""
    bias = a.get("bias") is not None
    loss = cross_entropy({**a, "logits": a["x"]})
    first = Equation(f"logits[b,t,v] = sum(c, x[b,t,c] * weight[v,c]){' + bias[v]' * bias}")
    last = [
        Equation("dx[b,t,c] = sum(v, dlogits[b,t,v] * weight[v,c])"),
        Equation("dweight[v,c] = sum(b, t, dlogits[b,t,v] * x[b,t,c])"),
        *[Equation("dbias[v] = sum(b, t, dlogits[b,t,v])")] * bias,
    ]
    return Derivation((first, *loss.forward), (*loss.backward, *last), loss.constants)


def token_logps(a: Arguments) -> Derivation:
    counted = a["targets"] != a.get("ignore_index", -100)
    some = "counted[b,t] * " * (not counted.all())
    return _derivation(
        f"""
        m[b,t] = max(v, logits[b,t,v])
        z[b,t] = sum(v, exp(logits[b,t,v] - m[b,t]))
        y[b,t] = {some}(logits[b,t,targets[b,t]] - m[b,t] - log(z[b,t]))
        """,
        f"dlogits[b,t,v] = {some}dy[b,t] * ((targets[b,t] == v) - exp(logits[b,t,v] - m[b,t]) / z[b,t])",
        **({"counted": counted.astype(a["logits"].dtype)} if some else {}),
    )


def dpo(a: Arguments) -> Derivation:
    return _derivation(
        """
        z[p] = beta * ((chosen[p] - chosen0[p]) - (rejected[p] - rejected0[p]))
        loss = sum(p, log(1 + exp(-z[p]))) / P
        """,
        """
        dchosen[p] = -beta * dloss / (1 + exp(z[p])) / P
        drejected[p] = -dchosen[p]
        """,
        P=len(a["chosen"]),
    )


def orpo(a: Arguments) -> Derivation:
    return _derivation(
        """
        qa[p] = 1 - exp(chosen[p])
        qb[p] = 1 - exp(rejected[p])
        z[p] = (chosen[p] - rejected[p]) - (log(qa[p]) - log(qb[p]))
        loss = sum(p, beta * log(1 + exp(-z[p])) - chosen[p]) / P
        """,
        """
        ratio[p] = exp(chosen[p] - rejected[p])
        dchosen[p] = dloss * (-1 - beta / (qa[p] + ratio[p] * qb[p])) / P
        drejected[p] = dloss * beta * qa[p] / (qb[p] * (qa[p] + ratio[p] * qb[p])) / P
        """,
        P=len(a["chosen"]),
    )


# What lies between the layers: arrays looked at in another shape, and sums.


def split_heads(a: Arguments) -> Derivation:
    return _derivation("y[b,h,t,d] = x[b,t,h * D + d]", "dx[b,t,c] = dy[b,c // D,t,c % D]", D=a["head_dim"])


def join_heads(a: Arguments) -> Derivation:
    return _derivation("y[b,t,c] = x[b,c // D,t,c % D]", "dx[b,h,t,d] = dy[b,t,h * D + d]", D=a["x"].shape[-1])


def add(a: Arguments) -> Derivation:
    if np.ndim(a["branch"]) < np.ndim(a["x"]):  # positions, the same for all examples
        return _derivation(
            "y[b,t,c] = x[b,t,c] + branch[t,c]",
            """
            dx[b,t,c] = dy[b,t,c]
            dbranch[t,c] = sum(b, dy[b,t,c])
            """,
        )
    return _derivation(
        "y[b,t,c] = x[b,t,c] + branch[b,t,c]",
        """
        dx[b,t,c] = dy[b,t,c]
        dbranch[b,t,c] = dy[b,t,c]
        """,
    )


DERIVATIONS: dict[str, Callable[[Arguments], Derivation]] = {
    function.__name__: function
    for function in (
        embedding, linear, layer_norm, rms_norm, rope, attention, gelu, bias_gelu, swiglu, dropout, lora, cross_entropy,
        linear_cross_entropy, token_logps, dpo, orpo, split_heads, join_heads, add,
    )
}  # fmt: skip
DERIVATIONS["flash_attention"] = attention  # another order of the same sums

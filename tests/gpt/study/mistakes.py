"""Layers as a learner would write them, right, and mistakes to be made in them."""

LINEAR = """
import numpy as np

def forward(x, weight, bias=None):
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    return y, (x, weight)

def backward(dy, saved):
    x, weight = saved
    dx = dy @ weight
    dweight = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    dbias = dy.sum(axis=(0, 1))
    return dx, dweight, dbias
"""

LAYER_NORM = """
import numpy as np

def forward(x, weight, bias, eps=1e-5):
    C = x.shape[-1]
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).sum(axis=-1, keepdims=True) / C
    rstd = 1 / np.sqrt(variance + eps)
    h = (x - mean) * rstd
    return h * weight + bias, dict(h=h, rstd=rstd, weight=weight)

def backward(dy, saved):
    h, rstd, weight = saved["h"], saved["rstd"], saved["weight"]
    dh = dy * weight
    direct = dh
    through_mean = dh.mean(axis=-1, keepdims=True)
    through_variance = h * (dh * h).mean(axis=-1, keepdims=True)
    dx = rstd * (direct - through_mean - through_variance)
    dweight = (dy * h).sum(axis=(0, 1))
    dbias = dy.sum(axis=(0, 1))
    return dx, dweight, dbias
"""

ATTENTION = """
import numpy as np

def forward(q, k, v):
    B, H, T, D = q.shape
    scale = 1 / np.sqrt(D)
    scores = q @ k.swapaxes(-1, -2) * scale
    future = np.triu(np.ones((T, T), bool), 1)
    scores = np.where(future, -np.inf, scores)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    return p @ v, (q, k, v, p, scale)

def backward(dy, saved):
    q, k, v, p, scale = saved
    dv = p.swapaxes(-1, -2) @ dy
    dp = dy @ v.swapaxes(-1, -2)
    delta = (p * dp).sum(axis=-1, keepdims=True)
    ds = p * (dp - delta)
    dq = ds @ k * scale
    dk = ds.swapaxes(-1, -2) @ q * scale
    return dq, dk, dv
"""

GELU_TANH = """
import numpy as np

def forward(x, approximate):
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    t = np.tanh(u)
    return 0.5 * x * (1 + t), (x, t)

def backward(dy, saved):
    x, t = saved
    du = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t**2) * du)
"""

CROSS_ENTROPY = """
import numpy as np

def forward(logits, targets, ignore_index=-100):
    rows, target = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    counted = target != ignore_index
    N = counted.sum()
    e = np.exp(rows - rows.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    picked = p[np.arange(len(p)), np.where(counted, target, 0)]
    loss = -(np.log(picked) * counted).sum() / N
    return loss, (p, target, counted, N, logits.shape)

def backward(dloss, saved):
    p, target, counted, N, shape = saved
    dlogits = p.copy()
    dlogits[np.arange(len(p)), np.where(counted, target, 0)] -= 1
    return (dlogits * counted[:, None] * dloss / N).reshape(shape)
"""

EMBEDDING = """
import numpy as np

def forward(ids, weight):
    return weight[ids], (ids, weight.shape)

def backward(dy, saved):
    ids, shape = saved
    dweight = np.zeros(shape)
    np.add.at(dweight, ids, dy)
    return dweight
"""

RMS_NORM = """
import numpy as np

def forward(x, weight, eps):
    rstd = 1 / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return x * rstd * weight, (x, rstd, weight)

def backward(dy, saved):
    x, rstd, weight = saved
    h = x * rstd
    dh = dy * weight
    dx = rstd * (dh - h * (dh * h).mean(axis=-1, keepdims=True))
    return dx, (dy * h).sum(axis=(0, 1))
"""

SWIGLU = """
import numpy as np

def forward(gate, up):
    opened = 1 / (1 + np.exp(-gate))
    return gate * opened * up, (gate, up, opened)

def backward(dy, saved):
    gate, up, opened = saved
    dgate = dy * up * opened * (1 + gate * (1 - opened))
    dup = dy * gate * opened
    return dgate, dup
"""

GROUPED = """
import numpy as np

def forward(q, k, v, causal, scale, rate, noise):
    B, H, T, D = q.shape
    R = H // k.shape[1]
    k, v = np.repeat(k, R, axis=1), np.repeat(v, R, axis=1)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(D)
    scores = np.where(np.triu(np.ones((T, T), bool), 1), -1e30, scores)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return p @ v, (q, k, v, p, R)

def backward(dy, saved):
    q, k, v, p, R = saved
    B, H, T, D = q.shape
    dp = dy @ v.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) / np.sqrt(D)
    dk, dv = ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dy
    grouped = (B, H // R, R, T, D)
    return ds @ k, dk.reshape(grouped).sum(axis=2), dv.reshape(grouped).sum(axis=2)
"""

RIGHT = {
    "linear": LINEAR, "layer_norm": LAYER_NORM, "attention": ATTENTION, "gelu-tanh": GELU_TANH,
    "cross_entropy": CROSS_ENTROPY, "cross_entropy-ignored": CROSS_ENTROPY, "embedding": EMBEDDING,
    "rms_norm": RMS_NORM, "swiglu": SWIGLU, "attention-grouped": GROUPED,
}  # fmt: skip

# The layer, what is replaced by what, and what the report must then say.
MISTAKES = (
    ("linear", "dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])",
     "x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])",
     "dweight is transposed: its axes are c, o, expected o, c"),
    ("linear", "dbias = dy.sum(axis=(0, 1))", "dbias = dy.sum(axis=0)", "summed over axis 0, it is right"),
    ("linear", "dbias = dy.sum(axis=(0, 1))", "dbias = dy", "summed over axes 0 and 1, it is right"),
    ("linear", "dbias = dy.sum(axis=(0, 1))", "dbias = dy.sum()", "dbias is summed over o too, which it must not be"),
    ("linear", "dbias = dy.sum(axis=(0, 1))", "dbias = dy[0].sum(axis=0)",
     "dbias has of the sum over b the first term that counts, alone"),
    ("linear", "dbias = dy.sum(axis=(0, 1))", "dbias = dy.mean(axis=(0, 1))", "1/(the number of b and t)"),
    ("linear", "dx = dy @ weight", "dx = -(dy @ weight)", "dx has the wrong sign"),
    ("linear", "dx = dy @ weight", "dx = 2 * (dy @ weight)", "dx is 2 or"),
    ("linear", "y = y + bias", "y = y - bias", "y is with the wrong sign of bias[o]"),
    ("linear", "y = y + bias", "pass", "y is without bias[o]"),
    ("linear", "return y, (x, weight)", "return y.transpose(1, 0, 2), (x, weight)", "y is transposed"),
    ("linear", "dx = dy @ weight", "dx = np.roll(dy @ weight, 1, axis=1)", "dx is shifted along t, by 1"),
    ("linear", "dx = dy @ weight", "dx = (dy @ weight).astype(np.float32)", "right in the digits of float32"),
    ("layer_norm", "direct - through_mean - through_variance", "direct - through_variance",
     "dx is without through_mean[b,t]"),
    ("layer_norm", "direct - through_mean - through_variance", "direct - through_mean + through_variance",
     "dx is with the wrong sign of through_variance[b,t,c]"),
    ("layer_norm", "direct - through_mean - through_variance", "direct",
     "dx is without through_mean[b,t] and through_variance[b,t,c]"),
    ("layer_norm", "dh = dy * weight", "dh = dy", "without the factor weight[c]"),
    ("layer_norm", "keepdims=True) / C", "keepdims=True) / (C - 1)", "with C - 1 in place of C"),
    ("layer_norm", "np.sqrt(variance + eps)", "np.sqrt(variance)", "without ε"),
    ("layer_norm", "1 / np.sqrt(variance + eps)", "1 / (variance + eps)", "without the sqrt"),
    ("layer_norm", "dweight = (dy * h).sum(axis=(0, 1))", "dweight = (dy * h).sum(axis=(0, 1)) * rstd.mean()",
     "times what it should be"),
    ("layer_norm", "dx = rstd * (", "dx = (", "without rstd[b,t], in all of"),
    ("attention", "ds = p * (dp - delta)", "ds = p * dp", "without δ[b,h,t]"),
    ("attention", "ds = p * (dp - delta)", "ds = p * (dp + delta)", "with the wrong sign of δ[b,h,t]"),
    ("attention", "dq = ds @ k * scale", "dq = ds @ k", "dq is 1/scale"),
    ("attention", "swapaxes(-1, -2) * scale", "swapaxes(-1, -2)", "without the factor scale"),
    ("attention", "np.ones((T, T), bool), 1)", "np.ones((T, T), bool), 2)", "with the condition off by one, in all of"),
    ("attention", "np.where(future, -np.inf, scores)", "scores", "without [s ≤ t + past], in all of"),
    ("attention", "dv = p.swapaxes(-1, -2) @ dy", "dv = p @ dy", "with p[b,h,s,t] in place of p[b,h,t,s]"),
    ("attention", "scale = 1 / np.sqrt(D)", "scale = 1 / D", "with scale² in place of scale"),
    ("gelu-tanh", "du = np.sqrt(2 / np.pi) * (1", "du = (1", "without the factor κ"),
    ("gelu-tanh", "(1 - t**2)", "(1 - t)", "tanh(u[b,t,c]) in place of its power"),
    ("gelu-tanh", "(0.5 * (1 + t) + 0.5", "(0.5 * (1 + t) - 0.5", "the wrong sign of"),
    ("gelu-tanh", "du = np.sqrt(2 / np.pi) * (1 + 3 * ", "du = np.sqrt(2 / np.pi) * (1 + ",
     "inner derivative without its factor 3"),
    ("cross_entropy-ignored", "N = counted.sum()", "N = counted.size", "with the number of b and t in place of N"),
    ("cross_entropy", "-= 1", "-= 0", "dlogits is without dloss · [targets[b,t] = v] / N"),
    ("cross_entropy", "dloss / N", "dloss", "dlogits is N"),
    ("embedding", "np.add.at(dweight, ids, dy)", "dweight[ids] = dy", "the last term that counts, alone"),
    ("rms_norm", "h = x * rstd", "h = x", "as if     h[b,t,c] = x[b,t,c]"),
    ("rms_norm", "(x**2).mean", "abs(x).mean", "30 of 30 elements of y are wrong"),
    ("swiglu", "(1 + gate * (1 - opened))", "(gate * (1 - opened))", "dgate is without"),
    ("swiglu", "dgate = dy * up * opened", "dgate = dy * opened", "without the factor up[b,t,c]"),
    ("swiglu", "dup = dy * gate * opened", "dup = dy * gate", "without the factor opened[b,t,c]"),
    ("attention-grouped", "dk.reshape(grouped).sum(axis=2)", "dk[:, ::R]", "one head of each group counted"),
    ("attention-grouped", "dv.reshape(grouped).sum(axis=2)", "dv", "shape"),
)  # fmt: skip

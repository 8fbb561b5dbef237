"""How much memory training asks for, before anything is trained: a sum of tensors, each with its shape.

    parameters P     gradients, of what learns      moments, two for each number that learns
    activations      what the forward pass keeps for the backward pass, layer by layer
    beside them      at work: gradients of the logits, of a block's tensors, a weight's until it is added

A step's peak is the largest of a few moments, because activations go while gradients come:

    frozen blocks    the forward pass in a block of which nothing is kept: what it computes with, as it goes along
    forward          parameters, moments, all activations, logits and what the loss makes of them
    loss             the same with the gradients of the logits
    blocks           the backward pass in the last block: no logits any more, all other activations still there; or in
                     the first, with the gradients of the others
    end of backward  all gradients, no activations, and a tied embedding's gradient in its parts
    optimizer        all gradients, and what AdamW holds of the largest parameter

The engines differ in what they keep. NumPy's layers keep what their `saved` names (reference/), for as long as the
backward pass goes on, and gradients stay as memory for the next step, in each process that has a part of the batch
(gpt/crew.py). Autograd keeps what PyTorch's operators save, the
kernels what their `Saved` names (kernels/), and frees both on the way. Sizes, as everywhere in the project:

    B, T rows and their tokens   C emb_dim   H, G heads of queries and of keys   D head_dim   M mlp_dim   V logits

Not counted are the interpreter, its libraries, what an allocator holds without use, and what torch.compile changes; a
few numbers a row or a parameter's bias, where they are next to nothing, are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from gpt import parts
from gpt.engine import trained_names
from gpt.errors import UserError
from gpt.work import spans
from reference import attention, linear_cross_entropy, optim, pieces
from reference.config import GPTConfig
from reference.model import first_trained

__all__ = [
    "KINDS", "Memory", "Setup", "Term", "activations", "fitting", "largest_batch", "memory", "require_memory",
    "size_text",
]  # fmt: skip

KINDS = ("norms", "attention projections", "attention", "MLP", "dropout masks", "head and loss")
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
# Above how many logits the head and the loss are one operator, which never holds all logits at once.
FUSED_ABOVE = {"numpy": 2**26, "torch": 2**26, "triton": 0}
# And from how many tokens on, in units of the embedding: with fewer, the head's gradients are larger than the logits.
FUSED_TOKENS = {"numpy": 4, "torch": 1, "triton": 0}
LOGITS = 2**26  # that it holds at a time, about, in PyTorch: gpt/ops.py, kernels/linear_cross_entropy.py
MOST_ROWS = 2**20  # that are tried


@dataclass(frozen=True)
class Setup:
    """What is trained, and how. Examples are shared by the processes; everything else is as in gpt/train/config.py and
    gpt/finetune/config.py."""

    config: GPTConfig
    batch_size: int
    length: int
    engine: str = "torch"
    dtype: str = "float32"
    precision: str = "full"
    trained: tuple[str, ...] = ()
    accumulation: int = 1
    processes: int = 1
    parallel: str = "ddp"
    checkpoint_activations: bool = False
    device: str = "cpu"  # or cuda
    cores: int = 1  # among which the NumPy engine divides a batch, gpt/parts.py
    objective: str = "cross_entropy"  # or dpo, orpo, whose examples are pairs of answers
    counted: int | None = None  # of a pair's row, the targets that have a log-probability; None: all

    @property
    def examples(self) -> int:
        """Of a micro-batch, in the process that has most of them."""
        return -(-self.batch_size // self.processes)

    @property
    def rows(self) -> int:
        """The same as rows of tokens: a pair has two."""
        return 2 * self.examples if self.pairs else self.examples

    @property
    def pairs(self) -> bool:
        """Whether an example is a pair of answers, and the loss made of their tokens' log-probabilities."""
        return self.objective != "cross_entropy"

    @property
    def item(self) -> int:
        """Bytes of a parameter's number, and of the shortcut's."""
        return BYTES[self.dtype]

    @property
    def low(self) -> int:
        """Bytes of a number that a matrix product gives: autocast's, which leaves float64 alone, or the same."""
        return BYTES.get(self.precision, self.item) if self.dtype == "float32" else self.item

    @property
    def casts(self) -> bool:
        """Whether autocast makes copies."""
        return self.low != self.item

    @property
    def shards(self) -> int:
        """How many processes share one copy of the parameters."""
        return self.processes if self.parallel == "fsdp" else 1

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters."""
        return self.config.parameter_shapes()

    @cached_property
    def learns(self) -> frozenset[str]:
        """The parameters that learn."""
        return frozenset(trained_names(self.config, self.trained))

    @cached_property
    def first(self) -> int:
        """The first block that gradients reach, -1 if they reach the embedding."""
        return first_trained(self.config, self.learns)

    @property
    def fuses(self) -> bool:
        """Whether head and loss are one operator: where it would save memory, and the head has no adapter."""
        tokens = self.rows * self.length
        if self.pairs or self.config.adapts("head") or (self.engine == "numpy" and not _head_learns(self)):
            return False
        many = tokens > FUSED_TOKENS[self.engine] * self.config.emb_dim
        return many and tokens * self.config.n_outputs > FUSED_ABOVE[self.engine]

    @property
    def parts(self) -> int:
        """Into how many parts a batch is divided, gpt/parts.py."""
        if self.engine != "numpy":
            return 1
        most = parts.most_parts(self.rows * self.length * self.config.emb_dim, self.cores, self.apart)
        if self.pairs and self.config.drops:  # masks are those of all rows together
            return 1
        texts = min(most, self.examples)
        whole = self.pairs or self.config.drops or self.checkpoint_activations
        return texts if whole else most // texts * texts

    @property
    def apart(self) -> bool:
        """Whether these are in processes of their own."""
        return self.engine == "numpy" and parts.are_apart(self.count(self.learns) * self.item, self.cores)

    def count(self, names: Iterable[str]) -> int:
        """How many numbers these parameters have."""
        return sum(math.prod(self.shapes[name]) for name in names)


class Term(NamedTuple):
    """A tensor that is kept, and under which of KINDS it is counted."""

    kind: str
    tensor: str
    shape: tuple[int, ...]
    size: int  # bytes of a number

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.size


Terms = Iterator[Term]


# What NumPy's layers keep, in a block.


def numpy_block(s: Setup, i: int) -> Terms:
    yield from numpy_norm(s, "norm1")
    yield from numpy_inputs(s, "attention projections", i, "attn", ("query", "key", "value"), s.config.emb_dim)
    yield from numpy_attention(s)
    yield from numpy_adapters(s, "attention projections", i, "attn", ("out",), s.config.n_heads * s.config.head_dim)
    yield from numpy_norm(s, "norm2")
    yield from numpy_mlp(s, i)
    yield from shortcut_masks(s)


def numpy_norm(s: Setup, name: str) -> Terms:
    """reference/layer_norm.py, rms_norm.py: the normalized row and its scale."""
    B, T, C = s.rows, s.length, s.config.emb_dim
    yield Term("norms", f"{name}: h", (B, T, C), s.item)
    yield Term("norms", f"{name}: rstd", (B, T), s.item)


def numpy_inputs(s: Setup, kind: str, i: int, part: str, layers: tuple[str, ...], width: int) -> Terms:
    """reference/linear.py: the input, one array for all that read it; and what their adapters keep."""
    yield Term(kind, f"input of {', '.join(layers)}", (s.rows, s.length, width), s.item)
    yield from numpy_adapters(s, kind, i, part, layers, width)


def numpy_adapters(s: Setup, kind: str, i: int, part: str, layers: tuple[str, ...], width: int) -> Terms:
    """reference/lora.py: u = drop(x) A^T, and the input where dropout made another of it."""
    B, T, lora = s.rows, s.length, s.config.lora
    for layer in layers:
        if lora and s.config.adapts(_name(i, part, layer)):
            yield Term(kind, f"{layer}.lora: u", (B, T, lora.rank), s.item)
            if lora.dropout:
                yield Term(kind, f"{layer}.lora: dropped input", (B, T, width), s.item)
                yield Term("dropout masks", f"{layer}.lora", (B, T, width), 1)


def numpy_attention(s: Setup) -> Terms:
    """reference/attention.py: q, k, v, the probabilities, and what dropout left of them; the heads' result."""
    B, T, H, G, D = s.rows, s.length, s.config.n_heads, s.config.n_kv_heads, s.config.head_dim
    yield Term("attention", "q", (B, H, T, D), s.item)
    seen = sum(T if span.stop is None else span.stop for span in spans(s.config, T, max(1, s.parts // B)))
    scores = sum((rows.stop - rows.start) * keys.stop for *_, rows, keys in attention.blocks((1, 1, 1, T, T), True))
    yield Term("attention", "k", (B, G, seen, D), s.item)  # of each span those before it as well
    yield Term("attention", "v", (B, G, seen, D), s.item)
    yield Term("attention", "p", (B, H, scores), s.item)
    if s.config.attn_dropout:
        yield Term("attention", "dropped p", (B, H, scores), s.item)
        yield Term("dropout masks", "of p", (B, H, T, T), 1)
    yield Term("attention", "y, the output projection's input", (B, T, H, D), s.item)


def numpy_mlp(s: Setup, i: int) -> Terms:
    """reference/gelu.py: x, e or P, y. reference/swiglu.py: gate, up, s, y."""
    B, T, M = s.rows, s.length, s.config.mlp_dim
    gated = s.config.mlp == "swiglu"
    yield from numpy_inputs(s, "MLP", i, "mlp", ("gate", "up") if gated else ("up",), s.config.emb_dim)
    for tensor in ("gate", "up", "s") if gated else ("x", "e or P"):
        yield Term("MLP", tensor, (B, T, M), s.item)
    yield Term("MLP", "y, the down projection's input", (B, T, M), s.item)
    yield from numpy_adapters(s, "MLP", i, "mlp", ("down",), M)


def shortcut_masks(s: Setup) -> Terms:
    """reference/dropout.py: a byte an element. The kernels compute masks again instead."""
    if s.config.shortcut_dropout and s.engine != "triton":
        for branch in ("attention", "MLP"):
            yield Term("dropout masks", f"of the {branch}'s shortcut", (s.rows, s.length, s.config.emb_dim), 1)


def numpy_rest(s: Setup) -> Terms:
    """What is kept outside of the blocks, without logits."""
    yield from embedding_mask(s)
    yield from numpy_norm(s, "final_norm")
    yield from numpy_inputs(s, "head and loss", -1, "", ("head",), s.config.emb_dim)


def embedding_mask(s: Setup) -> Terms:
    if s.config.emb_dropout and s.engine != "triton" and s.first < 0:
        yield Term("dropout masks", "of the embedding", (s.rows, s.length, s.config.emb_dim), 1)


# What autograd keeps, of PyTorch's operators and of the kernels. A product keeps its input only for the gradient of a
# weight that learns, and under autocast a copy of it for each product that reads it.


def torch_block(s: Setup, i: int) -> Terms:
    q_dim, qkv = s.config.n_heads * s.config.head_dim, ("query", "key", "value")
    yield from torch_norm(s, f"blocks.{i}.norm1", i > s.first)
    if attention_learns(s, i):
        yield from torch_inputs(s, "attention projections", i, "attn", qkv, s.config.emb_dim, s.item)
        yield from torch_attention(s, i)
        yield from torch_adapters(s, "attention projections", i, "attn", ("out",), q_dim)
    yield from torch_norm(s, f"blocks.{i}.norm2", attention_learns(s, i))
    yield from torch_mlp(s, i)
    yield from shortcut_masks(s)


def attention_learns(s: Setup, i: int) -> bool:
    """Whether anything before block i's shortcut behind its attention does."""
    return i > s.first or any(name.startswith((f"blocks.{i}.norm1.", f"blocks.{i}.attn.")) for name in s.learns)


def torch_norm(s: Setup, name: str, reached: bool) -> Terms:
    """The operator's input, and a number or two a row. PyTorch's rms_norm on the CPU is several operators, of which the
    last keeps the normalized row for its weight's gradient. `reached`: whether something before it learns."""
    B, T, C = s.rows, s.length, s.config.emb_dim
    learns = f"{name}.weight" in s.learns
    short = name.rpartition(".")[2]
    if reached or learns:
        yield Term("norms", f"{short}: x", (B, T, C), s.item)
        yield Term("norms", f"{short}: mean, rstd", (B, T, 2 if s.config.norm == "layer_norm" else 1), max(4, s.item))
    if learns and s.config.norm == "rms_norm" and s.engine == "torch" and s.device == "cpu":
        yield Term("norms", f"{short}: h", (B, T, C), s.item)


def torch_inputs(
    s: Setup, kind: str, i: int, part: str, layers: tuple[str, ...], width: int, size: int, shared: bool = False
) -> Terms:
    """The input of linear layers, of numbers of `size` bytes, and what their adapters keep. `shared`: it is kept by
    what made it as well."""
    adapted = [layer for layer in layers if s.config.adapts(_name(i, part, layer))]
    readers = [layer for layer in layers if f"{_name(i, part, layer)}.weight" in _with_tied(s)]
    if s.config.lora and not s.config.lora.dropout:
        readers += [f"{layer}.lora" for layer in adapted]
    if size != s.low:  # autocast casts it for each
        for reader in readers:
            yield Term(kind, f"input of {reader}", (s.rows, s.length, width), s.low)
    elif readers and not shared:
        yield Term(kind, f"input of {', '.join(readers)}", (s.rows, s.length, width), s.low)
    yield from torch_adapters(s, kind, i, part, layers, width)


def torch_adapters(s: Setup, kind: str, i: int, part: str, layers: tuple[str, ...], width: int) -> Terms:
    """gpt/ops.py, lora: the dropped input and its mask, and u, which B's gradient needs."""
    B, T, lora = s.rows, s.length, s.config.lora
    for layer in layers:
        if lora and s.config.adapts(_name(i, part, layer)):
            yield Term(kind, f"{layer}.lora: u", (B, T, lora.rank), s.low)
            if lora.dropout:
                yield Term(kind, f"{layer}.lora: dropped input", (B, T, width), s.low)
                yield Term("dropout masks", f"{layer}.lora", (B, T, width), 1)


def torch_attention(s: Setup, i: int) -> Terms:
    """The fused operator's q, k, v, result and one number a query; or, written out, p and all that dropout makes.

    Written out (gpt/ops.py), grouped keys and values are repeated for each query head. PyTorch's CPU operator gives
    heads in the order of q: after rope that is not the order in which they are joined, which takes a copy.
    """
    B, T, H, G, D = s.rows, s.length, s.config.n_heads, s.config.n_kv_heads, s.config.head_dim
    learns = f"{_name(i, 'attn', 'out')}.weight" in s.learns or (
        s.config.adapts(_name(i, "attn", "out")) and not (s.config.lora and s.config.lora.dropout)
    )
    if written_out(s):
        for tensor in ("q", "k", "v"):
            yield Term("attention", tensor, (B, H, T, D), s.low)
        yield Term("attention", "p", (B, H, T, T), max(4, s.low) if s.device == "cuda" else s.low)
        yield Term("attention", "which keys are seen", (T, T), 1)
        if s.config.attn_dropout:
            yield Term("attention", "dropped p", (B, H, T, T), s.low)
            yield Term("dropout masks", "of p", (B, H, T, T), 1)
    else:
        yield Term("attention", "q", (B, H, T, D), s.low)
        yield Term("attention", "k", (B, G, T, D), s.low)
        yield Term("attention", "v", (B, G, T, D), s.low)
        yield Term("attention", "y", (B, H, T, D), s.low)
        yield Term("attention", "log of the sum of exponentials", (B, H, T), max(4, s.low))
    turned = s.config.position == "rope" and s.engine == "torch" and s.device == "cpu"
    if learns and (written_out(s) or turned):
        yield Term("attention", "y, the output projection's input", (B, T, H, D), s.low)


def written_out(s: Setup) -> bool:
    """Whether attention's scores exist: with dropout in PyTorch's set, and on a GPU where its fused operators do not
    take the numbers (float64, or float32 with grouped heads)."""
    if s.engine == "triton":
        return False
    unfit = s.low == 8 or (s.low == 4 and s.config.n_heads != s.config.n_kv_heads)
    return bool(s.config.attn_dropout) or (s.device == "cuda" and unfit)


def torch_mlp(s: Setup, i: int) -> Terms:
    """GELU's input and output. SwiGLU's gate, up and output, and in PyTorch's set silu(gate)."""
    B, T, M = s.rows, s.length, s.config.mlp_dim
    gated = s.config.mlp == "swiglu"
    layers = ("gate", "up") if gated else ("up",)
    yield from torch_inputs(s, "MLP", i, "mlp", layers, s.config.emb_dim, s.item)
    for tensor in layers if gated else ("x",):
        yield Term("MLP", tensor, (B, T, M), s.low)
    if gated and s.engine == "torch":
        yield Term("MLP", "silu(gate)", (B, T, M), s.low)
    yield from torch_inputs(s, "MLP", i, "mlp", ("down",), M, s.low)


def torch_rest(s: Setup) -> Terms:
    """What is kept outside of the blocks, without logits."""
    yield from embedding_mask(s)
    yield from torch_norm(s, "final_norm", s.first < s.config.n_layers)
    if s.engine == "torch" and s.fuses:
        return  # PyTorch's fused loss needs its input no more
    yield from torch_inputs(s, "head and loss", -1, "", ("head",), s.config.emb_dim, s.item)


# The head's logits and the loss.


class Loss(NamedTuple):
    """Bytes: what is kept until its backward pass; beside it, at most, in the forward pass, in the backward pass, and
    in the head's, when what was kept is gone."""

    kept: int
    forward: int
    backward: int
    head: int


def loss_memory(s: Setup) -> Loss:
    """Cross entropy over the head's logits (N, V), or its addends: log-probabilities, which preferences are made of."""
    if s.fuses:
        return fused_loss(s)
    if s.pairs and s.engine == "numpy":
        return token_logps_loss(s)
    N, V, C = s.rows * s.length, s.config.n_outputs, s.config.emb_dim
    if s.engine == "numpy":  # logits; then their gradient
        logits = N * V * s.item
        return Loss(logits, 0, logits, 0)
    wide = max(4, s.item)
    logits, softmax = N * V * s.low, N * V * wide
    weight = V * C * (s.item + s.low * s.casts) * _head_learns(s)
    added = 3 * logits - softmax if s.config.adapts("head") else 0  # the head's, its adapter's, and their sum
    head = logits + N * C * s.low + weight
    if s.engine == "triton" and not s.pairs:  # kernels/cross_entropy.py keeps logits, under autocast a float32 copy
        return Loss(softmax, max(logits * s.casts, added), softmax, head)
    # log softmax is kept. Forward: logits, and under autocast a float32 copy beside the norm's result, of which it took
    # a copy before. Backward: its gradient, then the logits'.
    forward = logits + (softmax + N * C * s.item) * s.casts
    return Loss(softmax, max(forward, added), 2 * softmax, head)


def token_logps_loss(s: Setup) -> Loss:
    """reference/token_logps.py: of the logits (N, V) a copy of the n rows that count is kept. Forward: the logits, and
    before that, where the head has an adapter, what it adds. Backward: the gradient of the n rows, and that of all."""
    row = s.config.n_outputs * s.item
    N, n = s.rows * s.length, s.rows * min(s.length, s.length if s.counted is None else s.counted)
    forward = max(N, 2 * N - n) if s.config.adapts("head") else N
    return Loss(n * row, forward * row, (n + N) * row, 0)


def fused_loss(s: Setup) -> Loss:
    """Gradients are computed with the loss, a chunk of the logits at a time: dx (N, C) and dweight (V, C) are kept."""
    N, V, C = s.rows * s.length, s.config.n_outputs, s.config.emb_dim
    if s.engine == "numpy":
        rows, weight = min(-(-N // s.parts), max(1, linear_cross_entropy.CHUNK // V)), V * C * s.item
        dx, more = N * C * s.item, (s.parts - 1) * weight  # each part has a dweight of its own
        return Loss(dx + weight + more, s.parts * (2 * rows * V * s.item + weight), dx + more, dx)
    chunk = -(-max(1, min(LOGITS // V, -(-N // 4))) // 64) * 64 * V
    wide = max(4, s.item)
    if s.engine == "triton":
        dx, weight = N * C * s.low, V * C
        product = weight * wide * s.casts  # of a chunk, before it is added to dweight
        scaled = weight * (wide + s.low * s.casts)  # dweight times dloss / count, and in the weight's type
        return Loss(dx + weight * wide, chunk * s.low + product, scaled, dx + weight * s.item)
    dx, weight = N * C * wide, V * C * _head_learns(s)
    casts = V * C * (s.low + 2 * wide) * s.casts  # the head, on a CPU its rounded numbers in float32, and a product
    return Loss(dx + weight * wide, 2 * chunk * wide + casts, dx + weight * wide, dx + weight * s.item)


# Altogether.


@dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    parameters: int
    gradients: int
    moments: int
    gathered: int  # of parameters that are shared (fsdp): what is whole at one time
    copies: int  # of weights, in autocast's type
    activations: dict[str, int]  # by kind: what the forward pass keeps
    phases: dict[str, int]  # what there is at most in each
    listed: dict[str, int]  # what of the above is there in each

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def at_work(self) -> int:
        """What there is at the peak beside what is listed above and there at that moment: what is being computed."""
        phase = max(self.phases, key=lambda name: self.phases[name])
        return self.peak - self.listed[phase]


BLOCK: dict[str, Callable[[Setup, int], Terms]] = {
    "numpy": numpy_block,
    "torch": torch_block,
    "triton": torch_block,
}
REST: dict[str, Callable[[Setup], Terms]] = {"numpy": numpy_rest, "torch": torch_rest, "triton": torch_rest}


def activations(s: Setup, i: int) -> list[Term]:
    """Every tensor that the forward pass keeps of block i."""
    return list(BLOCK[s.engine](s, i)) if i >= s.first else []


def memory(s: Setup) -> Memory:
    """What a training step takes at most, the first apart, in which NumPy's gradients come to be."""
    n_layers = s.config.n_layers
    blocks = [activations(s, i) for i in range(n_layers)]
    differentiated = [block for block in blocks if block]
    last = differentiated[-1] if differentiated else []
    again = s.checkpoint_activations
    if again:
        inputs = s.rows, s.length, s.config.emb_dim
        differentiated = [[Term("norms", "the block's input", inputs, s.item)] for _ in differentiated]
    kept = [term for block in differentiated for term in block]
    kept_in_blocks = sum(term.bytes for term in kept)
    rest = list(REST[s.engine](s))
    loss = loss_memory(s)
    by_kind = {kind: sum(term.bytes for term in kept + rest if term.kind == kind) for kind in KINDS}
    by_kind["head and loss"] += loss.kept

    parameters = s.count(s.shapes) * s.item // s.shards
    gradients = s.count(s.learns) * s.item // s.shards
    moments, gathered, copies = 2 * gradients, _gathered(s), _copies(s)
    stays = s.engine == "numpy" or s.accumulation > 1 or (s.processes > 1 and s.parallel == "ddp")
    sets = s.parts if s.apart else 1  # each process has gradients of its own
    lasting = parameters + moments + gathered + gradients * sets * stays
    kept_in_rest = sum(term.bytes for term in rest)
    everything = lasting + kept_in_blocks + kept_in_rest + loss.kept
    recomputed = sum(term.bytes for term in last if term.tensor != "norm1: x") * again  # x is kept: the block's input
    copies_later = _copies(s, "head") if again else copies
    copies_again = _copies(s, "block") if again else copies
    listed = {"forward": everything + copies, "loss": everything + copies_later}
    beside = {"forward": loss.forward, "loss": loss.backward}
    if s.engine == "numpy":
        # A weight's gradient, before it is added; of threads each has one at the same time.
        addends = sets * (s.accumulation > 1) if s.apart else max(s.parts - 1, s.accumulation > 1)
        addend = _largest(s) * addends
        listed["blocks"] = lasting + kept_in_blocks
        beside["blocks"] = loss.head + recomputed + _block_backward(s, last) + addend
        listed["optimizer"] = lasting
        beside["optimizer"] = _joined(s)
    else:
        head = s.config.n_outputs * s.config.emb_dim * s.item * _head_learns(s)
        listed["head"] = everything - loss.kept + copies_later
        beside["head"] = loss.head
        listed["blocks"] = lasting + max(kept_in_blocks, _at_the_first(s, differentiated[:1], stays)) + copies_again
        beside["blocks"] = recomputed + head + _block_backward(s, last)
        listed["end of backward"] = lasting + gradients * (not stays)
        beside["end of backward"] = _end_of_backward(s, stays)
        listed["optimizer"] = parameters + moments + gradients
        beside["optimizer"] = _optimizer(s)
    if s.first > 0:
        listed["frozen blocks"] = lasting
        beside["frozen blocks"] = _frozen_forward(s)
    phases = {phase: listed[phase] + beside[phase] for phase in listed}
    return Memory(parameters, gradients * sets, moments, gathered, copies, by_kind, phases, listed)


def _frozen_forward(s: Setup) -> int:
    """What the forward pass holds in a block of which it keeps nothing, for nothing before it learns.

    In the MLP: the shortcut before and after attention and the norm's result (B, T, C), and what is between the
    matrices (B, T, M). In attention: the shortcut, the norm's result, the heads, q, k and v, in NumPy q times the scale
    as well, and where scores exist all of them (B, H, T, T), in PyTorch before and after the softmax and dropout.
    """
    B, T, C, M = s.rows, s.length, s.config.emb_dim, s.config.mlp_dim
    H, G, D = s.config.n_heads, s.config.n_kv_heads, s.config.head_dim
    gated = s.config.mlp == "swiglu"
    if s.engine == "numpy":
        between, of_heads = 4 if gated else 3, (3 * H + 2 * G) * D
        scores = sum(term.bytes for term in numpy_attention(s) if term.tensor.endswith("p"))
    else:
        between, of_heads = (4 if s.engine == "torch" else 3) if gated else 2, (2 * H + 2 * G) * D
        scores = 4 * B * H * T * T * s.low * written_out(s)
    cast = (B * T * C + M * C) * s.low * s.casts  # the norm's result and a matrix
    mlp = 3 * B * T * C * s.item + between * B * T * M * s.low + cast
    if s.engine == "numpy" and s.config.mlp == "gelu":  # the normal distribution's function, a piece at a time
        mlp += 5 * min(B * T * M, s.parts * pieces.PIECE) * s.item
    return max(mlp, 2 * B * T * C * s.item + B * T * of_heads * s.low + scores)


def _joined(s: Setup) -> int:
    """What NumPy's AdamW makes of small parameters, which it updates as one: they, both moments, gradients, a term."""
    sizes = (math.prod(s.shapes[name]) for name in s.learns)
    among = s.parts if s.apart else 1  # each process updates its rows
    return 5 * s.item * sum(size for size in sizes if size // among < optim.SMALL)


def _at_the_first(s: Setup, kept: list[list[Term]], stays: bool) -> int:
    """When autograd comes to the first block: what is kept of it, and the gradients of the blocks behind it."""
    first = max(0, s.first)
    behind = (name for name in s.learns if name.startswith("blocks.") and int(name.split(".")[1]) > first)
    of_first = sum(term.bytes for block in kept for term in block)
    return of_first + s.count(behind) * s.item // s.shards * (not stays)


def _block_backward(s: Setup, block: list[Term]) -> int:
    """What the backward pass of a block holds beside what was kept: gradients of its tensors, at the largest moment.

    In the MLP: of the shortcut (B, T, C), the branch's result (B, T, C), and its hidden entries (B, T, M), before and
    after the activation, of two where it is gated. In attention: of the shortcut, the heads (B, H, T, D), q, k and v,
    and where scores exist of p (B, H, T, T), in PyTorch with and without dropout and before the softmax, in NumPy of a
    block of them. Layers free what they kept: the down projection's input is gone by then, and in attention all that
    the MLP kept; and with autograd shortcut and branch have one gradient, if it is of one type.
    """
    B, T, C, M = s.rows, s.length, s.config.emb_dim, s.config.mlp_dim
    H, G, D = s.config.n_heads, s.config.n_kv_heads, s.config.head_dim
    if not block:
        return 0
    gates = 2 if s.config.mlp == "swiglu" else 1
    streams = B * T * C * (s.item if s.engine != "numpy" and not s.casts else s.item + s.low)
    mlp = streams + B * T * (1 + gates) * M * s.low
    if s.config.adapts("down"):  # the input is there until its two gradients are, which become one
        mlp = streams + 2 * B * T * M * s.low
    else:
        mlp -= sum(term.bytes for term in block if _of_down(term))
    if s.engine == "numpy":  # of a block, in each part
        scores = s.parts * min(B * H * T * T, max(pieces.PIECE, H // G * attention.rows_at_once(T) * T))
    else:
        scores = 3 * B * H * T * T * (s.engine == "torch" and written_out(s))
    heads = streams + (B * T * (2 * H + 2 * G) * D + scores) * s.low
    gone = sum(term.bytes for term in block if term.kind == "MLP")
    return max(mlp, heads - gone)


def _of_down(term: Term) -> bool:
    return term.kind == "MLP" and (term.tensor.startswith("input of down") or "down projection's" in term.tensor)


def _end_of_backward(s: Setup, stays: bool) -> int:
    """Beside the gradients, when the embedding's is there: of a tied head two parts become a third, their sum."""
    if "tok_emb.weight" not in s.learns:
        return 0
    table = s.config.vocab_size * s.config.emb_dim * s.item
    if s.shards > 1:  # whole in each process, before they are added up: what is outside of the blocks, and a copy of it
        outside = s.count(name for name in s.learns if not name.startswith("blocks."))
        return 2 * outside * s.item + 2 * table * s.config.tie_embeddings
    return (2 * s.config.tie_embeddings + stays) * table


def _optimizer(s: Setup) -> int:
    """PyTorch's AdamW on a CPU: sqrt(v) and its quotient, of a parameter; on a GPU sqrt(v) of all at once."""
    if s.device == "cuda":
        return s.count(s.learns) * s.item // s.shards
    return 2 * _largest(s) // s.shards


def _largest(s: Setup) -> int:
    """Bytes of the largest parameter that learns."""
    return max((math.prod(s.shapes[name]) for name in s.learns), default=0) * s.item


def _copies(s: Setup, of: str = "") -> int:
    """Bytes of the weights that autocast has cast: those that learn, for as long as the forward pass goes on, and those
    that gradients pass through, which nothing keeps where they will pass through what is computed again.

    `of`: the "head" alone, or a "block", computed again.
    """
    if not s.casts or s.engine == "numpy":
        return 0

    def is_cast(name: str) -> bool:
        layer = name.rpartition(".")[0]
        if layer in ("head", "tok_emb", "pos_emb"):
            return layer == _head(s) and of != "block" and not (s.engine == "torch" and s.fuses)
        if of == "head" or "norm" in layer or (s.checkpoint_activations and not of and name not in s.learns):
            return False
        return int(name.split(".")[1]) >= (s.config.n_layers - 1 if of == "block" else max(0, s.first))

    return s.count(name for name in s.shapes if is_cast(name)) * s.low


def _gathered(s: Setup) -> int:
    """FSDP: what is outside of the blocks is whole from the forward pass on, and so are a block and the next."""
    if s.shards == 1:
        return 0
    names = list(s.shapes)
    outside = s.count(name for name in names if not name.startswith("blocks."))
    block = s.count(name for name in names if name.startswith("blocks.0."))
    return (outside + min(2, s.config.n_layers) * block) * s.item


def _head_learns(s: Setup) -> bool:
    return f"{_head(s)}.weight" in s.learns


def _head(s: Setup) -> str:
    return "tok_emb" if s.config.tie_embeddings else "head"


def _with_tied(s: Setup) -> frozenset[str]:
    """The weights that learn, a tied head by its own name as well."""
    return s.learns | {"head.weight"} if _head_learns(s) else s.learns


def _name(i: int, part: str, layer: str) -> str:
    return f"blocks.{i}.{part}.{layer}" if part else layer


# What fits.


def largest_batch(s: Setup, free: float) -> int:
    """The most examples of a micro-batch, a multiple of the processes, whose peak is within `free` bytes; 0 if none."""

    def fits(rows: int) -> bool:
        return memory(replace(s, batch_size=rows * s.processes)).peak <= free

    def most_from(rows: int) -> int:
        step = rows
        while rows + step <= MOST_ROWS and fits(rows + step):
            rows += step
            step = rows
        while step := step // 2:
            if rows + step <= MOST_ROWS and fits(rows + step):
                rows += step
        while rows < MOST_ROWS and fits(rows + 1):  # where the loss becomes fused on the way, more rows may take less
            rows += 1
        return rows

    most = most_from(1) if fits(1) else 0
    logits = s.length * s.config.n_outputs  # of a row; from so many rows on the loss takes less than with one row less
    fused = max(FUSED_ABOVE[s.engine] // logits, FUSED_TOKENS[s.engine] * s.config.emb_dim // s.length) + 1
    if fused > most and fits(fused):
        most = most_from(fused)
    return most * s.processes


def fitting(s: Setup, free: float) -> tuple[int, int]:
    """A micro-batch that fits and how many of them make as many examples a step; (0, 0) where none fits.

    Where only one fits, whose gradients leave no room for another's, it is that one.
    """
    asked = s.batch_size * s.accumulation
    alone = largest_batch(s, free)
    if not 0 < alone < asked:
        return min(alone, asked), min(alone, 1)
    most = largest_batch(replace(s, accumulation=max(2, s.accumulation)), free)
    if not most:
        return alone, 1
    accumulation = -(-asked // most)
    return -(-asked // accumulation), accumulation


def require_memory(s: Setup, free: float) -> None:
    """UserError, which says what would fit, where a step takes more than the `free` bytes of each device."""
    needed = memory(s).peak
    if needed <= free:
        return
    begin = (
        f"memory: batch_size {s.batch_size}{' pairs' if s.pairs else ''} of {s.length} tokens needs {size_text(needed)}"
        f"{' in each process' if s.processes > 1 else ''}, and {size_text(free)} is free; "
    )
    rows, accumulation = fitting(s, free)
    if rows:
        several = f", with accumulation {accumulation} for as many tokens a step" if accumulation > 1 else ""
        raise UserError(f"{begin}batch_size {rows} fits{several}{_with_checkpoints(s, free, rows)}")
    raise UserError(f"{begin}no batch fits{_what_helps(s, free)}")


def _with_checkpoints(s: Setup, free: float, rows: int) -> str:
    if s.checkpoint_activations:
        return ""
    more, _ = fitting(replace(s, checkpoint_activations=True), free)
    return f"; with checkpoint_activations batch_size {more}" if more > rows else ""


def _what_helps(s: Setup, free: float) -> str:
    again = replace(s, checkpoint_activations=True)
    if not s.checkpoint_activations and (rows := fitting(again, free)[0]):
        return f"; with checkpoint_activations batch_size {rows} does"
    shared = replace(s, parallel="fsdp", checkpoint_activations=True)
    if s.engine != "numpy" and s.parallel == "ddp" and s.processes > 1 and (rows := fitting(shared, free)[0]):
        return f"; with parallel fsdp and checkpoint_activations batch_size {rows} does"
    shorter = replace(s, length=max(1, s.length // 8), batch_size=s.processes, checkpoint_activations=True)
    if memory(shorter).peak <= free:
        return "; a shorter max_length or a smaller model would"
    return "; a smaller model would, or more processes with parallel fsdp on GPUs of their own"


def size_text(size: float) -> str:
    """Bytes as people read them."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 1000 * factor else f"{size / factor:,.0f} {unit}"
    return f"{size / 2**10:.3g} KiB"

"""PyTorch's CPU random stream in NumPy, bit for bit: MT19937 (Matsumoto and Nishimura 1998) and what becomes of it.

Everything is drawn from one stream of 32-bit words. Two words, the first one high, make a 64-bit word. What a draw
takes, element after element in row-major order, and what it gives (PyTorch 2.13, aten/src/ATen/native/cpu):

    rand, uniform, float32    1 word    (word mod 2^24) / 2^24, then fma(u, high - low, low)
    rand, uniform, float64    2 words   (word mod 2^53) / 2^53, likewise; in all that follows this is "a double"
    normal, 16 or more        as rand   Box and Muller 1958 in blocks of 16: 8 radii and 8 angles give 8 cosines and
                                        8 sines; if 16 does not divide the count, the last 16 are drawn again
    normal, fewer than 16     2 doubles for two values: the sine waits, even across calls, and is part of the state
    keep_mask (dropout)       1 double  kept when u < 1 - rate; nothing is drawn for rate 0 or 1
    exponential               1 double  -log(1 - u) / rate
    multinomial               V doubles a row: the largest probs / exponential win;
                              with replacement and more than one sample 1 double a sample, looked up in cumulated probs
    randint                   1 word    low + word mod (high - low); 2 words if high - low >= 2^28
    randint64                 2 words   word mod 2^63
    randperm                  n - 1     Fisher and Yates from the front: swap i with i + word mod (n - i)

The float32 normal comes out exact because logarithm, sine and cosine are evaluated as PyTorch's AVX2 code does: Cephes'
polynomials in float32 with fused multiply-adds. Exponentials, and normals of 16 or more in float64, take NumPy's own
functions: in float64 their last bits may differ. PyTorch itself rounds the float32 normal otherwise, by some 1e-7, on a
CPU without AVX2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

Shape: TypeAlias = int | Sequence[int]

_PIECE = 1 << 14  # elements drawn at once, a multiple of 16: temporaries stay in cache, and small
_RANDPERM_LIMIT = (2**32 - 1) // 20  # from here on PyTorch draws 64-bit words
_MT_WORDS = 624


class Generator:
    """`torch.Generator().manual_seed(seed)`: the same draws in the same order give the same numbers.

    A shape is an int or a sequence of ints, a dtype float32 or float64. A bad argument raises ValueError with its name.
    """

    def __init__(self, seed: int) -> None:
        """Only the low 32 bits of `seed` count, as in PyTorch."""
        self._mt = np.random.RandomState(seed & 0xFFFFFFFF)
        self._next_normal: float | None = None

    def rand(self, shape: Shape, dtype: DTypeLike = np.float32) -> np.ndarray:
        """Uniform on [0, 1), like torch.rand."""
        return self.uniform(shape, dtype=dtype)

    def uniform(self, shape: Shape, low: float = 0.0, high: float = 1.0, dtype: DTypeLike = np.float32) -> np.ndarray:
        """Uniform on [low, high), like Tensor.uniform_."""
        if not low <= high:
            raise ValueError(f"low: expected low <= high, got {low} and {high}")
        out = _empty(shape, dtype)
        low, high = out.dtype.type(low), out.dtype.type(high)
        for piece in _pieces(out):
            piece[:] = _fma(self._unit(piece.size, out.dtype), high - low, low)
            piece[piece == high] = low  # reached by rounding
        return out

    def normal(self, shape: Shape, mean: float = 0.0, std: float = 1.0, dtype: DTypeLike = np.float32) -> np.ndarray:
        """Normal, like torch.randn and Tensor.normal_."""
        if not std >= 0:
            raise ValueError(f"std: expected std >= 0, got {std}")
        out = _empty(shape, dtype)
        flat = out.reshape(-1)
        if flat.size < 16:
            standard = np.array([self._small_normal() for _ in flat])
            flat[:] = _fma(standard, np.float64(std), np.float64(mean))
            return out
        mean, std = out.dtype.type(mean), out.dtype.type(std)
        whole = flat[: flat.size - flat.size % 16]
        for piece in _pieces(whole):
            piece[:] = _fma(_box_muller(self._unit(piece.size, out.dtype)), std, mean)
        if whole.size < flat.size:
            self._unit(flat.size - whole.size, out.dtype)
            flat[-16:] = _fma(_box_muller(self._unit(16, out.dtype)), std, mean)
        return out

    def exponential(self, shape: Shape, rate: float = 1.0, dtype: DTypeLike = np.float32) -> np.ndarray:
        """Exponential with mean 1 / rate, like Tensor.exponential_."""
        if not rate > 0:
            raise ValueError(f"rate: expected rate > 0, got {rate}")
        out = _empty(shape, dtype)
        for piece in _pieces(out):
            piece[:] = -1 / rate * np.log1p(-self._unit(piece.size, np.float64))
        return out

    def keep_mask(self, shape: Shape, rate: float) -> np.ndarray:
        """Which elements torch.nn.functional.dropout keeps: bool."""
        if not 0 <= rate <= 1:
            raise ValueError(f"rate: expected 0 <= rate <= 1, got {rate}")
        if rate in (0, 1):
            return np.full(shape, rate == 0)
        out = _empty(shape, bool)
        for piece in _pieces(out):
            np.less(self._unit(piece.size, np.float64), 1 - rate, out=piece)
        return out

    def multinomial(self, probs: np.ndarray, num_samples: int = 1, replacement: bool = False) -> np.ndarray:
        """Indices drawn with probability proportional to probs, like torch.multinomial.

        probs (V,) or (B, V), float32 or float64, not negative -> (num_samples,) or (B, num_samples) int64.
        """
        probs = np.asarray(probs)
        if probs.ndim not in (1, 2):
            raise ValueError(f"probs: expected shape (V,) or (B, V), got {probs.shape}")
        total = probs.sum(axis=-1)
        if not (np.all(probs >= 0) and np.all(total > 0) and np.all(np.isfinite(total))):
            raise ValueError("probs: expected finite numbers >= 0 with a positive sum in each row")
        if num_samples < 1 or (num_samples > probs.shape[-1] and not replacement):
            raise ValueError(
                f"num_samples: expected at least 1, without replacement at most {probs.shape[-1]}, got {num_samples}"
            )
        if replacement and num_samples > 1:
            return self._multinomial_with_replacement(probs, num_samples)
        race = probs / self.exponential(probs.shape, dtype=probs.dtype)
        if num_samples == 1:
            return np.argmax(race, axis=-1, keepdims=True)
        return np.argsort(-race, axis=-1, kind="stable")[..., :num_samples]

    def randint(self, low: int, high: int, shape: Shape) -> np.ndarray:
        """Integers in low .. high - 1, int64, like torch.randint."""
        if not low < high:
            raise ValueError(f"low: expected low < high, got {low} and {high}")
        words = (self._words if high - low < 1 << 28 else self._words64)(_size(shape))
        return (words % np.uint64(high - low)).astype(np.int64).reshape(shape) + low

    def randint64(self) -> int:
        """An integer in 0 .. 2**63 - 1, like `random_()` on an int64 tensor. PyTorch's data loaders draw seeds so."""
        return int(self._words64(1)[0]) & (2**63 - 1)

    def randperm(self, n: int) -> np.ndarray:
        """A permutation of 0 .. n - 1, (n,) int64, like torch.randperm."""
        if not 0 <= n < _RANDPERM_LIMIT:
            raise ValueError(f"n: expected 0 <= n < {_RANDPERM_LIMIT}, got {n}")
        offsets = self._words(max(0, n - 1)) % np.arange(n, 1, -1, dtype=np.uint32)
        order = list(range(n))
        for i, offset in enumerate(offsets.tolist()):
            j = i + offset
            order[i], order[j] = order[j], order[i]
        return np.array(order, dtype=np.int64)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON can hold it: MT19937's words in hexadecimal, position, waiting normal."""
        _, words, position, _, _ = self._mt.get_state()
        words = np.asarray(words, dtype=">u4").tobytes().hex()
        return {"words": words, "position": int(position), "next_normal": self._next_normal}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `state()` was asked."""
        try:
            words = np.frombuffer(bytes.fromhex(state["words"]), dtype=">u4").astype(np.uint32)
            position, next_normal = state["position"], state["next_normal"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state: expected what Generator.state() gave, got {error!r}") from error
        if words.size != _MT_WORDS or not 0 <= position <= _MT_WORDS:
            raise ValueError(f"state: expected {_MT_WORDS} words and a position, got {words.size} and {position}")
        self._mt.set_state(("MT19937", words, position, 0, 0.0))
        self._next_normal = next_normal

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Generator:
        """A generator that stands where `state()` was asked."""
        generator = cls(0)
        generator.set_state(state)
        return generator

    def _words(self, n: int) -> np.ndarray:
        """The next n words of the stream, uint32."""
        return self._mt.randint(0, 1 << 32, n, dtype=np.uint32)

    def _words64(self, n: int) -> np.ndarray:
        high, low = self._words(2 * n).reshape(n, 2).T.astype(np.uint64)
        return high << 32 | low

    def _unit(self, n: int, dtype: DTypeLike) -> np.ndarray:
        """n numbers on [0, 1) with as many random bits as the dtype has."""
        if dtype == np.float32:
            return (self._words(n) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
        return (self._words64(n) & (2**53 - 1)) * 2.0**-53

    def _small_normal(self) -> float:
        """One of fewer than 16 normals: the cosine of a pair of doubles, or the sine that waited since the last one."""
        value, self._next_normal = self._next_normal, None
        if value is None:
            u1, u2 = self._unit(2, np.float64).tolist()
            radius, angle = math.sqrt(-2 * math.log1p(-u2)), 2 * math.pi * u1
            value, self._next_normal = radius * math.cos(angle), radius * math.sin(angle)
        return value

    def _multinomial_with_replacement(self, probs: np.ndarray, num_samples: int) -> np.ndarray:
        rows = np.atleast_2d(probs).cumsum(axis=-1)
        rows /= rows[:, -1:].copy()
        u = self.rand((len(rows), num_samples), np.float64)
        picks = np.stack([np.searchsorted(row, draw) for row, draw in zip(rows, u, strict=True)])
        return picks.reshape(*probs.shape[:-1], num_samples)


class StreamNoise:
    """Dropout's noise as PyTorch draws it: the next elements of the generator's stream, in the order of the calls."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def __call__(self, layer: int, site: int, shape: Sequence[int], rate: float) -> np.ndarray:
        """The keep mask, bool array of `shape`, drawn now. `layer` and `site` play no part."""
        return self.generator.keep_mask(shape, rate)


def _size(shape: Shape) -> int:
    return math.prod(shape) if isinstance(shape, Sequence) else shape


def _empty(shape: Shape, dtype: DTypeLike) -> np.ndarray:
    if np.dtype(dtype) not in (np.float32, np.float64, bool):
        raise ValueError(f"dtype: expected float32 or float64, got {dtype}")
    return np.empty(shape, dtype)


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """Views of consecutive runs of a contiguous array's elements."""
    flat = array.reshape(-1)
    return (flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE))


def _box_muller(u: np.ndarray) -> np.ndarray:
    """Uniforms (16 k,) -> standard normals (16 k,), like u: each block of 16 is 8 radii and 8 angles."""
    u = u.reshape(-1, 2, 8)
    to_radius, turn = 1 - u[:, 0], u[:, 1]
    if u.dtype == np.float32:
        log, (sin, cos) = _log(to_radius), _sincos(np.float32(2 * np.pi) * turn)
    else:
        log, sin, cos = np.log(to_radius), np.sin(2 * np.pi * turn), np.cos(2 * np.pi * turn)
    radius = np.sqrt(-2 * log)
    return np.stack([radius * cos, radius * sin], axis=1).reshape(-1)


# Single-precision functions of Cephes (Moshier 1989: logf, sinf, cosf), each multiply-add fused as in PyTorch's build.
_LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # they sum to log(2)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_QUARTER_PI = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)  # they sum to pi / 4


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of float32 in (0, 1]: x = 2^e (1 + m), -0.3 < m < 0.42, log(1 + m) = m - m^2/2 + m^3 P(m)."""
    fraction, e = np.frexp(x)  # fraction in [1/2, 1)
    small = fraction < np.float32(math.sqrt(0.5))
    m = np.where(small, 2 * fraction - 1, fraction - 1)
    e = (e - small).astype(np.float32)
    m2 = m * m
    y = _fma(_polynomial(_LOG, m) * m, m2, e * np.float32(_LN2_LOW))
    return _fma(e, _LN2_HIGH, m + _fma(m2, -0.5, y))


def _sincos(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sine and cosine of float32 in [0, 2 pi]: reduced to |r| <= pi / 4 about the nearest multiple of pi / 2."""
    eighths = ((x * np.float32(4 / np.pi)).astype(np.int32) + 1) & ~1
    r, y = x, eighths.astype(np.float32)
    for part in _QUARTER_PI:
        r = _fma(y, -part, r)
    r2 = r * r
    sin = _fma(_polynomial(_SIN, r2) * r2, r, r)
    cos = _fma(_polynomial(_COS, r2) * r2, r2, np.float32(-0.5) * r2) + 1
    odd = eighths & 2 != 0  # an odd multiple of pi / 2 swaps them
    sin, cos = np.where(odd, cos, sin), np.where(odd, sin, cos)
    return np.where(eighths & 4 != 0, -sin, sin), np.where((eighths + 2) & 4 != 0, -cos, cos)


def _polynomial(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    """Horner's rule, highest power first."""
    y = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = _fma(y, x, c)
    return y


def _fma(x: np.ndarray, y: np.ndarray | float, z: np.ndarray | float) -> np.ndarray:
    """x y + z, rounded once, in the dtype of x (y and z are first rounded to it)."""
    y, z = np.asarray(y, x.dtype), np.asarray(z, x.dtype)
    if x.dtype == np.float32:  # float64 holds the product exactly; rounding its sum again matters once in some 2^29
        return (np.multiply(x, y, dtype=np.float64) + z).astype(np.float32)
    product, product_error = _two_product(x, y)
    total = product + z
    z_part = total - product
    sum_error = (product - (total - z_part)) + (z - z_part)
    return total + (sum_error + product_error)


def _two_product(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 x y and its rounding error (Dekker 1971)."""
    (x_high, x_low), (y_high, y_low) = _split(x), _split(y)
    product = x * y
    return product, ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low


def _split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 as a sum of two halves of 26 bits (Veltkamp 1968)."""
    scaled = x * (2.0**27 + 1)
    high = scaled - (scaled - x)
    return high, x - high

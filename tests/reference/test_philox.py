import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import philox

# Random123's known answers for philox4x32-10: counter, key (low word first), result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

shapes = st.lists(st.integers(1, 5), max_size=2).flatmap(
    lambda lead: st.tuples(*(st.just(n) for n in lead), st.integers(1, 7), st.integers(1, 11))
)
keys = st.integers(0, 2**64 - 1)
rates = st.floats(0, 0.99)


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_known_answers(counter, key, result):
    low, high = words(key)
    assert [int(word) for word in philox.philox(words(counter), high << 32 | low)] == words(result)


def test_counters_broadcast_like_single_ones():
    c0, c1 = np.arange(5, dtype=np.uint32), np.array([[7], [2**32 - 1]])
    together = np.stack(philox.philox((c0, c1, 3, 4), key=99))
    assert together.dtype == np.uint32
    assert together.shape == (4, 2, 5)
    for i in range(2):
        for j in range(5):
            single = philox.philox((int(c0[j]), int(c1[i, 0]), 3, 4), key=99)
            np.testing.assert_array_equal(together[:, i, j], np.stack(single))


TRITON_PROGRAM = """
import json, sys
import torch, triton
import triton.language as tl

@triton.jit
def words(c, r, n_low, n_high, seed, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b, c, d = tl.philox(seed, tl.load(c + i), tl.load(r + i), tl.load(n_low + i), tl.load(n_high + i))
    tl.store(out + i, a)
    tl.store(out + SIZE + i, b)
    tl.store(out + 2 * SIZE + i, c)
    tl.store(out + 3 * SIZE + i, d)

@triton.jit
def words_of_offset(seed, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b, c, d = tl.randint4x(seed, i)
    tl.store(out + i, a)
    tl.store(out + SIZE + i, b)
    tl.store(out + 2 * SIZE + i, c)
    tl.store(out + 3 * SIZE + i, d)

request = json.load(sys.stdin)
counter = [torch.tensor(c, dtype=torch.uint32) for c in request["counter"]]
size = len(counter[0])
out = torch.empty(2, 4, size, dtype=torch.uint32)
words[(1,)](*counter, request["key"], out[0], SIZE=size)
words_of_offset[(1,)](request["key"], out[1], SIZE=size)
json.dump(out.tolist(), sys.stdout)
"""


def test_triton_computes_the_same_words(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    pytest.importorskip("torch", reason="PyTorch is not installed")
    rng = np.random.default_rng(0)
    size, key = 16, 0xFEDCBA9876543210 >> 1
    counter = rng.integers(0, 2**32, (4, size), dtype=np.uint32)
    program = tmp_path / "program.py"  # Triton reads a kernel's source from its file
    program.write_text(TRITON_PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program)],
        input=json.dumps({"counter": counter.tolist(), "key": key}),
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    of_counter, of_offset = json.loads(done.stdout)
    np.testing.assert_array_equal(np.stack(philox.philox(tuple(counter), key)), of_counter)
    np.testing.assert_array_equal(np.stack(philox.philox((np.arange(size), 0, 0, 0), key)), of_offset)


def test_site_keys_differ_in_every_argument():
    arguments = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 2**32, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    found = [philox.site_key(*a) for a in arguments]
    assert len(set(found)) == len(arguments)
    assert all(0 <= key < 2**64 for key in found)
    word0, word1, _, _ = philox.philox((3, 2, 5, 1), 7)
    assert philox.site_key(seed=7, step=(1 << 32) + 5, layer=2, site=3) == int(word0) + (int(word1) << 32)


@given(shapes, keys, st.integers(0, 2**40), rates)
def test_each_element_is_decided_by_its_own_word(shape, key, first, rate):
    keep = philox.keep_mask((key, first), shape, rate)
    assert keep.dtype == bool
    assert keep.shape == shape
    by_element = np.empty((int(np.prod(shape[:-2])), *shape[-2:]), bool)
    for index, r, c in np.ndindex(by_element.shape):
        n = first + index
        word = philox.philox((c // 4, r, n & 0xFFFFFFFF, n >> 32), key)[c % 4]
        by_element[index, r, c] = int(word) >= min(2**32 - 1, round(rate * 2**32))
    np.testing.assert_array_equal(keep, by_element.reshape(shape))


def test_a_vector_is_one_row():
    np.testing.assert_array_equal(philox.keep_mask((5, 3), (11,), 0.4), philox.keep_mask((5, 3), (1, 11), 0.4)[0])


def test_a_word_at_the_threshold_keeps():
    word = int(philox.philox((0, 0, 0, 0), key=1)[0])
    assert philox.keep_mask((1, 0), (1, 1), word / 2**32)
    assert not philox.keep_mask((1, 0), (1, 1), (word + 1) / 2**32)


@given(st.integers(1, 6), st.integers(0, 6), keys, st.integers(0, 2**33))
def test_micro_batches_see_their_part_of_the_whole_mask(batch, cut, key, first):
    cut = min(cut, batch)
    whole = philox.keep_mask((key, first), (batch, 5, 6), 0.5)
    parts = [philox.keep_mask((key, first + a), (b - a, 5, 6), 0.5) for a, b in ((0, cut), (cut, batch))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_noise_of_a_micro_batch_continues_the_batch():
    def masks(first_example, batch):
        noise = philox.PhiloxNoise(seed=1, step=2, first_example=first_example)
        hidden, heads = (batch, 4, 6), (batch, 3, 4, 4)
        return [
            philox.keep_mask(noise(0, philox.EMBEDDING, hidden, 0.5), hidden, 0.5),
            philox.keep_mask(noise(1, philox.ATTENTION, heads, 0.5), heads, 0.5),
        ]

    for whole, head, tail in zip(masks(0, 5), masks(0, 2), masks(2, 3), strict=True):
        np.testing.assert_array_equal(whole, np.concatenate([head, tail]))


def test_sites_layers_and_steps_have_masks_of_their_own():
    places = [(1, 0, 0, 0), (1, 0, 0, 1), (1, 0, 1, 0), (1, 1, 0, 0), (2, 0, 0, 0)]
    masks = [philox.keep_mask((philox.site_key(*place), 0), (40, 50), 0.5) for place in places]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert 0.45 < np.mean(a == b) < 0.55


def test_masks_larger_than_a_piece_agree_with_their_rows():
    noise, shape = (11, 2**32 - 3), (5, 70, 1030)  # several pieces; the leading index passes 2**32
    keep = philox.keep_mask(noise, shape, 0.3)
    for n, r in ((0, 0), (2, 69), (3, 15), (4, 69)):
        key, first = noise
        index = first + n
        expected = philox.philox((np.arange(1030) // 4, r, index & 0xFFFFFFFF, index >> 32), key)
        word = np.choose(np.arange(1030) % 4, expected)
        np.testing.assert_array_equal(keep[n, r], word >= round(0.3 * 2**32))


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_rate(rate):
    size = 400 * 400
    kept = philox.keep_mask((12345, 0), (400, 400), rate).sum()
    assert abs(kept - (1 - rate) * size) < 5 * np.sqrt(rate * (1 - rate) * size)


def test_rate_0_keeps_all_and_a_mask_is_returned_as_it_is():
    assert philox.keep_mask((1, 0), (3, 4, 5), 0).all()
    mask = np.eye(4, dtype=bool)
    assert philox.keep_mask(mask, (4, 4), 0.5) is mask


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty_shapes(shape):
    assert philox.keep_mask((1, 0), shape, 0.5).shape == shape


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: philox.philox((0, 0, 0, 0), -1), "key"),
        (lambda: philox.philox((0, 0, 0, 2**32), 0), "counter"),
        (lambda: philox.philox((np.array([-1]), 0, 0, 0), 0), "counter"),
        (lambda: philox.philox((0.5, 0, 0, 0), 0), "counter"),
        (lambda: philox.site_key(0, -1, 0, 0), "step"),
        (lambda: philox.site_key(0, 0, -1, 0), "layer"),
        (lambda: philox.keep_mask((0, -1), (2, 2), 0.1), "first"),
        (lambda: philox.keep_mask((0, 0), (2, 2), 1.0), "rate"),
        (lambda: philox.keep_mask((0, 0), (), 0.1), "shape"),
        (lambda: philox.keep_mask(np.ones((2, 3), bool), (3, 2), 0.1), "noise"),
    ],
)
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()

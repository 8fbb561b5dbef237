"""The replayed states are those of a plain computation, and at the end stands ordinary attention's result."""

import base64

import numpy as np
import pytest

from gpt.study.flash import flash_of
from tests.gpt.study.passes import checked_pass, fresh_pass, small_config, tiny_pass


def unpack(packed):
    return np.frombuffer(base64.b64decode(packed["data"]), "<f8").reshape(packed["shape"])


def plain(recording, block, head, tokens):
    """Of one head of the first example: k, v, dy, scores, which of p are kept, and the factor of those."""
    step = recording.step(f"blocks.{block}.attn.heads")
    group = recording.config.n_heads // recording.config.n_kv_heads
    q, dy = (array[0, head, :tokens] for array in (step.arguments["q"], step.dy))
    k, v = (step.arguments[name][0, head // group, :tokens] for name in ("k", "v"))
    s = q @ k.T / np.sqrt(q.shape[1])
    s[np.triu_indices(tokens, 1)] = -np.inf
    keep = step.values["keep"][0, head, :tokens, :tokens] if "keep" in step.values else np.ones_like(s)
    return k, v, dy, s, keep, 1 / (1 - step.values.get("rate", 0.0))


@pytest.mark.parametrize("name, tokens, tile", [("tiny", 21, 4), ("tied", 13, 4), ("llama", 13, 5), ("llama", 7, 3)])
def test_the_states_are_those_of_a_plain_computation(name, tokens, tile):
    recording, _ = tiny_pass() if name == "tiny" else checked_pass(name)
    data = flash_of(recording, tile, tokens)
    config = recording.config
    assert [(one["block"], one["head"]) for one in data["heads"]] == list(np.ndindex(config.n_layers, config.n_heads))
    for one in data["heads"]:
        k, v, dy, s, keep, factor = plain(recording, one["block"], one["head"], tokens)
        states = one["forward"]
        s2 = s / np.log(2)
        for i, ((r, rows), (c, columns)) in enumerate(zip(states["rows"], states["columns"], strict=True)):
            here, so_far = slice(r, r + rows), slice(0, c + columns)
            m = s2[here, so_far].max(axis=1)
            p = np.exp2(s2[here, so_far] - m[:, None])
            np.testing.assert_allclose(
                unpack(states["s"])[i, :rows, :columns], s2[here, c : c + columns], rtol=1e-11, atol=1e-12
            )
            np.testing.assert_allclose(unpack(states["m"])[i, :rows], m, rtol=1e-11, atol=1e-12)
            np.testing.assert_allclose(unpack(states["l"])[i, :rows], p.sum(axis=1), rtol=1e-11)
            np.testing.assert_allclose(unpack(states["p"])[i, :rows, :columns], p[:, c:], rtol=1e-11, atol=1e-300)
            o = (p * keep[here, so_far]) @ v[so_far]
            np.testing.assert_allclose(unpack(states["o"])[i, :rows], o, rtol=1e-10, atol=1e-11)
            assert np.isnan(unpack(states["p"])[i, rows:]).all()
            before = s2[here, :c].max(axis=1) if c else np.full(rows, -np.inf)
            np.testing.assert_allclose(unpack(states["shrink"])[i, :rows], np.exp2(before - m), rtol=1e-11, atol=1e-300)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        y = (p * keep * factor) @ v
        delta = (y * dy).sum(axis=1)
        ds = p * (dy @ v.T * keep * factor - delta[:, None])
        np.testing.assert_allclose(unpack(one["y"]), y, rtol=0, atol=1e-12 * np.abs(y).max())
        np.testing.assert_allclose(unpack(one["delta"]), delta, rtol=0, atol=1e-12 * np.abs(delta).max())
        for loop in ("queries", "keys"):
            states = one[loop]
            own = [i for i, h in enumerate(states["heads"]) if h == one["head"]]
            assert len(own) == len(states["heads"]) if loop == "queries" else own
            for i in own:
                (r, rows), (c, columns) = states["rows"][i], states["columns"][i]
                tile_ds = unpack(states["ds"])[i, :rows, :columns]
                np.testing.assert_allclose(tile_ds, ds[r : r + rows, c : c + columns], rtol=0, atol=1e-12)
        last = {r: i for i, (r, _) in enumerate(one["queries"]["rows"])}
        dq = np.concatenate([unpack(one["queries"]["dq"])[i, : one["queries"]["rows"][i][1]] for i in last.values()])
        np.testing.assert_allclose(dq, ds @ k, rtol=0, atol=1e-12 * np.abs(ds @ k).max())


@pytest.mark.parametrize("name", ["tiny", "untied", "llama", "no-bias"])
def test_it_ends_where_ordinary_attention_does(name):
    recording, _ = tiny_pass(0.1) if name == "tiny" else checked_pass(name)
    data = flash_of(recording)
    for one in data["heads"]:
        step = recording.step(f"blocks.{one['block']}.attn.heads")
        y, dq = step.y[0, one["head"]], step.gradients["q"][0, one["head"]]
        np.testing.assert_allclose(unpack(one["y"]), y, rtol=0, atol=1e-12 * np.abs(y).max())
        states = one["queries"]
        last = {r: i for i, (r, _) in enumerate(states["rows"])}
        total = np.concatenate([unpack(states["dq"])[i, : states["rows"][i][1]] for i in last.values()]) * one["scale"]
        np.testing.assert_allclose(total, dq, rtol=0, atol=1e-12 * np.abs(dq).max())
        states, group = one["keys"], recording.config.n_heads // recording.config.n_kv_heads
        assert set(states["heads"]) == set(range(one["key_head"] * group, (one["key_head"] + 1) * group))
        last = {c: i for i, (c, _) in enumerate(states["columns"])}
        for of, factor in (("k", one["scale"]), ("v", one["factor"])):
            true = step.gradients[of][0, one["key_head"]]
            parts = [unpack(states[f"d{of}"])[i, : states["columns"][i][1]] for i in last.values()]
            np.testing.assert_allclose(factor * np.concatenate(parts), true, rtol=0, atol=1e-12 * np.abs(true).max())
        assert set(one["errors"]) == {"y", "dq", "dk", "dv"}
        assert max(one["errors"].values()) <= 1e-12


def test_tiles_that_no_query_sees_are_left_out():
    recording = fresh_pass(small_config(n_layers=1), length=12)
    one = flash_of(recording, tile=4)["heads"][0]
    tiles = [(r // 4, c // 4) for (r, _), (c, _) in zip(one["forward"]["rows"], one["forward"]["columns"], strict=True)]
    assert tiles == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    keys = [(r // 4, c // 4) for (r, _), (c, _) in zip(one["keys"]["rows"], one["keys"]["columns"], strict=True)]
    assert keys == [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1), (2, 2)]


def test_there_is_room_for_so_many_heads():
    recording, _ = checked_pass("llama")
    few, all_of = flash_of(recording, numbers=1), flash_of(recording, numbers=10**9)
    assert [(one["block"], one["head"]) for one in few["heads"]] == [(0, 0)]
    assert len(all_of["heads"]) == few["of_heads"] == 12
    size = sum(unpack(value).size for one in all_of["heads"] for loop in ("forward", "queries", "keys")
               for value in one[loop].values() if isinstance(value, dict))  # fmt: skip
    some = flash_of(recording, numbers=size // 2)
    assert {one["block"] for one in some["heads"]} == {0, 1}
    assert 3 <= len(some["heads"]) <= 9


def test_one_token():
    one = flash_of(fresh_pass(small_config(), length=1))["heads"][0]
    assert one["forward"]["rows"] == [[0, 1]]
    assert unpack(one["forward"]["p"])[0, 0, 0] == 1
    assert one["errors"]["y"] == 0
    assert max(one["errors"].values()) <= 1e-15  # dq and dk are 0, or what rounding leaves of 0

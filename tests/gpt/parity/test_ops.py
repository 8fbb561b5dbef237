"""The table of operators: what it covers, and that what it draws would show a mistake."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

import reference
from gpt.errors import UserError
from gpt.parity.ops import ROWS, Case, select

EVERY_CASE = [(row, case) for row in ROWS.values() for case in row.cases + row.rounding]
IDS = [f"{row.name} {case}" for row, case in EVERY_CASE]
ATTENTION = [row for row in ROWS.values() if row.layer == "attention"]
ROTARY = [row for row in ROWS.values() if row.layer == "rope"]
CACHED = [row for row in ROWS.values() if row.layer == "cached_attention"]


def shapes(layer: str) -> set[tuple[int, ...]]:
    """The shapes of a layer's first floating-point argument."""
    rows = [row for row in ROWS.values() if row.layer == layer]
    return {row.problem(case).inputs()[row.gradients[0]].shape for row in rows for case in row.cases}


ROW_LAYERS = ["linear", "layer_norm", "add_layer_norm", "gelu", "bias_gelu", "dropout", "cross_entropy"]
ROW_LAYERS += ["rms_norm", "add_rms_norm", "swiglu"]


@pytest.mark.parametrize("layer", [*ROW_LAYERS, "linear_cross_entropy"])
def test_sizes_at_which_kernels_go_wrong_are_in_the_table(layer):
    sizes = shapes(layer)
    ranks = {len(shape) for shape in sizes}
    assert ranks == ({2, 3, 4} if "cross_entropy" in layer else {1, 2, 3, 4})
    assert any(shape[-1] == 1 for shape in sizes), "one column"
    assert any(len(shape) == 2 and shape[0] == 1 for shape in sizes), "one row"
    assert any(min(shape) > 64 and all(n % 2 for n in shape) for shape in sizes), "no multiple of a block"


@pytest.mark.parametrize("row", ATTENTION, ids=lambda row: row.name)
def test_attention_is_checked_at_the_lengths_and_head_dimensions_around_a_block(row):
    lengths, dims = ({case.size[i] for case in row.cases} for i in (3, 5))
    assert lengths >= {1, 2, 63, 64, 65, 127}
    assert {case.size[5] for case in row.cases + row.rounding} >= {32, 54, 64, 96, 128}
    assert 1 in dims


def test_attention_is_checked_grouped_causal_or_not_with_a_past_and_with_queries_that_see_nothing():
    cases = [case.size for row in ATTENTION for case in row.cases]
    assert any(1 < G < H for _, H, G, *_ in cases)
    assert any(1 == G < H for _, H, G, *_ in cases)
    causal = {row.name: row.problem(row.cases[0]).arguments["causal"] for row in ATTENTION}
    assert set(causal.values()) == {True, False}
    past = [case.size for case in ROWS["attention-past"].cases]
    assert causal["attention-past"]
    assert any(S > T for _, _, _, T, S, _ in past)
    assert any(S < T for _, _, _, T, S, _ in past), "the first queries see no key"


@pytest.mark.parametrize("row", CACHED, ids=lambda row: row.name)
def test_a_cache_is_checked_with_rows_of_all_lengths_around_blocks_and_splits(row):
    assert {case.size[3] for case in row.cases} >= {1, 3, 17}
    assert {case.size[4] for case in row.cases} >= {1, 63, 64, 65, 127, 300}
    assert {case.size[5] for case in row.cases} >= {1, 15, 32, 54, 64, 96, 128}
    for case in row.cases:
        (B, _, _, T, S, _), starts = case.size, row.problem(case).arguments["starts"]
        assert starts.min() == (0 if B > 1 else S - T)
        assert starts.max() == S - T
    assert any(len(set(row.problem(case).arguments["starts"].tolist())) > 3 for case in row.cases)


@pytest.mark.parametrize("row", ROTARY, ids=lambda row: row.name)
def test_rotary_positions_are_checked_at_the_lengths_and_head_dimensions_around_a_block(row):
    lengths, dims = ({case.size[i] for case in row.cases} for i in (2, 3))
    assert lengths >= {1, 2, 63, 64, 65, 127}
    assert dims >= {2, 32, 54, 64, 96, 128}
    assert any(dim % 4 for dim in dims), "an odd number of pairs"


def test_rotary_positions_are_checked_in_halves_and_interleaved_and_where_rows_are_at_different_positions():
    found = set()
    for row in ROTARY:
        arguments = row.problem(row.cases[0]).arguments
        found.add((arguments["interleaved"], arguments["cos"].ndim))
        assert (arguments["cos"] != 1).all(), "position 0 turns nothing"
    assert found == {(False, 2), (True, 2), (False, 3), (True, 3)}
    row = ROWS["rope-rows"]
    for case in row.cases:
        cos = row.problem(case).arguments["cos"]
        assert len(cos) == 1 or (cos[0] != cos[1:]).any()


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_row_is_checked_in_every_layout_and_with_large_values(row):
    assert {case.layout for case in row.cases} == {"rows", "transposed", "sliced"}
    scales = {case.scale for case in (*row.cases, *row.rounding)}
    if row.layer in ("dpo", "orpo"):  # log-probabilities have a size of their own
        assert scales == {0.01, 0.1, 1.0, 10.0}
    elif row.layer == "lora":
        assert scales == {1.0, 100.0, 1e4}
    else:
        assert {case.scale for case in row.cases} == {1.0, 1e4}


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_other_layouts_are_what_they_say(layout):
    problem = ROWS["gelu"].problem(Case((13, 29), layout))
    for array in (problem.arguments["x"], *problem.upstream()):
        assert not array.flags.c_contiguous
        assert array.flags.f_contiguous == (layout == "transposed")
    same = ROWS["gelu"].problem(Case((13, 29), layout), "float32")
    assert not same.arguments["x"].flags.c_contiguous
    np.testing.assert_array_equal(same.arguments["x"], problem.arguments["x"].astype(np.float32))


@pytest.mark.parametrize("row, case", EVERY_CASE, ids=IDS)
def test_what_is_drawn_hides_no_mistake(row, case):
    """Upstream gradients differ from entry to entry; parameters are neither 0, nor 1, nor small."""
    problem = row.problem(case)
    for dy in problem.upstream():
        assert dy.size == 1 or dy.std() > 0.3
    for name in {"weight", "bias"} & set(problem.inputs()):
        values = np.abs(problem.arguments[name])
        assert values.min() >= 0.4
        assert (values != 1).all()


def test_axes_of_a_matrix_product_have_different_sizes():
    """So that a missing transpose cannot fit."""
    for case in ROWS["linear"].cases:
        O, *_, I = case.size  # noqa: E741
        assert O != I


def test_half_of_a_loss_s_targets_or_none_are_ignored():
    for name, share in (("cross_entropy", 0), ("cross_entropy-ignored", 0.4), ("cross_entropy-all-ignored", 1)):
        for case in ROWS[name].cases:
            ignored = ROWS[name].problem(case).arguments["targets"] == -100
            assert np.count_nonzero(ignored) == math.ceil(share * ignored.size)


def test_a_problem_is_the_same_each_time_and_another_for_another_number():
    row = ROWS["linear"]
    first, again, other = (row.problem(row.cases[3], number=n) for n in (0, 0, 1))
    np.testing.assert_array_equal(first.arguments["x"], again.arguments["x"])
    np.testing.assert_array_equal(first.dy, again.dy)
    assert (first.arguments["x"] != other.arguments["x"]).all()


def test_a_layer_s_name_selects_all_of_its_rows():
    assert {row.layer for row in select(["attention"])} == {"attention"}
    assert len(select(["attention"])) == len(ATTENTION)
    assert [row.name for row in select(["gelu-tanh", "dropout"])] == ["gelu-tanh", "dropout"]
    assert select([]) == list(ROWS.values())


@pytest.mark.parametrize(
    "name, message",
    [
        ("atention", "atention: no such operator; did you mean attention?"),
        ("layernorm", "layernorm: no such operator; did you mean layer_norm?"),
        ("zzz", "zzz: no such operator; choose from kernels, model, add_layer_norm, "),
    ],
)
def test_an_unknown_operator_is_named_with_the_closest(name, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        select([name])


def test_every_layer_of_the_reference_has_a_row():
    layers = {row.layer for row in ROWS.values()}
    found = {
        path.stem
        for path in Path(reference.__file__).parent.iterdir()
        if path.suffix == ".py" and "\ndef forward(" in path.read_text() and path.stem != "model"
    }
    assert found == layers

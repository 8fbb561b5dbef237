"""The errors of finite differences are those that a plain computation gives, and go as theory has it."""

import numpy as np
import pytest

from gpt.study import laboratory
from gpt.study.laboratory import laboratory_of
from reference import cross_entropy, model
from tests.gpt.study.passes import checked_pass, tiny_pass


@pytest.fixture(scope="module")
def measured():
    recording, _ = tiny_pass()
    return {one["name"]: one for one in laboratory_of(recording)["tensors"]}


def slope(x, y):
    return np.polyfit(np.log(x), np.log(y), 1)[0]


def test_a_handful_of_parameters_each_at_its_largest_gradient(measured):
    recording, _ = tiny_pass()
    assert {"tok_emb.weight", "blocks.0.norm1.weight", "blocks.0.attn.query.weight"} < set(measured)
    assert "head.weight" not in measured
    assert "head.weight" in [one["name"] for one in laboratory_of(checked_pass("untied")[0])["tensors"]]
    for name, one in measured.items():
        gradient = recording.gradients[name]
        assert one["by_hand"] == gradient[tuple(one["index"])]
        assert abs(one["by_hand"]) == np.abs(gradient).max()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_errors_are_those_of_the_model_itself(measured, dtype):
    recording, _ = tiny_pass()
    tensors = recording.tensors
    params = {name: tensors[name].astype(dtype) for name in recording.config.parameter_shapes()}

    def loss(name, index, step):
        moved = params[name].copy()
        moved[index] += step
        logits, _ = model.forward({**params, name: moved}, recording.config, tensors["tokens"])
        assert logits.dtype == dtype
        return float(cross_entropy.forward(logits, tensors["targets"])[0]), float(moved[index])

    for name, one in measured.items():
        index, kept = tuple(one["index"]), one[dtype]
        for k in range(0, len(kept["steps"]), 9):
            up, here, down = (loss(name, index, sign * kept["steps"][k]) for sign in (1, 0, -1))
            if up[1] > down[1]:
                central = (up[0] - down[0]) / (up[1] - down[1])
                assert kept["central"][k] == pytest.approx(abs(central / one["by_hand"] - 1), rel=1e-9, abs=1e-15)
            if up[1] > here[1]:
                forward = (up[0] - here[0]) / (up[1] - here[1])
                assert kept["forward"][k] == pytest.approx(abs(forward / one["by_hand"] - 1), rel=1e-9, abs=1e-15)


def test_what_is_left_out_falls_as_the_square_of_the_step_or_as_the_step(measured):
    for one in measured.values():
        steps = np.array(one["float64"]["steps"])
        part = (steps < 1e-2 * one["largest"]) & (steps > 1e-3 * one["largest"])
        central, forward = (np.array(one["float64"][kind])[part] for kind in ("central", "forward"))
        assert slope(steps[part], central) == pytest.approx(2, abs=0.15), one["name"]
        assert slope(steps[part], forward) == pytest.approx(1, abs=0.15), one["name"]


def test_f_two_and_three_primes_are_what_those_errors_say(measured):
    for one in measured.values():
        k = int(np.argmin(np.abs(np.log(np.array(one["float64"]["steps"]) / (1e-3 * one["largest"])))))
        h, size = one["float64"]["steps"][k], abs(one["by_hand"])
        assert one["float64"]["central"][k] == pytest.approx(one["third"] * h**2 / 6 / size, rel=0.1)
        assert one["float64"]["forward"][k] == pytest.approx(one["second"] * h / 2 / size, rel=0.1)


def test_small_steps_drown_in_rounding_and_float32_sooner(measured):
    for one in measured.values():
        assert min(one["float64"]["central"]) < 1e-8 < 1e-4 < one["float64"]["central"][-1]
        assert min(one["float32"]["central"]) > 10 * min(one["float64"]["central"])
        assert one["float64"]["best"]["central"] > one["float64"]["best"]["forward"]
        assert one["float32"]["best"]["central"] > one["float64"]["best"]["central"]
        for kind in ("central", "forward"):  # no step does much better than the one that the formulas give
            steps = np.array(one["float64"]["steps"])
            k = int(np.argmin(np.abs(np.log(steps / one["float64"]["best"][kind]))))
            near = one["float64"][kind][max(0, k - 1) : k + 2]
            lucky = np.sort(one["float64"][kind])[2]  # two may be
            assert min(near) < 100 * lucky


def test_a_model_too_large_is_left_alone(monkeypatch):
    recording, _ = tiny_pass()
    monkeypatch.setattr(laboratory, "_measured", None)
    found = laboratory_of(recording, budget=0)
    assert found["tensors"] == []
    assert f"{recording.config.n_parameters:,} parameters" in found["why"]

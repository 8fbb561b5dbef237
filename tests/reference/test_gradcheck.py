import numpy as np
import pytest

from reference.gradcheck import numeric_gradient


def test_a_quadratic_is_differentiated_exactly():
    a = np.array([[2.0, -3.0], [0.5, 7.0]])
    x = np.array([[1.0, 2.0], [-1.0, 0.25]])
    np.testing.assert_allclose(numeric_gradient(lambda x: float(np.sum(a * x * x)), x), 2 * a * x, rtol=1e-9)


def test_the_error_falls_with_the_square_of_the_step():
    x = np.array([0.7])
    errors = [abs(numeric_gradient(lambda x: float(np.exp(3 * x[0])), x, step)[0] / (3 * np.exp(2.1)) - 1)
              for step in (1e-2, 1e-3)]  # fmt: skip
    assert errors[0] / errors[1] == pytest.approx(100, rel=1e-3)


def test_only_the_chosen_elements_are_asked_for():
    asked = []

    def f(x):
        asked.append(x.copy())
        return float(np.sum(x**3))

    x = np.arange(6.0).reshape(2, 3)
    gradient = numeric_gradient(f, x, indices=[(1, 2), (0, 1)])
    assert len(asked) == 4
    np.testing.assert_allclose(gradient[[1, 0], [2, 1]], [75, 3], rtol=1e-8)
    assert np.isnan(gradient).sum() == 4
    np.testing.assert_array_equal(x, np.arange(6.0).reshape(2, 3))


def test_a_scalar_and_a_strided_argument():
    assert numeric_gradient(lambda x: float(x**2), np.array(3.0)) == pytest.approx(6)
    x = np.arange(12.0).reshape(3, 4).T[::2]
    np.testing.assert_allclose(numeric_gradient(lambda x: float(np.sum(x * x)), x), 2 * x, rtol=1e-8)


def test_float32_is_refused():
    with pytest.raises(ValueError, match="x: expected float64, in which differences keep their digits; got float32"):
        numeric_gradient(lambda x: 0.0, np.ones(3, np.float32))

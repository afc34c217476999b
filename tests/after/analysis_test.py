"""The numbers behind the pictures, by hand and beside NumPy's own decomposition."""

import numpy as np
import pytest

from layermatch_jax.after import analysis
from layermatch_jax.after.analysis import Curve

LINES = [
    {"step": 2, "split": "train", "loss": 4.0, "by_class": [1.0, None]},
    {"step": 2, "split": "test", "loss": 9.0},
    {"step": 4, "split": "train", "loss": None, "by_class": None},
    {"step": 6, "split": "train", "loss": 1.0, "by_class": [0.0, 2.0]},
]


def test_a_curve_has_the_steps_at_which_something_is_known():
    steps, values = analysis.curve(LINES, "train", "loss")
    np.testing.assert_array_equal(steps, [2, 6])
    np.testing.assert_array_equal(values, [4.0, 1.0])
    steps, values = analysis.curve(LINES, "train", "by_class")
    np.testing.assert_array_equal(steps, [2, 6])
    np.testing.assert_array_equal(values, [[1.0, np.nan], [0.0, 2.0]])
    steps, values = analysis.curve(LINES, "validation", "loss")
    assert len(steps) == len(values) == 0


def test_a_thinned_curve_has_means_of_neighbors():
    whole = Curve(np.array([10, 20, 30, 40, 50]), np.array([1.0, 3.0, 10.0, 20.0, 7.0]))
    steps, values = analysis.thinned(whole, 3)
    np.testing.assert_array_equal(steps, [10, 30, 50])
    np.testing.assert_array_equal(values, [1.0, 6.5, 13.5])
    assert analysis.thinned(whole, 5) is whole
    nan = np.nan
    by_class = Curve(np.array([1, 2, 3]), np.array([[5.0, nan], [1.0, nan], [3.0, 6.0]]))
    steps, values = analysis.thinned(by_class, 2)
    np.testing.assert_array_equal(steps, [1, 3])
    np.testing.assert_array_equal(values, [[5.0, nan], [2.0, 6.0]])
    half = Curve(np.array([1, 2]), np.array([[nan], [8.0]]))
    np.testing.assert_array_equal(analysis.thinned(half, 1).values, [[8.0]])


def test_a_band_is_of_the_steps_that_all_runs_have():
    runs = [
        Curve(np.array([1, 2, 3, 4]), np.array([1.0, 2.0, 3.0, 9.0])),
        Curve(np.array([1, 3]), np.array([3.0, 3.0])),  # not finished, and one value is not known
        Curve(np.array([1, 2, 3]), np.array([5.0, 0.0, 9.0])),
        Curve(np.zeros(0, int), np.zeros(0)),  # not started
    ]
    band = analysis.band(runs)
    np.testing.assert_array_equal(band.steps, [1, 3])
    np.testing.assert_array_equal(band.mean, [3.0, 5.0])
    # ((-2)² + 0² + 2²) / 2 and (2 · (-2)² + 4²) / 2
    np.testing.assert_allclose(band.deviation, [2.0, 12**0.5])
    assert band.count == 3
    alone = analysis.band(runs[:1])
    np.testing.assert_array_equal(alone.mean, runs[0].values)
    assert alone.deviation is None
    assert alone.count == 1
    assert analysis.band(runs[3:]).count == 0


def test_confusion_has_truths_in_rows():
    truths = np.array([0, 0, 0, 1, 1, 2, -1])
    predicted = np.array([0, 1, 1, 1, 0, 0, 2])
    matrix = analysis.confusion_matrix(truths, predicted, 4)
    np.testing.assert_array_equal(matrix, [[1, 2, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert analysis.most_confused(matrix, 2) == [(0, 1, 2), (1, 0, 1)]
    assert analysis.most_confused(matrix, 9) == [(0, 1, 2), (1, 0, 1), (2, 0, 1)]


def test_the_surest_mistake_comes_first():
    probabilities = np.array(
        [
            [0.9, 0.1, 0.0],  # right
            [0.6, 0.3, 0.1],  # wrong
            [0.1, 0.1, 0.8],  # wrong, more confident
            [0.0, 1.0, 0.0],  # unknown
            [0.3, 0.7, 0.0],  # wrong
        ]
    )
    truths = np.array([0, 1, 0, -1, 2])
    np.testing.assert_array_equal(analysis.confident_mistakes(probabilities, truths, 9), [2, 4, 1])
    np.testing.assert_array_equal(analysis.confident_mistakes(probabilities, truths, 2), [2, 4])


@pytest.mark.parametrize(("count", "dim"), [(50, 6), (3, 6), (40, 2)])
def test_the_plane_is_numpys_decomposition(count, dim):
    rng = np.random.RandomState(0)
    features = (rng.randn(count, dim) * np.arange(1, dim + 1) + 100).astype(np.float32)
    plane = analysis.principal_plane(features)
    centered = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    _, sizes, vectors = np.linalg.svd(centered, full_matrices=False)
    expected = centered @ vectors[:2].T
    points = plane.project(features)
    sign = np.sign(np.sum(points * expected, axis=0))
    np.testing.assert_allclose(points, expected * sign, atol=1e-4)
    np.testing.assert_allclose(plane.shares, sizes[:2] ** 2 / np.sum(sizes**2), rtol=1e-4)
    for axis in plane.axes.T:
        assert axis[np.abs(axis).argmax()] > 0  # the same picture on every machine
    # Constant features have no direction; nothing is divided by zero.
    assert np.isfinite(analysis.principal_plane(np.ones((4, 3))).shares).all()

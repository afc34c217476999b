"""The linear probe against its objective, scikit-learn's cross-validation, and by hand."""

import numpy as np
import pytest
from scipy import special
from sklearn import linear_model, model_selection

from layermatch_jax.frozen import probe


def made_features(n, dim, num_classes, seed=0, spread=1.0):
    """Returns (features [n, dim] around one center for each class, labels); classes in turn."""
    rng = np.random.RandomState(seed)
    labels = np.arange(n) % num_classes
    centers = 3 * rng.randn(num_classes, dim)
    return np.float32(centers[labels] + spread * rng.randn(n, dim)), labels


def slope(fitted, features, labels, weights, C):
    """Returns the gradient of the objective in the docstring of `fit`, in float64."""
    x = np.float64(features)
    scale = 1 / np.sqrt(np.mean(x**2))
    kernel = np.float64(fitted.kernel) / scale  # of the scaled features
    p = special.softmax(scale * x @ kernel + fitted.bias, axis=1)
    wrong = C * weights[:, None] * (p - np.eye(p.shape[1])[labels])
    return kernel + (scale * x).T @ wrong, wrong.sum(axis=0)


@pytest.mark.parametrize(("n", "dim"), [(30, 5), (12, 40)])  # more and fewer images than features
def test_fit_minimizes_the_objective(n, dim):
    features, labels = made_features(n, dim, 3, spread=3.0)
    weights = np.random.RandomState(1).uniform(0.2, 2, n)
    fitted = probe.fit(features, labels, 3, seed=0, weights=weights, C=0.3)
    of_kernel, of_bias = slope(fitted, features, labels, weights, 0.3)
    # At the start, with zeros, the largest entry is about 10.
    at_zero, _ = slope(fitted._replace(kernel=0 * fitted.kernel), features, labels, weights, 0.3)
    assert abs(at_zero).max() > 1
    np.testing.assert_allclose(of_kernel, 0, atol=5e-3)
    np.testing.assert_allclose(of_bias, 0, atol=5e-3)
    assert fitted.kernel.shape == (dim, 3)
    assert fitted.kernel.dtype == np.float32


def test_the_scale_of_the_features_does_not_matter():
    features, labels = made_features(40, 6, 4, spread=4.0)
    one, other = (probe.fit(k * features, labels, 4, seed=0) for k in (1, 1000))
    assert one.C == other.C
    np.testing.assert_allclose(
        one.probabilities(features), other.probabilities(1000 * features), atol=1e-3
    )


def test_two_classes_and_a_class_without_labels():
    features, labels = made_features(20, 4, 2)
    fitted = probe.fit(features, 2 * labels, 4, seed=0, C=0.3)  # classes 0 and 2 of 4
    probabilities = fitted.probabilities(features)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), 2 * labels)
    assert probabilities[:, [1, 3]].max() < 1e-6
    of_two = fitted._replace(kernel=fitted.kernel[:, ::2], bias=fitted.bias[::2])
    of_kernel, of_bias = slope(of_two, features, labels, np.ones(20), 0.3)
    np.testing.assert_allclose(of_kernel, 0, atol=5e-3)
    np.testing.assert_allclose(of_bias, 0, atol=5e-3)


def test_the_penalty_by_the_rule_of_one_standard_error():
    features, labels = made_features(60, 8, 3, spread=6.0)
    scaled = np.float64(features) / np.sqrt(np.mean(np.float64(features) ** 2))
    candidates = [10**e for e in np.arange(-4, 1.5, 0.5)]
    losses = []
    for C in candidates:
        p = model_selection.cross_val_predict(
            linear_model.LogisticRegression(C=C, max_iter=1000), scaled, labels,
            cv=model_selection.PredefinedSplit(probe.folds(labels, seed=5)),
            method="predict_proba",
        )  # fmt: skip
        losses.append(-np.log(p[np.arange(60), labels]))
    mean = np.mean(losses, axis=1)
    best = mean.argmin()
    allowed = mean <= mean[best] + np.std(losses[best], ddof=1) / 60**0.5
    expected = allowed.argmax()  # the first of the ascending candidates
    assert 0 < expected < best < len(candidates) - 1  # so that the rule makes a difference
    fitted = probe.fit(features, labels, 3, seed=5)
    assert fitted.C_chosen
    np.testing.assert_allclose(fitted.C, candidates[expected])


def test_folds_are_even_by_class_and_keep_single_images():
    labels = np.array([0] * 10 + [1] * 7 + [2] + [3] * 2)
    of_folds = probe.folds(labels, seed=3)
    np.testing.assert_array_equal(np.bincount(of_folds[labels == 0]), [2] * 5)
    assert sorted(np.bincount(of_folds[labels == 1], minlength=5)) == [1, 1, 1, 2, 2]
    assert of_folds[labels == 2] == [-1]
    assert len(set(of_folds[labels == 3])) == 2
    assert (probe.folds(labels, seed=4) != of_folds).any()
    # Two images in all: two folds, without empty ones.
    assert sorted(probe.folds(np.array([0, 0]), seed=0)) == [0, 1]


def test_without_two_labels_of_a_class_the_penalty_is_a_default():
    features, labels = made_features(3, 5, 3)
    fitted = probe.fit(features, labels, 3, seed=0)
    assert not fitted.C_chosen
    assert fitted.C == 0.1
    assert len(probe.cross_validated(features, labels, 3, seed=0).held_out) == 0


def test_cross_validation_does_not_see_the_label_that_it_predicts():
    # Each image has a feature of its own, so a probe that saw its label would be always right.
    labels = np.arange(60) % 2
    features = np.eye(60, dtype=np.float32)
    seen = probe.fit(features, labels, 2, seed=0, C=10.0)
    assert (seen.probabilities(features).argmax(axis=1) == labels).all()
    found = probe.cross_validated(features, labels, 2, seed=0)
    np.testing.assert_array_equal(found.held_out, np.arange(60))
    assert (found.probabilities.argmax(axis=1) == labels).mean() <= 0.6


def test_cross_validation_predicts_classes_that_can_be_told_apart():
    features, labels = made_features(31, 6, 3)
    labels = np.append(labels, 3)  # one image of a fourth class, never held out
    features = np.concatenate([features, 50 * np.ones((1, 6), np.float32)])
    found = probe.cross_validated(features, labels, 4, seed=0)
    np.testing.assert_array_equal(found.held_out, np.arange(31))
    assert (found.probabilities.argmax(axis=1) == labels[:31]).mean() > 0.95
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-5)

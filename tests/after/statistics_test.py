"""Means, spreads and paired differences, by hand."""

import pytest

from layermatch_jax.after import statistics


def test_mean_and_standard_deviation():
    # 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, over n − 1 = 2: √7
    found = statistics.mean([1.0, None, 2.0, 6.0])
    assert (found.value, found.count) == (3.0, 3)
    assert found.spread == pytest.approx(7**0.5)
    assert found.text() == "3.0 ± 2.6"
    assert found.text("+.2f") == "+3.00 ± 2.6"


@pytest.mark.parametrize(
    ("values", "text", "expected"),
    [([], "", (None, None, 0)), ([None], "", (None, None, 0)), ([2.5], "2.5", (2.5, None, 1))],
)
def test_few_values(values, text, expected):
    assert statistics.mean(values) == expected
    assert statistics.mean(values).text() == text


def test_paired_differences():
    scores = {0: 5.0, 1: 7.0, 2: None, 3: 1.0, 4: 3.0}
    baseline = {1: 4.0, 0: 4.0, 2: 9.0, 3: None, 5: 0.0}
    # seeds 0 and 1: 1 and 3; mean 2, deviation √2, error √2 / √2 = 1
    assert statistics.differences(scores, baseline) == [1.0, 3.0]
    found = statistics.mean_difference(scores, baseline)
    assert (found.value, found.count) == (2.0, 2)
    assert found.spread == pytest.approx(1.0)
    assert statistics.mean_difference({0: 5.0}, {0: 4.0}) == (1.0, None, 1)
    assert statistics.mean_difference({0: 5.0}, {1: 4.0}) == (None, None, 0)

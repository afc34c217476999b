"""Means over runs with their spreads, for all tables and figures."""

import statistics
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple


class Mean(NamedTuple):
    """The mean of the known values, and its spread."""

    value: float | None  # None if no value is known
    spread: float | None  # None with fewer than two values
    count: int  # of known values

    def text(self, form: str = ".1f") -> str:
        """Formats 'mean ± spread', the spread with one decimal place; '' if no value is known."""
        if self.value is None:
            return ""
        return f"{self.value:{form}}" + ("" if self.spread is None else f" ± {self.spread:.1f}")


def mean(values: Iterable[float | None]) -> Mean:
    """Computes the mean and the standard deviation (n − 1) of the values that are not None."""
    known = [value for value in values if value is not None]
    return Mean(
        statistics.fmean(known) if known else None,
        statistics.stdev(known) if len(known) > 1 else None,
        len(known),
    )


def mean_difference(
    scores: Mapping[Hashable, float | None], baseline: Mapping[Hashable, float | None]
) -> Mean:
    """Computes the mean of paired differences and its standard error: standard deviation / √n.

    Args:
      scores: {pair, such as a seed: score}.
      baseline: scores to subtract, by the same pairs. A pair with a missing score, or None, is left
        out.
    """
    difference = mean(differences(scores, baseline))
    error = None if difference.spread is None else difference.spread / difference.count**0.5
    return difference._replace(spread=error)


def differences(
    scores: Mapping[Hashable, float | None], baseline: Mapping[Hashable, float | None]
) -> list[float]:
    """Computes `scores` − `baseline` for each pair known in both, in the order of `scores`."""
    pairs = ((score, baseline.get(pair)) for pair, score in scores.items())
    return [score - other for score, other in pairs if score is not None and other is not None]

"""Means over runs, and how sure they are: every table and picture takes them from here."""

import statistics
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple


class Mean(NamedTuple):
    """A mean of what is known and its spread."""

    value: float | None  # None: nothing is known
    spread: float | None  # None with fewer than two values
    count: int  # of known values

    def text(self, form: str = ".1f") -> str:
        """'mean ± spread', with one decimal place of the spread; '' if nothing is known."""
        if self.value is None:
            return ""
        return f"{self.value:{form}}" + ("" if self.spread is None else f" ± {self.spread:.1f}")


def mean(values: Iterable[float | None]) -> Mean:
    """The mean ± the sample's standard deviation (n − 1); None among the values is left out."""
    known = [value for value in values if value is not None]
    return Mean(
        statistics.fmean(known) if known else None,
        statistics.stdev(known) if len(known) > 1 else None,
        len(known),
    )


def mean_difference(
    scores: Mapping[Hashable, float | None], baseline: Mapping[Hashable, float | None]
) -> Mean:
    """The mean of the paired differences ± its standard error, the deviation / √n.

    Args:
      scores: by pair, such as a seed.
      baseline: what is subtracted, by the same pairs. A pair that one of the two lacks, or of which
        one is None, is left out.
    """
    difference = mean(differences(scores, baseline))
    error = None if difference.spread is None else difference.spread / difference.count**0.5
    return difference._replace(spread=error)


def differences(
    scores: Mapping[Hashable, float | None], baseline: Mapping[Hashable, float | None]
) -> list[float]:
    """`scores` − `baseline` of each pair that is known in both, in the order of `scores`."""
    pairs = ((score, baseline.get(pair)) for pair, score in scores.items())
    return [score - other for score, other in pairs if score is not None and other is not None]

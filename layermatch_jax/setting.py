"""What a setting is: its default, its meaning with its unit, and which values it may have."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from layermatch_jax.errors import InputError, unknown

CLASSIC_DECAY = 0.999  # of averages over the steps of the field's runs, of 2^20 steps as a rule


class Setting(NamedTuple):
    """One setting. Bounds are None where there are none; they hold for numbers."""

    default: Any  # a value; or a function of train_steps, for an automatic one
    meaning: str  # what it sets, with its unit; whole words, for people
    low: float | None = None  # the least value
    high: float | None = None  # the largest value
    above: float | None = None  # every value is larger than that
    below: float | None = None  # every value is smaller than that
    choices: Sequence[str] = ()  # all values there are
    kind: type | None = None  # of a value; None = that of the default
    neutral: bool = False  # may change between two starts of a run: its result stays the same

    @property
    def type(self) -> type:
        """The type of a value."""
        return self.kind or type(self.default)

    def check(self, name: str, value: Any) -> None:
        """Raises InputError unless the setting `name` may have this value; None always may."""
        if value is None:
            return
        if self.choices and value not in self.choices:
            raise unknown(f"--config.{name}", value, self.choices)
        limits = [
            (self.low, "at least", lambda limit: value >= limit),
            (self.high, "at most", lambda limit: value <= limit),
            (self.above, "above", lambda limit: value > limit),
            (self.below, "below", lambda limit: value < limit),
        ]
        limits = [limit for limit in limits if limit[0] is not None]
        if limits and not math.isfinite(value):
            raise InputError(f"--config.{name}={value} must be a finite number")
        if not all(keeps(limit) for limit, _, keeps in limits):
            allowed = " and ".join(f"{words} {limit}" for limit, words, _ in limits)
            raise InputError(f"--config.{name}={value} must be {allowed}. {self.meaning}")


def memory(train_steps: int, classic: float = CLASSIC_DECAY) -> float:
    """The classic decay of an average, lowered so that it remembers at most a tenth of the run.

    An average with decay d remembers about 1 / (1 - d) steps.
    """
    return min(classic, max(0.0, 1 - 10 / max(train_steps, 1)))


def decay(of_what: str) -> Setting:
    """An automatic setting: how much of an average's old value each step keeps."""
    return Setting(
        memory,
        f"Decay of {of_what}: the share of the old average that each step keeps. Automatic: "
        f"min({CLASSIC_DECAY}, 1 - 10 / train_steps).",
        low=0,
        below=1,
        kind=float,
    )

"""What a setting is: its default, its meaning with its unit, and which values it may have."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from layermatch_jax.errors import InputError, unknown

CLASSIC_DECAY = 0.999  # the field's decay of averages over steps, in runs of mostly 2^20 steps


class Setting(NamedTuple):
    """One setting. A bound that is None does not apply; only numbers have bounds."""

    default: Any  # a value; for an automatic setting a function of train_steps, or None
    meaning: str  # text for users: what it sets, with its unit
    low: float | None = None  # the least value
    high: float | None = None  # the largest value
    above: float | None = None  # every value must be larger than this
    below: float | None = None  # every value must be smaller than this
    choices: Sequence[str] = ()  # the allowed values; () = no such list
    kind: type | None = None  # type of a value; None = type of the default
    neutral: bool = False  # does not change the result, so a resumed run may change it

    @property
    def type(self) -> type:
        """The type of a value."""
        return self.kind or type(self.default)

    def check(self, name: str, value: Any) -> None:
        """Raises InputError if this value of the setting `name` is not allowed; None always is."""
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
    """Returns a decay such that an average remembers at most a tenth of the run.

    An average with decay d remembers about 1 / (1 - d) steps. Long runs get the `classic` decay.
    """
    return min(classic, max(0.0, 1 - 10 / max(train_steps, 1)))


def decay(of_what: str) -> Setting:
    """Makes an automatic setting: the decay of an average per step."""
    return Setting(
        memory,
        f"Decay of {of_what}: the share of the old average that each step keeps. Automatic: "
        f"min({CLASSIC_DECAY}, 1 - 10 / train_steps).",
        low=0,
        below=1,
        kind=float,
    )

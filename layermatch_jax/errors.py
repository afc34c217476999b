"""The two ways a run ends early on purpose; main.py turns them into exit statuses."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """The user asked for something that cannot be done (exit status 2).

    The message says what was wrong, what is allowed, and how to mend it. Not a ValueError: absl's
    flags would swallow that and print a traceback in its place.
    """


class NonFiniteLossError(Exception):
    """Training diverged: the loss is NaN or infinite (exit status 1)."""


def unknown(kind: str, name: object, allowed: Iterable[str]) -> InputError:
    """The error for a name that does not exist: tells the nearest one, and all of them."""
    allowed = list(allowed)
    nearest = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return InputError(f"unknown {kind} {name!r}.{hint} There are: {', '.join(allowed)}")

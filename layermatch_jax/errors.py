"""The two ways a run ends early on purpose; main.py turns them into exit statuses."""

import difflib
from collections.abc import Iterable

_FEW = 20  # names that are read rather than skipped


class InputError(Exception):
    """The user asked for something that cannot be done (exit status 2).

    The message says what was wrong, what is allowed, and how to mend it. Not a ValueError: absl's
    flags would swallow that and print a traceback in its place.
    """


class NonFiniteLossError(Exception):
    """Training diverged: the loss is NaN or infinite (exit status 1)."""


def unknown(kind: str, name: object, allowed: Iterable[str]) -> InputError:
    """The error for a name that does not exist: tells the nearest ones, and all if they are few."""
    name, allowed = str(name), list(allowed)
    # A field that was looked for in another group of its tree is nearer than one spelled alike.
    nearest = [other for other in allowed if other.split(".")[-1] == name.split(".")[-1]]
    nearest = nearest or difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    message = f"unknown {kind} {name!r}."
    if nearest:
        *others, one = map(repr, nearest)
        message += f" Did you mean {', '.join(others)}{' or ' if others else ''}{one}?"
    if not nearest or len(allowed) <= _FEW:
        message += f" There are: {', '.join(allowed)}"
    return InputError(message)

"""The ways a run ends early on purpose."""

import difflib
from collections.abc import Iterable

_FEW = 20  # names that are read rather than skipped


class EarlyEnd(Exception):  # noqa: N818
    """The base of them: a message for the user, and the exit status of the process."""

    status: int


class InputError(EarlyEnd):
    """The user asked for something that cannot be done.

    The message says what was wrong, what is allowed, and how to mend it. Not a ValueError: absl's
    flags would swallow that and print a traceback in its place.
    """

    status = 2


class NonFiniteLossError(EarlyEnd):
    """Training diverged: the loss is NaN or infinite."""

    status = 1


class StorageError(EarlyEnd):
    """What the run produced could not be written, such as on a full disk."""

    status = 1


class Stopped(EarlyEnd):
    """The run was asked to stop, and saved a checkpoint to go on from."""

    status = 0


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

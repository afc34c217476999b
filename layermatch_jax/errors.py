"""The ways a run ends early on purpose."""

import difflib
import re
from collections.abc import Iterable

_FEW = 20  # names that are read rather than skipped
_REFUSED = re.compile(
    "(ValueError: )?(permission_?denied|unauthenticated|unavailable|aborted|deadline_?exceeded)",
    re.IGNORECASE,
)


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


def refusal(error: Exception) -> str | None:
    """What a bucket (gs://) answered, in a line, if it could not be used; None for other errors.

    The clients of TensorFlow, tensorstore and Google have no error in common. Of the first two's,
    those count that say so, not those that say what is missing or damaged.
    """
    said = " ".join(re.split(r" \[\w+=", str(error))[0].split())  # without tensorstore's details
    kind = type(error)
    google = kind.__module__.startswith("google.")
    if google or ("gs://" in said and _REFUSED.match(f"{kind.__name__}: {said}")):
        return said[:500]
    return None


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

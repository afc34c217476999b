"""The two ways a run ends early on purpose; main.py turns them into exit statuses."""


class InputError(Exception):
    """The user asked for something that cannot be done (exit status 2).

    The message says what was wrong, what is allowed, and how to mend it. Not a ValueError: absl's
    flags would swallow that and print a traceback in its place.
    """


class NonFiniteLossError(Exception):
    """Training diverged: the loss is NaN or infinite (exit status 1)."""

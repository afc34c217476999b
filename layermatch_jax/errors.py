"""The two ways a run can end early on purpose; main.py turns them into exit statuses."""


class InputError(ValueError):
    """The user asked for something that cannot be done (exit status 2).

    The message says what was wrong, what is allowed, and how to mend it.
    """


class NonFiniteLossError(RuntimeError):
    """Training diverged: the loss is NaN or infinite (exit status 1)."""

"""The ways a run ends early on purpose."""

import difflib
import errno
import os
import re
from collections.abc import Iterable

_FEW = 20  # names that are read rather than skipped
_REFUSED = re.compile(
    "(ValueError: )?(permission_?denied|unauthenticated|unavailable|aborted|deadline_?exceeded)",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile("resource_?exhausted|out of memory", re.IGNORECASE)

# What the user can do about an error of the operating system, by its number.
_OTHER_PLACE = "or take another place for it, such as another --workdir"
_MEND = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room",
    errno.EACCES: f"Give yourself the right to read and write it, {_OTHER_PLACE}",
    errno.EPERM: f"Give yourself the right to read and write it, {_OTHER_PLACE}",
    errno.EROFS: f"Make its file system writable, {_OTHER_PLACE}",
    errno.ENAMETOOLONG: "Take a shorter name",
    errno.ENOTDIR: "A file is in the place of a folder. Move it away",
    errno.EISDIR: "A folder is in the place of a file. Move it away",
    errno.ENOENT: "Bring it back",
    errno.EMFILE: "Allow more open files (ulimit -n)",
    errno.ENFILE: "Allow more open files (ulimit -n)",
    errno.EIO: "The disk, or the connection to it, failed. Mend that",
    errno.ESTALE: "The disk, or the connection to it, failed. Mend that",
}


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


class BrokenImagesError(EarlyEnd):
    """Some images could not be decoded; what was asked for was done with all others."""

    status = 3


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


def os_error_number(error: Exception) -> int | None:
    """The `errno` of an OSError, or the one in tensorstore's text; None for other errors."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"os_error_code='(\d+)'", str(error))
    return int(told[1]) if told else None


def explained(error: Exception) -> str | None:
    """A sentence for an error that is no mistake of the program; None for all others.

    These are: a file or a bucket that cannot be used, and no memory left on a device or the host.
    """
    if said := refusal(error):
        return f"StorageError: {said}. Mend it; the same command goes on"
    kind, first_line = type(error).__name__, str(error).split("\n")[0][:300].rstrip(". ")
    if isinstance(error, MemoryError):
        return (
            f"OutOfMemory: this machine has no memory left ({first_line or kind}). Take "
            "data with fewer images, a smaller --config.dataset.stored_size or "
            "--config.input.prefetch, or a machine with more memory"
        )
    # By their names: nothing here imports JAX. The last one is TensorFlow's.
    devices = kind in ("JaxRuntimeError", "XlaRuntimeError", "ResourceExhaustedError")
    if devices and _OUT_OF_MEMORY.search(f"{kind} {error}"):
        return (
            f"OutOfMemory: this run needs more memory than the device has ({first_line}). Lower "
            "--config.batch_size, --config.unlabeled_ratio or --config.eval_batch_size. Or keep "
            "these, and take --config.model.remat=True or --config.model.dtype=bfloat16; with "
            "--config.input.backend=device also --config.input.backend=tf_data or a smaller "
            "--config.dataset.stored_size"
        )
    if isinstance(error, OSError) and (error.filename or error.errno in _MEND):
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        mend = _MEND.get(error.errno, "Mend it")
        return f"StorageError: {where}{error.strerror}. {mend}; the same command goes on"
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

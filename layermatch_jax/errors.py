"""The errors that end a run on purpose, and messages for errors of the system."""

import difflib
import errno
import os
import re
from collections.abc import Iterable

_FEW = 20  # a message lists all allowed names if there are no more than these
_REFUSED = re.compile(
    "(ValueError: )?(permission_?denied|unauthenticated|unavailable|aborted|deadline_?exceeded)",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile("resource_?exhausted|out of memory", re.IGNORECASE)

# What the user can do about an error of the operating system, by its number.
_AGAIN = "then run the same command again"
_RESUME = f"{_AGAIN} to resume"
_OTHER_PLACE = "or choose another place for it, such as another --workdir"
_MEND = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room",
    errno.EACCES: f"Give yourself permission to read and write it, {_OTHER_PLACE}",
    errno.EPERM: f"Give yourself permission to read and write it, {_OTHER_PLACE}",
    errno.EROFS: f"Make its file system writable, {_OTHER_PLACE}",
    errno.ENAMETOOLONG: "Use a shorter name",
    errno.ENOTDIR: "A file has the name that a folder needs. Move the file away",
    errno.EISDIR: "A folder has the name that a file needs. Move the folder away",
    errno.ENOENT: "Bring it back",
    errno.EMFILE: "Allow more open files (ulimit -n)",
    errno.ENFILE: "Allow more open files (ulimit -n)",
    errno.EIO: "The disk, or the connection to it, failed. Repair it",
    errno.ESTALE: "The disk, or the connection to it, failed. Repair it",
}


class EarlyEnd(Exception):  # noqa: N818
    """The base class: carries a message for the user, and the exit status of the process."""

    status: int


class InputError(EarlyEnd):
    """The config, a flag, a file or the data cannot be used.

    The message says what was wrong, what is allowed, and how to mend it. The class is not a
    ValueError, because absl's flags catch ValueError and print a traceback instead of its message.
    """

    status = 2


class NonFiniteLossError(EarlyEnd):
    """Training diverged: the loss is NaN or infinite."""

    status = 1


class StorageError(EarlyEnd):
    """A file of the run could not be written or read, for example on a full disk."""

    status = 1


class BrokenImagesError(EarlyEnd):
    """Some images could not be decoded; the mode has processed all others."""

    status = 3


class Stopped(EarlyEnd):
    """The run was told to stop; it saved a checkpoint first, and can continue from there."""

    status = 0


def refusal(error: Exception) -> str | None:
    """Returns a bucket's (gs://) answer in one line if it refused access; None for other errors.

    TensorFlow, tensorstore and Google's client share no class of errors. An error of Google's
    client always counts. An error of the other two counts if its text says that access failed
    (_REFUSED), not if it says that an object is missing or damaged.
    """
    said = " ".join(re.split(r" \[\w+=", str(error))[0].split())  # without tensorstore's details
    kind = type(error)
    google = kind.__module__.startswith("google.")
    if google or ("gs://" in said and _REFUSED.match(f"{kind.__name__}: {said}")):
        return said[:500]
    return None


def os_error_number(error: Exception) -> int | None:
    """Returns the `errno` of an OSError or of tensorstore's message; None for other errors."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"os_error_code='(\d+)'", str(error))
    return int(told[1]) if told else None


def explained(error: Exception, resumes: bool = True) -> str | None:
    """Explains an error that has its cause outside the program; None for all other errors.

    Such causes are a file or a bucket that cannot be used, and a device or host without memory.

    Args:
      error: any error.
      resumes: whether the same command continues its work; False = it starts again.
    """
    again = _RESUME if resumes else _AGAIN
    if said := refusal(error):
        return f"StorageError: {said}. Mend this; {again}"
    kind, first_line = type(error).__name__, str(error).split("\n")[0][:300].rstrip(". ")
    if isinstance(error, MemoryError):
        return (
            f"OutOfMemory: this machine has no memory left ({first_line or kind}). Use "
            "data with fewer images, a smaller --config.dataset.stored_size or "
            "--config.input.prefetch, or a machine with more memory"
        )
    # Compared by name, because this module must not import JAX. The last one is TensorFlow's.
    devices = kind in ("JaxRuntimeError", "XlaRuntimeError", "ResourceExhaustedError")
    if devices and _OUT_OF_MEMORY.search(f"{kind} {error}"):
        return (
            f"OutOfMemory: this run needs more memory than the device has ({first_line}). Lower "
            "--config.batch_size, --config.unlabeled_ratio or --config.eval_batch_size. Or keep "
            "these, and set --config.model.remat=True or --config.model.dtype=bfloat16. If "
            "--config.input.backend=device, --config.input.backend=tf_data or a smaller "
            "--config.dataset.stored_size also needs less memory"
        )
    if isinstance(error, OSError) and (error.filename or error.errno in _MEND):
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        mend = _MEND.get(error.errno or 0, "Mend this")
        return f"StorageError: {where}{error.strerror}. {mend}; {again}"
    return None


def unknown(kind: str, name: object, allowed: Iterable[str]) -> InputError:
    """Makes the error for an unknown name; it tells the nearest ones, and all if they are few."""
    name, allowed = str(name), list(allowed)
    # The same field in another group is a better guess than a field with a similar spelling.
    nearest = [other for other in allowed if other.split(".")[-1] == name.split(".")[-1]]
    nearest = nearest or difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    message = f"unknown {kind} {name!r}."
    if nearest:
        *others, one = map(repr, nearest)
        message += f" Did you mean {', '.join(others)}{' or ' if others else ''}{one}?"
    if not nearest or len(allowed) <= _FEW:
        message += f" There are: {', '.join(allowed)}"
    return InputError(message)

"""Names of files and folders as text that can be compared and printed.

Two disks may store a name with different code points (Ä as one or as two), and a name may have
bytes that are not UTF-8. Files are opened by the disk's own name; everything else uses `text`.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from layermatch_jax.errors import InputError


def text(name: str) -> str:
    r"""Converts a name or path to valid text in Unicode's composed form (NFC).

    Control characters and bytes that are not UTF-8 (surrogates in Python) become visible escapes:
    the Latin-1 bytes of café give 'caf\xe9'.
    """
    return unicodedata.normalize("NFC", visible(name))


def visible(name: str) -> str:
    """Converts a name or path to one line of UTF-8: the disk's code points, escapes as in `text`.

    A program can open the file by this text if it contains no escapes.
    """
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\0-\x1f\x7f-\x9f\u2028\u2029]", _escape, name)


def in_order(names: Iterable[str]) -> list[str]:
    """Sorts names or paths by their text, which gives the same order on every disk."""
    return sorted(names, key=lambda name: (text(name), name))


def some(names: Sequence[str]) -> str:
    """Joins the first five names as text, and says how many more there are."""
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(text, names[:5])) + more


def read_list(path: str) -> str:
    """Reads a text file of names: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Bytes that are not UTF-8 become surrogates, as in names of files, so lists in Latin-1 work, too.

    Raises:
      OSError: the file cannot be read.
      UnicodeDecodeError: the file begins with the mark of UTF-16, but is not valid UTF-16.
    """
    content = Path(path).expanduser().read_bytes()
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # an editor's "Unicode"
    return content.decode("utf-16" if utf16 else "utf-8-sig", "surrogateescape")


def read_class_list(path: str) -> list[str]:
    """Reads a list of class names, one on each line; skips empty lines and lines that begin with #.

    Raises:
      InputError: the file cannot be read, repeats a name or has none.
    """
    try:
        decoded = read_list(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--config.dataset.class_list={path!r} cannot be read ({error}). It must be a text"
            " file (UTF-8) with the name of a class folder on each line; '' takes all folders."
        ) from error
    names = [text(line.strip()) for line in decoded.splitlines()]
    names = [name for name in names if name and not name.startswith("#")]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        wrong = f"repeats {some(twice)}" if twice else "names no class"
        raise InputError(f"The class list {path} {wrong}. It must name each class folder once.")
    return names


def _escape(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode()

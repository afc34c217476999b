"""Names of files and folders: as the disk has them, and as text that can be compared and printed.

Two disks may spell one name with different code points (Ä as one or as two), and a name may hold
bytes that are no UTF-8. Files are opened by the disk's own name; everything else uses `text`.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from layermatch_jax.errors import InputError


def text(name: str) -> str:
    r"""A name or path as valid text in Unicode's composed form (NFC).

    Bytes that are no UTF-8 (which Python holds as surrogates) and control characters become visible
    escapes: the Latin-1 bytes of café give 'caf\xe9'.
    """
    return unicodedata.normalize("NFC", visible(name))


def visible(name: str) -> str:
    """A name or path in the disk's own code points, with the escapes of `text`: one line of UTF-8.

    Programs that open the file by this text find it, unless something had to be escaped.
    """
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\0-\x1f\x7f-\x9f\u2028\u2029]", _escape, name)


def in_order(names: Iterable[str]) -> list[str]:
    """Names or paths sorted by their text: in the same order on every disk."""
    return sorted(names, key=lambda name: (text(name), name))


def some(names: Sequence[str]) -> str:
    """The first five names as text, and how many more there are."""
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(text, names[:5])) + more


def read_list(path: str) -> str:
    """The text of a list of names: UTF-8 with or without a byte order mark, or UTF-16.

    As in names of files, what is no UTF-8 becomes surrogates: lists in Latin-1 work, too.

    Raises:
      OSError: the file cannot be read.
      UnicodeDecodeError: it begins as UTF-16 does and goes on otherwise.
    """
    content = Path(path).expanduser().read_bytes()
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # an editor's "Unicode"
    return content.decode("utf-16" if utf16 else "utf-8-sig", "surrogateescape")


def read_class_list(path: str) -> list[str]:
    """The names in a text file, as `text`: one a line; empty lines and lines with # do not count.

    Raises:
      InputError: the file cannot be read, names a class twice or names none.
    """
    try:
        decoded = read_list(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--config.dataset.class_list={path!r} cannot be read ({error}). It must be a text"
            " file (UTF-8) with the name of one class folder a line; '' takes all folders."
        ) from error
    names = [text(line.strip()) for line in decoded.splitlines()]
    names = [name for name in names if name and not name.startswith("#")]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        wrong = f"names these twice: {some(twice)}" if twice else "names no class"
        raise InputError(f"The class list {path} {wrong}. It must name each class folder once.")
    return names


def _escape(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode()

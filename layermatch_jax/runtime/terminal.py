"""Printing to terminals and log files whose encoding lacks some characters."""

import codecs
import io
import sys

_PLAIN = {
    "±": "+/-", "−": "-", "–": "-", "…": "...", "·": "*", "×": "x", "→": "->", "≤": "<=",
    "≥": ">=", "²": "^2", "‖": "||", "λ": "lambda", "μ": "mu", "τ": "tau",
}  # fmt: skip


def allow_any_text() -> None:
    r"""Lets print write any text to stdout and stderr, whatever their encoding is.

    A character that the encoding lacks is written in ASCII: '±' becomes '+/-', and 'é' '\xe9'. A
    byte of a file name that is not UTF-8, which Python stores as a surrogate, is written as that
    byte.
    """
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # notebooks and tests replace them
            stream.reconfigure(errors="plain")


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    escaped = character.encode("unicode_escape").decode()
    return _PLAIN.get(character, escaped), error.start + 1

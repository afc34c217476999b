"""Makes a page of figures and tables as one self-contained HTML file."""

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

from layermatch_jax.after import figures
from layermatch_jax.errors import InputError


class Picture(NamedTuple):
    """A figure on the page."""

    png: bytes
    width: int  # in CSS pixels
    alt: str  # description for readers who cannot see the figure
    caption: str


class Table(NamedTuple):
    """Text in rows and columns."""

    caption: str
    header: Sequence[str]  # () for none
    rows: Sequence[Sequence[str]]
    folded: bool = False  # hidden until a click


class Note(NamedTuple):
    """A sentence on something that is missing, and why."""

    text: str


def as_picture(figure, alt: str, caption: str) -> Picture:
    """Draws a matplotlib Figure."""
    return Picture(figures.png(figure), round(96 * figure.get_figwidth()), alt, caption)


class Section(NamedTuple):
    """A section of the page. Consecutive pictures stand side by side."""

    title: str
    parts: Sequence[str | Note | Picture | Table]  # a str is a paragraph


def page(title: str, sections: Sequence[Section]) -> str:
    """Makes the HTML of a page. Markup in the texts is escaped.

    Raises:
      InputError: Jinja2 is not installed.
    """
    shown = [section for section in sections if section.parts]
    return template().render(title=title, sections=shown)


def template() -> Any:
    """Loads the Jinja2 template of a page; raises an InputError if Jinja2 is not installed."""
    try:
        import jinja2
    except ImportError:
        raise InputError("reports need Jinja2: pip install jinja2") from None

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "text": _utf8,
        "base64": lambda data: base64.b64encode(data).decode("ascii"),
    }
    kinds = {"picture": Picture, "table": Table, "note": Note}
    environment.tests |= {
        name: lambda part, kind=kind: isinstance(part, kind) for name, kind in kinds.items()
    }
    return environment.get_template("page.html.j2")


def _utf8(text: str) -> str:
    # Names of folders may have bytes that are not UTF-8; Python keeps them as surrogates.
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

"""A page of pictures and tables as one HTML file that needs no other."""

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

from layermatch_jax.after import figures
from layermatch_jax.errors import InputError


class Picture(NamedTuple):
    """A drawing on the page."""

    png: bytes
    width: int  # in CSS pixels
    alt: str  # what is seen, for those who cannot see it
    caption: str


class Table(NamedTuple):
    """Text in rows and columns."""

    caption: str
    header: Sequence[str]  # () for none
    rows: Sequence[Sequence[str]]
    folded: bool = False  # shown when it is asked for


class Note(NamedTuple):
    """A line on what is missing, and why."""

    text: str


def as_picture(figure, alt: str, caption: str) -> Picture:
    """A matplotlib Figure, drawn."""
    return Picture(figures.png(figure), round(96 * figure.get_figwidth()), alt, caption)


class Section(NamedTuple):
    """A part of the page, in order; pictures that follow each other stand side by side."""

    title: str
    parts: Sequence[str | Note | Picture | Table]  # a str is a paragraph


def page(title: str, sections: Sequence[Section]) -> str:
    """The HTML of a page. All texts are taken as they are: what is markup in them is escaped.

    Raises:
      InputError: Jinja2 is not installed.
    """
    shown = [section for section in sections if section.parts]
    return template().render(title=title, sections=shown)


def template() -> Any:
    """The Jinja2 template of a page; raises an InputError where Jinja2 is not installed."""
    try:
        import jinja2
    except ImportError:
        raise InputError("the page needs Jinja2: pip install jinja2") from None

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
    # A folder's name may hold bytes that are no UTF-8, which Python holds as surrogates.
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

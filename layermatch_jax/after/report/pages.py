"""A page of pictures and tables as one HTML file that needs no other."""

import base64
import html
from collections.abc import Sequence
from typing import NamedTuple

from layermatch_jax.after import figures

_STYLE = """
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
nav a { margin-right: 1rem; }
a { color: #00538a; }
.note { border-left: 4px solid #d55e00; padding: 0.2rem 0.8rem; background: #fff6ef; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5rem 2rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 36rem; color: #444; font-size: 0.9rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; min-width: 32rem; font-size: 0.9rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #444; padding-bottom: 0.3rem; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; }
thead th { border-bottom: 2px solid #888; white-space: nowrap; }
tbody th { font-weight: normal; }
td { white-space: nowrap; }
"""


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
    """The HTML of a page. All texts are taken as they are: what is markup in them is escaped."""
    sections = [section for section in sections if section.parts]
    links = [f'<a href="#part{i}">{_text(s.title)}</a>' for i, s in enumerate(sections)]
    body = [f"<h1>{_text(title)}</h1>", f"<nav>{' '.join(links)}</nav>"]
    for i, section in enumerate(sections):
        body += [f'<section id="part{i}">', f"<h2>{_text(section.title)}</h2>"]
        pictures = []
        for part in [*section.parts, None]:  # None: the end
            if isinstance(part, Picture):
                pictures.append(_picture(part))
                continue
            if pictures:
                body += ['<div class="pictures">', *pictures, "</div>"]
                pictures = []
            if isinstance(part, Table):
                body.append(_table(part))
            elif isinstance(part, Note):
                body.append(f'<p class="note">{_text(part.text)}</p>')
            elif part is not None:
                body.append(f"<p>{_text(part)}</p>")
        body.append("</section>")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def _text(text: str) -> str:
    return _escaped(text).replace("\n", "<br>")


def _escaped(text: str) -> str:
    # A folder's name may hold bytes that are no UTF-8, which Python holds as surrogates.
    return html.escape(text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" style="width: {picture.width}px" '
        f'alt="{_escaped(picture.alt)}">'
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    header = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.header)
    header = f"<thead><tr>{header}</tr></thead>\n" if header else ""
    rows = "\n".join(
        f'<tr><th scope="row">{_text(first)}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in table.rows
    )
    body = f"{header}<tbody>\n{rows}\n</tbody>"
    caption = _text(table.caption)
    if table.folded:
        whole = f'<div class="scroll"><table aria-label="{caption}">\n{body}</table></div>'
        return f"<details><summary>{caption}</summary>\n{whole}</details>"
    return f'<div class="scroll"><table>\n<caption>{caption}</caption>\n{body}</table></div>'

"""Formats predictions as lines of CSV or JSON, by the extension of the file."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """The prediction for one image; if it cannot be decoded, only the path and the error."""

    path: str
    classes: Sequence[str] = ()  # the most probable first
    probabilities: Sequence[float] = ()
    entropy: float | None = None  # of all probabilities, nats
    error: str = ""


class Form(NamedTuple):
    """A file format. Every row is exactly one line."""

    header: Callable[[int], str]  # number of classes in a row -> the first line, or ''
    line: Callable[[Row, int], str]
    # a line -> its row with only the most probable class and its probability
    row: Callable[[str], Row]


def _csv(fields: Sequence) -> str:
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerow(fields)
    return written.getvalue()


def _csv_header(top: int) -> str:
    others = [f"{name}_{n}" for n in range(2, top + 1) for name in ("class", "probability")]
    return _csv(["path", "class", "probability", *others, "entropy", "error"])


def _csv_line(row: Row, top: int) -> str:
    if row.error:
        return _csv([row.path, *[""] * (2 * top + 1), row.error])
    pairs = zip(row.classes, map(_number, row.probabilities), strict=True)
    return _csv([row.path, *(x for pair in pairs for x in pair), _number(row.entropy), ""])


def _csv_row(line: str) -> Row:
    (fields,) = csv.reader([line])
    path, name, probability, *_, error = fields
    return Row(path, error=error) if error else Row(path, (name,), (float(probability),))


def _json_line(row: Row, top: int) -> str:
    if row.error:
        return json.dumps({"path": row.path, "error": row.error}) + "\n"
    pairs = [
        {"class": name, "probability": float(_number(probability))}
        for name, probability in zip(row.classes, row.probabilities, strict=True)
    ]
    told = {"path": row.path, **pairs[0], "entropy": float(_number(row.entropy))}
    return json.dumps(told | ({"top": pairs} if top > 1 else {})) + "\n"


def _json_row(line: str) -> Row:
    told = json.loads(line)
    if "error" in told:
        return Row(told["path"], error=told["error"])
    return Row(told["path"], (told["class"],), (told["probability"],))


def _number(x: float) -> str:
    return f"{x:.6g}"


FORMS = {
    ".csv": Form(_csv_header, _csv_line, _csv_row),
    ".jsonl": Form(lambda top: "", _json_line, _json_row),
}

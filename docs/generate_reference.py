"""Writes reference.md, the reference of every config field, from the code.

    python docs/generate_reference.py

Field, default and type come from `config.base()`. The description is the comment at the field in
the source of `base()`. The allowed values are those that `config.validate` names when it refuses a
wrong one. So this file needs no change when a field is added.
"""

import ast
import inspect
import io
import pathlib
import re
import runpy
import sys
import tokenize
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package is used from its checkout

from layermatch_jax import config as config_lib  # noqa: E402
from layermatch_jax.errors import InputError  # noqa: E402

PATH = ROOT / "docs" / "reference.md"

HEAD = """\
# Every setting

<!-- Written by docs/generate_reference.py. Do not edit: change the comments in config.py. -->

`--config=FILE` chooses a config file of [`configs/`](#shipped-configs). `--config.FIELD=VALUE`
sets one field, for example `--config.optimizer.learning_rate=0.01`. An unknown field is refused,
and the message names the nearest one. The file `config.json` in the folder of a run holds the
value of every field.

The defaults below are FixMatch with WRN-28-2 on 32-pixel images. A default of `None` means that
the program chooses the value. "Allowed" is what the program says when it refuses a value; bounds
that depend on other fields are shown for the defaults of those.

## Behind the colon

`--config=FILE:KEY=VALUE,KEY=VALUE` sets several fields at once:

| key | value | sets |
|---|---|---|
| `labels` | a number of images for all classes together (`labels=250`), or a percentage of \
each class (`labels=10%`) | `dataset.num_labels` or `dataset.label_fraction` |
| `method` | a [method](#methods); default `layermatch` | the fields of the method |
| `layerwise` | `True` adds Grad-ReLU and Avg-Clustering to the method | \
`layerwise.gradient_mask`, `avg_clustering.centres` |
| `mask` | a [gradient mask](#gradient-masks), in place of the method's | \
`layerwise.gradient_mask` |
"""


def reference() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_fields(), *_methods(), *_masks(), *_configs()])


# ---------------------------------------------------------------------------------------------
# The fields: a section for each group of config.base().


def _fields() -> list[str]:
    config = config_lib.base()
    comments, expressions = comments_and_defaults(inspect.getsource(config_lib.base))
    order = list(expressions)  # of the source; what is not found there comes last
    groups: dict[str, list[str]] = {}
    for name in sorted(
        config_lib.fields(config), key=lambda x: order.index(x) if x in order else len(order)
    ):
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    lines = []
    for group, names in groups.items():
        lines += [f"## {group or 'The run'}", ""]
        if comments.get(group):
            lines += [_cell(comments[group]), ""]
        lines += ["| field | default | type | meaning | allowed |", "|---|---|---|---|---|"]
        for name in names:
            cells = (
                f"`{name}`",
                default(config, name, expressions.get(name, "")),
                type_of(config, name),
                _cell(comments.get(name, "")),
                allowed(name),
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def comments_and_defaults(source: str) -> tuple[dict[str, str], dict[str, str]]:
    """What the source of a function like `config.base` says of each field.

    A field's comment stands behind it and goes on in the lines below, or it stands in the lines
    above a field that has none behind it. Where both could be meant, a comment behind that ends
    with a comma or semicolon goes on. A comment after an empty line belongs to what follows.

    Args:
      source: of a function that assigns `c.group.field = value`; a group may have a short name, as
        in `c.group = g = ConfigDict()`.

    Returns:
      {dotted name of a field or group: its comment}, and {name: the expression of its default}.
    """
    lines = source.split("\n")
    behind, alone = {}, {}  # line number -> comment behind code, or on a line of its own
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#").strip()
            own_line = lines[token.start[0] - 1].lstrip().startswith("#")
            (alone if own_line else behind)[token.start[0]] = text

    (function,) = ast.parse(source).body
    assigned = [node for node in function.body if isinstance(node, ast.Assign)]
    prefixes, found = {}, []  # short name -> prefix of its fields; (name, statement)
    for statement in assigned:
        attributes = [x for x in statement.targets if isinstance(x, ast.Attribute)]
        shorts = [x.id for x in statement.targets if isinstance(x, ast.Name)]
        names = [_dotted(x, prefixes) for x in attributes]
        if not names:  # c = ConfigDict()
            prefixes |= dict.fromkeys(shorts, "")
            continue
        prefixes |= dict.fromkeys(shorts, f"{names[0]}.")
        found += [(name, statement) for name in names]

    def run(line: int, step: int) -> list[int]:
        """The lines that hold nothing but a comment, from a line on, downwards or upwards."""
        lines = []
        while line in alone:
            lines.append(line)
            line += step
        return sorted(lines)

    above = {s.lineno: run(s.lineno - 1, -1) for _, s in found}
    goes_on = {line for line, text in behind.items() if text.endswith((",", ";"))}
    for _, statement in found:
        lines_above = above[statement.lineno]
        if lines_above and lines_above[0] - 1 in goes_on:
            above[statement.lineno] = []
    taken = {line for _, s in found if s.end_lineno not in behind for line in above[s.lineno]}
    comments, defaults = {}, {}
    for name, statement in found:
        before, last = above[statement.lineno], statement.end_lineno
        text = []
        if last not in behind or (before and not lines[before[0] - 2].strip()):
            text += [alone[line] for line in before]
        if last in behind:
            text += [behind[last], *(alone[x] for x in run(last + 1, 1) if x not in taken)]
        comments[name] = " ".join(text)
        defaults[name] = ast.unparse(statement.value)
    return comments, defaults


def _dotted(node: ast.Attribute, prefixes: dict[str, str]) -> str:
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return prefixes[node.id] + ".".join(reversed(names))


def default(config: Any, name: str, expression: str) -> str:
    """A field's default; beside the expression where that says more, as 2**20 does."""
    value = config_lib.fields(config)[name]
    if re.fullmatch(r"\d[\d ./*]*[*/][\d ./*]*", expression):
        return (
            f"`{expression}` = {value:,.4g}"
            if isinstance(value, float)
            else f"`{expression}` = {value:,}"
        )
    return f"`{value!r}`"


def type_of(config: Any, name: str) -> str:
    """A field's type, also where its default is None."""
    *groups, field = name.split(".")
    for group in groups:
        config = config[group]
    return config.get_type(field).__name__


def allowed(name: str) -> str:
    """The values of a field that `config.validate` allows; '' where it refuses no value as such."""
    config = config_lib.base()
    number = {"int": 1, "float": 0.5}
    for other, value in config_lib.fields(config).items():
        if value is None and (kind := type_of(config, other)) in number:
            config.update_from_flattened_dict({other: number[kind]})
    wrong = {"int": -1, "float": -1.0, "str": "?"}.get(type_of(config, name))
    if wrong is None:
        return ""
    config.update_from_flattened_dict({name: wrong})
    try:
        config_lib.validate(config)
    except InputError as error:
        message = str(error).split("\n")[0]
        if message.startswith((f"unknown --config.{name} ", f"unknown {name} ")):
            values = message.partition("There are: ")[2].split(", ")
            return ", ".join(f"`{value}`" for value in values if value)
        if message.startswith(f"--config.{name}={wrong} ") and "must be " in message:
            return _cell(message.partition("must be ")[2].partition(":")[0])
    return ""


# ---------------------------------------------------------------------------------------------
# What has a name.


def _methods() -> list[str]:
    lines = [
        "## Methods",
        "",
        "`:method=NAME` sets these fields. `NAME+layerwise` sets those of `layermatch`, too.",
        "",
        "| method | fields |",
        "|---|---|",
    ]
    return [*lines, *(_row(f"`{name}`", x) for name, x in config_lib.METHODS.items()), ""]


def _masks() -> list[str]:
    lines = [
        "## Gradient masks",
        "",
        "`:mask=NAME` sets `layerwise.gradient_mask`. The name says which layers pseudo-labels do",
        "*not* train. A stage that the network does not have is refused. The pairs are (regular",
        "expression on the path of a parameter, multiplier):",
        "",
    ]
    for name, pairs in config_lib.MASKS.items():  # a list: in a table, code cannot hold a "|"
        shown = ", ".join(f"`({pattern!r}, {multiplier})`" for pattern, multiplier in pairs)
        lines.append(f"- `{name}`: {shown or 'no pair'}")
    return [*lines, ""]


def _configs() -> list[str]:
    lines = [
        "## Shipped configs",
        "",
        "The fields in which each file of `configs/` differs from the defaults, with",
        "`:method=fixmatch`. The head of each file has its cost and the published numbers.",
        "",
        "| config | fields |",
        "|---|---|",
    ]
    before = config_lib.fields(config_lib.base())
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem.startswith("_"):
            continue
        config = runpy.run_path(str(path))["get_config"]("method=fixmatch")
        fields = config_lib.fields(config).items()
        lines.append(_row(f"`{path.name}`", {k: v for k, v in fields if v != before[k]}))
    return [*lines, ""]


def _row(name: str, values: dict[str, Any]) -> str:
    shown = ", ".join(f"`{field}={value!r}`" for field, value in values.items())
    return f"| {name} | {shown} |"


def _cell(text: str) -> str:
    """A comment as a cell of a table."""
    return re.sub(r"([|*<])", r"\\\1", text)


if __name__ == "__main__":
    PATH.write_text(reference().rstrip() + "\n", encoding="utf-8")
    print(PATH)

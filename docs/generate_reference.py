"""Writes reference.md, the reference of every setting, from the code.

    python docs/generate_reference.py

Default, meaning and bounds stand in `config.SETTINGS`, and those of policies in their files.
"""

import pathlib
import re
import runpy
import sys
import textwrap
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package is used from its checkout

from layermatch_jax import config as config_lib  # noqa: E402
from layermatch_jax import presets  # noqa: E402
from layermatch_jax.setting import Setting  # noqa: E402

PATH = ROOT / "docs" / "reference.md"

HEAD = """\
# Every setting

<!-- Written by docs/generate_reference.py. Do not edit: change SETTINGS in the code. -->

`--config=NAME` loads a [shipped config](#shipped-configs), `--config=PATH.py` a
[file of your own](running.md#a-config-file-of-your-own). `--config.FIELD=VALUE` sets one field, for
example `--config.optimizer.learning_rate=0.01`. An unknown field is an error, and the message names
the nearest one. The file `config.json` in the folder of a run has the value of every field.

**Three defaults.** The defaults in the tables of this page are those before a config file is
applied: FixMatch with WRN-28-2 on CIFAR-10. A shipped config [changes some of
them](#shipped-configs), and `--config=NAME` without `:method=` trains LayerMatch. Without any
`--config`, the program takes `--config=digits`.

**`automatic`** means that the program computes the value from other settings or, for `policy.…`,
takes the default of the policy (in parentheses). `config.json` has the value.
`--config.FIELD=None` makes a setting automatic again. **`none`** means that nothing is set.

If two settings cannot be used together, the program stops and gives the reason
(`layermatch_jax/rules.py`).

## After the colon

`--config=NAME:KEY=VALUE,KEY=VALUE` sets several fields at once:

| key | value | sets |
|---|---|---|
| `labels` | a number of images for all classes together (`labels=250`), or a percentage of \
each class (`labels=10%`) | `dataset.num_labels` or `dataset.label_fraction` |
| `method` | a [method](#methods); default `layermatch` | the fields of the method |
| `layerwise` | `True`: the same as `+layerwise` after the method | \
`layerwise.gradient_mask`, `avg_clustering.centers` |
| `mask` | a [gradient mask](#gradient-masks), in place of the method's | \
`layerwise.gradient_mask` |
"""


def reference() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_fields(), *_changeable(), *_methods(), *_masks(), *_configs()])


# ---------------------------------------------------------------------------------------------
# The fields: a section for each group of config.base().


def _fields() -> list[str]:
    groups: dict[str, list[str]] = {}
    for name in config_lib.SETTINGS:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    lines = []
    for group, names in groups.items():
        lines += [f"## {group or 'The run'}", ""]
        lines += ["| field | default | type | meaning | allowed |", "|---|---|---|---|---|"]
        for name in names:
            setting = config_lib.SETTINGS[name]
            cells = (
                f"`{name}`",
                default(setting),
                setting.type.__name__,
                _cell(setting.meaning),
                allowed(setting),
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def default(setting: Setting) -> str:
    """The default, as a reader would write it."""
    if setting.default is None or callable(setting.default):
        return "none" if setting.type is str else "automatic"
    if setting.default == 2**20:
        return "`2**20` = 1,048,576"
    return f"`{setting.default!r}`"


def allowed(setting: Setting) -> str:
    """The values that the setting may have; '' where there are no bounds."""
    if setting.choices:
        return ", ".join(f"`{value}`" for value in setting.choices)
    limits = (
        ("at least", setting.low),
        ("above", setting.above),
        ("at most", setting.high),
        ("below", setting.below),
    )
    return " and ".join(f"{words} {limit}" for words, limit in limits if limit is not None)


def _changeable() -> list[str]:
    lines = [
        "## Settings that a run may change",
        "",
        "A run can [continue](running.md#the-folder-of-a-run) with other values of these fields,",
        "because they do not change its result. All other fields must stay as they are.",
        "",
    ]
    fields = [name for name in config_lib.RESULT_NEUTRAL if name != "applied_method"]
    listed = ", ".join(f"`{name}`" for name in fields)
    return [*lines, textwrap.fill(f"{listed}.", 100, break_on_hyphens=False), ""]


# ---------------------------------------------------------------------------------------------
# What has a name.


def _methods() -> list[str]:
    lines = [
        "## Methods",
        "",
        "`:method=NAME` sets these fields. `NAME+layerwise` also sets the fields of `layermatch`;",
        "`NAME+grad_relu` and `NAME+avg_clustering` set only one of these two.",
        "",
        "| method | fields |",
        "|---|---|",
    ]
    return [*lines, *(_row(f"`{name}`", x) for name, x in presets.METHODS.items()), ""]


def _masks() -> list[str]:
    lines = [
        "## Gradient masks",
        "",
        "`:mask=NAME` sets `layerwise.gradient_mask`. The name says which layers the pseudo-labels",
        "do *not* train. A stage that the network does not have is an error. The pairs are",
        "(regular expression on the path of a parameter, multiplier):",
        "",
    ]
    for name, pairs in presets.MASKS.items():  # a list: in a table, code cannot hold a "|"
        shown = ", ".join(f"`({pattern!r}, {multiplier})`" for pattern, multiplier in pairs)
        lines.append(f"- `{name}`: {shown or 'no pair'}")
    return [*lines, ""]


def _configs() -> list[str]:
    lines = [
        "## Shipped configs",
        "",
        "The fields in which each file of `configs/` differs from the defaults, with",
        "`:method=fixmatch`. The comment at the top of each file has the computing time of a run",
        "and the accuracies that papers report.",
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
        lines.append(_row(f"`{path.stem}`", {k: v for k, v in fields if v != before[k]}))
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

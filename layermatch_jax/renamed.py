"""The table of names that changed since earlier versions, and functions that apply it.

Config files, flags, and the files and checkpoints of earlier runs are read through this table.
Files are written with the new names only.
"""

from typing import Any

# Config fields: {old name: new name}.
FIELDS = {"avg_clustering.centres": "avg_clustering.centers"}
# Values of a config field: {field: {old value: new value}}.
VALUES = {"avg_clustering.target_head": {"centres": "centers"}}
# Parts of a method's name, as in 'fixmatch+centers=features'.
IN_METHODS = {"+centres=": "+centers="}
# Keys of result.json.
RESULTS = {"centres": "centers"}
# Parts of the train state, at any depth.
STATES = {"centres": "centers"}
# Sums of the window (metrics since the last log line).
SUMS = {"regulariser": "loss_fairness"}


def fields(values: dict[str, Any]) -> dict[str, Any]:
    """Translates config fields {dotted name: value} to today's names and values."""
    today = {FIELDS.get(name, name): value for name, value in values.items()}
    for name, words in VALUES.items():
        if name in today:
            today[name] = words.get(today[name], today[name])
    return today


def in_result(content: dict[str, Any]) -> dict[str, Any]:
    """Translates the content of result.json to today's names."""
    today = {RESULTS.get(key, key): value for key, value in content.items()}
    return today | {"method": method_name(today["method"])} if "method" in today else today


def method_name(name: str, back: bool = False) -> str:
    """Translates a method's name to today's; with `back`, to that of earlier versions."""
    for old, new in IN_METHODS.items():
        name = name.replace(*((new, old) if back else (old, new)))
    return name


def tree(state: Any, names: dict[str, str]) -> Any:
    """Renames the keys of nested dictionaries by `names`, {old: new}; other keys stay."""
    if not isinstance(state, dict):
        return state
    return {names.get(key, key): tree(part, names) for key, part in state.items()}


def backwards(names: dict[str, str]) -> dict[str, str]:
    """Inverts a table: {new name: old name}."""
    return {new: old for old, new in names.items()}

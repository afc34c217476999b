"""Reads checkpoints of earlier versions, in which parts are missing or have other names.

The table of names is in renamed.py.
"""

import numpy as np

from layermatch_jax import renamed

# Parts of a run that earlier versions did not save; the template's values replace them.
_ADDED = ("clock", "lines")
# Parts of the train state that earlier versions did not have. Their checkpoints fit a train state
# in which these parts are empty.
_ADDED_TO_STATE = ("head_stats",)


def as_saved(template: dict, saved: dict) -> dict:
    """Converts the template of a run to the structure of the version that saved the checkpoint.

    Args:
      template: {part: tree}, today's structure.
      saved: {part: tree}, the structure in the checkpoint.
    """
    run = {name: part for name, part in template.items() if name in saved or name not in _ADDED}
    if "state" in run:
        before = saved.get("state", {})
        run["state"] = {
            name: part
            for name, part in run["state"].items()
            if name in before or name not in _ADDED_TO_STATE or part
        }
        if before.keys() & renamed.STATES.keys():
            run["state"] = renamed.tree(run["state"], renamed.backwards(renamed.STATES))
    return _with_sums(run, _earlier_sums(_sums(template), _sums(saved)))


def as_today(restored: dict, template: dict) -> dict:
    """Converts a run that was restored in the structure of `as_saved` to that of the template."""
    run = {name: template[name] for name in _ADDED if name in template} | restored
    if "state" in run:
        empty = {name: {} for name in _ADDED_TO_STATE if name in template["state"]}
        run["state"] = empty | renamed.tree(run["state"], renamed.STATES)
    return _with_sums(run, _sums_of_today(_sums(restored), _sums(template)))


def _sums(run: dict) -> dict:
    return run.get("window", {}).get("sums", {})


def _with_sums(run: dict, sums: dict) -> dict:
    return run | {"window": run["window"] | {"sums": sums}} if "window" in run else run


def _earlier_sums(today: dict, saved: dict) -> dict:
    """Puts the sums under their earlier names, as zeros.

    Every method of earlier versions has these sums, even where today's method has none.
    """
    sums = dict(today)
    for before, now in renamed.SUMS.items():
        if before in saved and before not in today:
            sums.pop(now, None)
            sums[before] = np.zeros(saved[before].shape, saved[before].dtype)
    return sums


def _sums_of_today(restored: dict, today: dict) -> dict:
    named = {renamed.SUMS.get(name, name): value for name, value in restored.items()}
    return {name: value for name, value in named.items() if name in today}

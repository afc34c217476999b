"""Checkpoints of earlier versions: what they do not hold. renamed.py has what changed its name."""

import numpy as np

from layermatch_jax import renamed

# Parts of a run that were not saved: the run goes on with the template's.
_ADDED = ("clock", "lines")
# Parts of the train state that were not there: only an empty one can be read as today's.
_ADDED_TO_STATE = ("head_stats",)


def as_saved(template: dict, saved: dict) -> dict:
    """The template of a run in the form of the version that saved it.

    Args:
      template: {part: tree}, the form of today.
      saved: {part: tree}, the form in the checkpoint.
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
    """What was read in the form of `as_saved`, in the form of the template."""
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
    """Every method had the sums of an earlier name: as zero, where it has none today."""
    sums = dict(today)
    for before, now in renamed.SUMS.items():
        if before in saved and before not in today:
            sums.pop(now, None)
            sums[before] = np.zeros(saved[before].shape, saved[before].dtype)
    return sums


def _sums_of_today(restored: dict, today: dict) -> dict:
    named = {renamed.SUMS.get(name, name): value for name, value in restored.items()}
    return {name: value for name, value in named.items() if name in today}

"""Checkpoints of earlier versions: what they do not hold, and what they call by other names."""

# Parts of a run that were not saved: the run goes on with the template's.
_ADDED = ("clock", "lines")
# Parts of the train state that were not there: only an empty one can be read as today's.
_ADDED_TO_STATE = ("head_stats",)
# Sums of the window (metrics since the last log line): today's name, and the name before.
_RENAMED = {"loss_fairness": "regulariser"}


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
    names = {new: old for new, old in _RENAMED.items() if old in _sums(saved)}
    return _rename_sums(run, names)


def as_today(restored: dict, template: dict) -> dict:
    """What was read in the form of `as_saved`, in the form of the template."""
    names = {old: new for new, old in _RENAMED.items() if new in _sums(template)}
    run = {name: template[name] for name in _ADDED if name in template} | restored
    if "state" in run:
        empty = {name: {} for name in _ADDED_TO_STATE if name in template["state"]}
        run["state"] = empty | run["state"]
    return _rename_sums(run, names)


def _sums(run: dict) -> dict:
    return run.get("window", {}).get("sums", {})


def _rename_sums(run: dict, names: dict[str, str]) -> dict:
    if not names:
        return run
    sums = {names.get(name, name): value for name, value in _sums(run).items()}
    return run | {"window": run["window"] | {"sums": sums}}

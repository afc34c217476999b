"""The settings that a config leaves open, computed from its others."""

from typing import Any

import ml_collections

from layermatch_jax import config as config_lib
from layermatch_jax.errors import InputError

CLASSIC = 0.999  # the field's decay of averages over the steps of a run, of 2^20 steps as a rule
_READ_MOMENTUM = ("adamatch", "freematch", "softmatch")  # policies
_TEMPERATURE = {"uda": 0.4, "dash": 0.5}  # of the papers, by policy


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Fills in what a config leaves open: every program below the command line reads the result.

    Each field that is None gets its number, unless nothing reads it: the decays of averages, so
    that they remember at most a tenth of the run; the temperature of soft pseudo-labels. `method`
    becomes the one name of what the run does. To resolve twice changes nothing.

    Args:
      config: a whole config; left as it is.

    Returns:
      A new config.

    Raises:
      InputError: an unknown field or method, None in a field that cannot be automatic, or a
        `method` that was changed without its settings.
    """
    values = config_lib.fields(config)
    for name, default in config_lib.fields(config_lib.base()).items():
        if default is not None and values.get(name, default) is None:
            raise InputError(
                f"--config.{name}=None: this setting is never automatic. Its default is {default!r}"
            )
    config = config_lib.from_fields(values)
    if config.method != config.applied_method:
        raise InputError(
            f"--config.method={config.method} alone would change the name and keep the settings of "
            f"{config.applied_method!r}. Write --config=FILE:method={config.method}"
        )
    config.method = config.applied_method = config_lib.method_name(
        config.method, config.layerwise.gradient_mask, config.avg_clustering.centres
    )
    automatic = _automatic(config).items()
    config.update_from_flattened_dict(
        {name: x for name, x in automatic if values.get(name) is None}
    )
    return config


def memory(train_steps: int, classic: float = CLASSIC) -> float:
    """The classic decay of an average, lowered so that it remembers at most a tenth of the run.

    An average with decay d remembers about 1 / (1 - d) steps.
    """
    return min(classic, max(0.0, 1 - 10 / max(train_steps, 1)))


def explained(config: ml_collections.ConfigDict) -> list[str]:
    """Sentences for the user on automatic values other than the classic ones.

    Args:
      config: of `resolve`.
    """
    tenth = memory(config.train_steps)
    read = {"ema_decay", "model.bn_decay"}
    if config.policy.name in _READ_MOMENTUM:
        read.add("policy.momentum")
    if config.avg_clustering.centres == "classifier":
        read.add("avg_clustering.momentum")
    values = config_lib.fields(config)
    lowered = [f"{name}={tenth:g}" for name in sorted(read) if values[name] == tenth < CLASSIC]
    if not lowered:
        return []
    return [f"Averages remember a tenth of the run: {', '.join(lowered)} (classic: {CLASSIC})"]


def _automatic(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The automatic value of every field that has one; None where nothing reads the field."""
    tenth = memory(config.train_steps)
    return {
        "ema_decay": tenth,
        "model.bn_decay": tenth,
        "policy.momentum": tenth,
        "policy.temperature": _TEMPERATURE.get(config.policy.name),
        "avg_clustering.momentum": {
            "classifier": tenth,
            "features": memory(config.train_steps, 0.99),
            "outputs": 0.6,  # per visit of an image
        }.get(config.avg_clustering.centres),
    }

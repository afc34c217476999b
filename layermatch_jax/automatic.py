"""Computes the settings that a config leaves open from its other settings."""

import pathlib
from typing import Any

import ml_collections

from layermatch_jax import config as config_lib
from layermatch_jax import presets
from layermatch_jax.errors import InputError
from layermatch_jax.method.policies import POLICIES
from layermatch_jax.setting import CLASSIC_DECAY, memory


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Fills in the settings that a config leaves open; the rest of the program reads the result.

    Each setting that is None gets a value if the run reads it: decays of averages, such that they
    remember at most a tenth of the run, and the defaults of the run's policy. Settings of other
    policies become None; `unread` names those that had a value. `method` becomes the canonical
    name (`presets.method_name`). Resolving a second time changes nothing.

    Args:
      config: a whole config; not changed.

    Returns:
      A new config.

    Raises:
      InputError: an unknown setting or method, None in a setting that cannot be automatic, or a
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
    config.method = config.applied_method = presets.method_name(
        config.method, config.layerwise.gradient_mask, config.avg_clustering.centers
    )
    config.update_from_flattened_dict(dict.fromkeys(unread(config)))
    if presets.trains_nothing(config.method):
        config.train_steps = 0
    automatic = _automatic(config).items()
    config.update_from_flattened_dict({name: x for name, x in automatic if values[name] is None})
    return config


def unread(config: ml_collections.ConfigDict) -> list[str]:
    """Names the settings of other policies that have a value: the run does not read them."""
    policy = POLICIES.get(config.policy.name)
    own = {"name", *(policy.SETTINGS if policy else ())}
    return [
        f"policy.{name}" for name, x in config.policy.items() if name not in own and x is not None
    ]


def ignored(config: ml_collections.ConfigDict) -> list[str]:
    """Tells the user which settings have a value that the run does not read; a list of sentences.

    Args:
      config: not yet resolved.
    """
    names, policy, told = unread(config), config.policy.name, []
    if config.train_steps and presets.trains_nothing(config.method):
        told += [
            f"Not read: train_steps={config.train_steps}, because the method {config.method} only "
            "fits the classifier, before the first step"
        ]
    if not names:
        return told
    given = ", ".join(f"{name}={config_lib.fields(config)[name]}" for name in names)
    own = ", ".join(f"policy.{name}" for name in POLICIES[policy].SETTINGS) or "none"
    return [*told, f"Not read by the policy {policy}: {given}. Its settings: {own}"]


def explained(config: ml_collections.ConfigDict) -> list[str]:
    """Tells the user which automatic values are not the classic ones; a list of sentences.

    Args:
      config: resolved.
    """
    tenth = memory(config.train_steps)
    read = {"ema_decay", "model.bn_decay", "policy.momentum"}
    if config.avg_clustering.centers == "classifier":
        read.add("avg_clustering.momentum")
    values, told = config_lib.fields(config), []
    if config.dataset.name == "folder" and config.dataset.evaluate_on == "cross_validation":
        told += [
            "The accuracy is an estimate by cross-validation of the labels (linear probes on the "
            "features), not that of test images"
        ]
    lowered = [f"{name}={tenth:g}" for name in sorted(read) if values[name] == tenth]
    if tenth == CLASSIC_DECAY or not lowered or not config.train_steps:
        return told
    return [
        *told,
        f"Averages remember a tenth of the run: {', '.join(lowered)} (classic: {CLASSIC_DECAY})",
    ]


def _automatic(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns {dotted name: automatic value} of every setting that has one."""
    policy = POLICIES.get(config.policy.name)  # rules.py refuses an unknown policy
    own = {f"policy.{name}": x for name, x in (policy.SETTINGS if policy else {}).items()}
    values = {
        name: setting.default(config.train_steps) if callable(setting.default) else setting.default
        for name, setting in (config_lib.SETTINGS | own).items()
        if callable(setting.default) or name in own
    }
    tested = config.dataset.name != "folder" or _has_test_images(config.dataset.data_dir)
    of_others = config.model.name == "resnet50" and config.model.pretrained
    return values | {
        "model.bn_epsilon": 1e-5 if of_others else 1e-3,
        "dataset.evaluate_on": "test" if tested else "cross_validation",
        "model.head_init": "weights" if config.model.pretrained else "random",
        "avg_clustering.momentum": {
            "classifier": memory(config.train_steps),
            "features": memory(config.train_steps, 0.99),
            "outputs": 0.6,  # for each visit of an image
        }.get(config.avg_clustering.centers),
    }


def _has_test_images(data_dir: str) -> bool:
    """Tells whether an image folder has a folder test or val, in capitals or not."""
    root = pathlib.Path(data_dir).expanduser()
    if not root.is_dir():
        return True  # the source says what is wrong
    return any(path.name.lower() in ("test", "val") and path.is_dir() for path in root.iterdir())

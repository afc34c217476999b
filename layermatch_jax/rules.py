"""Rules that refuse a config that cannot run, or that its user cannot have meant.

A rule gets the whole config and returns what is wrong and how to mend it, or None.
"""

import math
import re

import ml_collections

from layermatch_jax import config as config_lib
from layermatch_jax import presets
from layermatch_jax.errors import InputError
from layermatch_jax.method.policies import POLICIES

# Multiples of input.steps_per_call, because a call of the train program is not interrupted.
_PERIODS = ("train_steps", "log_every", "eval_every", "checkpoint_every")


def validate(config: ml_collections.ConfigDict, num_devices: int = 1) -> None:
    """Refuses a config that cannot run, before anything is loaded or written.

    Args:
      config: the whole config, resolved (automatic.resolve).
      num_devices: number of devices of all hosts together; they share each batch.

    Raises:
      InputError: says what was wrong, what is allowed and how to mend it.
    """
    values = config_lib.fields(config)
    own = POLICIES[config.policy.name].SETTINGS if config.policy.name in POLICIES else {}
    of_policy = {f"policy.{name}": setting for name, setting in own.items()}
    for name, setting in (config_lib.SETTINGS | of_policy).items():
        setting.check(name, values[name])
    for rule in RULES:
        if wrong := rule(config):
            raise InputError(wrong)
    if wrong := _not_divisible(config, num_devices):
        raise InputError(wrong)


def _padding(config) -> str | None:
    padding, largest = config.dataset.padding, config.dataset.stored_size - 1
    if padding > largest:
        return (
            f"--config.dataset.padding={padding} must be at most {largest}: a reflected border "
            "cannot be wider than the image (stored_size - 1)"
        )
    return None


def _crop(config) -> str | None:
    padded = config.dataset.stored_size + 2 * config.dataset.padding
    if config.dataset.image_size > padded:
        return (
            f"--config.dataset.image_size={config.dataset.image_size} is more than stored_size + "
            f"2 · padding = {padded} pixels: no crop fits"
        )
    return None


def _no_unlabeled_images(config) -> str | None:
    if config.unsupervised_weight > 0 and config.unlabeled_ratio == 0:
        return (
            "an unsupervised loss needs unlabeled images: set --config.unlabeled_ratio to 1 or "
            "more, or use :method=supervised"
        )
    return None


def _target_head(config) -> str | None:
    settings = config.avg_clustering
    if settings.target_head == "centers" and settings.centers != "classifier":
        return (
            "--config.avg_clustering.target_head=centers needs --config.avg_clustering.centers="
            "classifier: only these centers are a classifier that can label"
        )
    return None


def _policy_of_the_method(config) -> str | None:
    # A run is named after its method, so settings that make it another method are refused.
    method = presets.base_method(config.method)
    policy = presets.METHODS[method].get("policy.name", "fixed_threshold")
    if config.policy.name != policy:
        name = {"fixed_threshold": "fixmatch"}.get(config.policy.name, config.policy.name)
        return (
            f"--config.policy.name={config.policy.name} is not the policy of {config.method} "
            f"({policy}). Write --config=FILE:method={name}, which sets its other settings, too"
        )
    return None


def _weight_of_the_method(config) -> str | None:
    if (config.unsupervised_weight > 0) != presets.has_unsupervised_loss(config.method):
        without = [name for name in presets.METHODS if not presets.has_unsupervised_loss(name)]
        return (
            f"--config.unsupervised_weight={config.unsupervised_weight} with method "
            f"{config.method}: the weight is 0 for {', '.join(without)} and above 0 for all other "
            "methods"
        )
    return None


def _supervised(config) -> str | None:
    if presets.has_unsupervised_loss(config.method):
        return None
    method = presets.base_method(config.method)
    if config.layerwise.gradient_mask or config.avg_clustering.centers != "none":
        return (
            f"{method} has no unsupervised gradient, so --config.layerwise.gradient_mask and "
            "--config.avg_clustering.centers have no effect. Leave them out"
        )
    if config.layer_report.at_steps:
        return (
            f"--config.layer_report.at_steps: {method} has no pseudo-labels whose gradients a "
            "report could compare. Leave it out"
        )
    return None


def _head_of_pretrained_weights(config) -> str | None:
    head, method = config.model.head_init or "random", presets.base_method(config.method)
    if presets.trains_nothing(method) and config.model.head_init not in (None, method):
        return f"--config.model.head_init={head} with method {method}: leave model.head_init out"
    if not config.model.pretrained and head not in ("random", "zeros"):
        return (
            f"--config.model.head_init={head}"
            + (f" (of method {method})" if head == method else "")
            + " needs a backbone with pretrained weights: set --config.model.pretrained "
            "(docs/pretrained.md)"
        )
    return None


def _kept_batch_stats(config) -> str | None:
    if config.model.batch_stats == "kept" and not config.model.pretrained:
        return (
            "--config.model.batch_stats=kept keeps BatchNorm's running statistics, but those of "
            "random weights mean nothing. Set --config.model.pretrained, or leave it out"
        )
    return None


def _drop_path(config) -> str | None:
    if config.model.drop_path and not config.model.name.startswith("vit"):
        return (
            f"--config.model.drop_path={config.model.drop_path}: only transformers (vit_…) have "
            f"branches to drop, not {config.model.name}. Leave it out"
        )
    return None


def _cached_views(config) -> str | None:
    said = f"--config.input.cache_views={config.input.cache_views}"
    if not config.input.cache_views:
        return None
    if config.model.name == "linear":
        return f"{said}: --config.model.name=linear cannot be divided into two parts"
    if config.layer_report.at_steps:
        return f"{said} excludes --config.layer_report.at_steps, which needs new views. Drop one"
    if config.policy.name == "vat":
        return f"{said} excludes :method=vat, which changes the images in each step. Leave it out"
    return None


def _no_steps(config) -> str | None:
    if config.train_steps == 0 and not presets.trains_nothing(config.method):
        meaning = config_lib.SETTINGS["train_steps"].meaning
        return f"--config.train_steps=0 must be at least 1. {meaning}"
    return None


def _teacher(config) -> str | None:
    settings = config.avg_clustering
    brings = settings.centers == "outputs" or settings.target_head == "centers"
    if config.policy.name == "mean_teacher" and brings:
        return (
            "--config.policy.name=mean_teacher takes its targets from the EMA model, so averaged "
            "ones would never be used. Set --config.avg_clustering.centers to classifier, features "
            "or none, and --config.avg_clustering.target_head to classifier"
        )
    return None


def _forward_mode(config) -> str | None:
    if config.policy.name == "vat" and config.model.name == "efficientnet_lite0":
        return (
            ":method=vat needs the forward-mode derivative of the network, which "
            "--config.model.name=efficientnet_lite0 does not have (its depthwise convolutions). "
            "Use another network or method"
        )
    return None


def _centers_of_the_policy(config) -> str | None:
    allowed = getattr(POLICIES[config.policy.name], "CENTERS", None)
    if allowed and config.avg_clustering.centers not in allowed:
        return (
            f"--config.avg_clustering.centers={config.avg_clustering.centers} has no meaning for "
            f"{config.policy.name}, whose targets are not pseudo-labels of single images. Set it "
            f"to one of {', '.join(allowed)}"
        )
    return None


def _steps_per_call(config) -> str | None:
    values = config_lib.fields(config)
    K, periods = config.input.steps_per_call, [values[name] for name in _PERIODS]
    if K > 1 and config.input.backend != "device":
        return (
            f"--config.input.steps_per_call={K} needs --config.input.backend=device, which makes "
            "the batches inside the train program"
        )
    if math.gcd(K, *periods) != K:
        common = math.gcd(*periods)
        allowed = ", ".join(str(k) for k in range(1, common + 1) if common % k == 0)
        return (
            f"--config.input.steps_per_call={K} does not divide {', '.join(_PERIODS)} = "
            f"{', '.join(map(str, periods))}. Use one of {allowed}, or change these settings"
        )
    return None


def _steps_of_layer_reports(config) -> str | None:
    K = config.input.steps_per_call
    for step in config.layer_report.at_steps:
        if not (isinstance(step, int) and 1 <= step <= config.train_steps and step % K == 0):
            return (
                f"--config.layer_report.at_steps: {step!r} is not allowed. Give whole numbers from "
                f"1 to train_steps = {config.train_steps}"
                + (f", multiples of input.steps_per_call = {K}" if K > 1 else "")
            )
    return None


def _gradient_mask(config) -> str | None:
    for pair in config.layerwise.gradient_mask:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
            return (
                f"gradient mask entry {pair!r}: write (regular expression, multiplier), as in "
                "--config.layerwise.gradient_mask=\"(('classifier/.*', 0.0),)\", or choose a named "
                f"one by --config=FILE:mask=NAME: {', '.join(presets.MASKS)}"
            )
        if not (isinstance(pair[1], (int, float)) and 0 <= pair[1] <= 1):
            return f"gradient mask {pair[0]!r}: multiplier {pair[1]!r} is not in [0, 1]"
        try:
            re.compile(pair[0])
        except re.error as error:
            return f"gradient mask {pair[0]!r} is not a regular expression: {error}"
    return None


RULES = (
    _padding,
    _crop,
    _no_unlabeled_images,
    _target_head,
    _policy_of_the_method,
    _weight_of_the_method,
    _supervised,
    _head_of_pretrained_weights,
    _kept_batch_stats,
    _drop_path,
    _cached_views,
    _no_steps,
    _teacher,
    _centers_of_the_policy,
    _forward_mode,
    _steps_per_call,
    _steps_of_layer_reports,
    _gradient_mask,
)


def _not_divisible(config, num_devices: int) -> str | None:
    uneven = []
    for name in ("batch_size", "eval_batch_size"):
        size = config[name]
        if size % num_devices:
            below = size - size % num_devices
            allowed = " or ".join(str(n) for n in (below, below + num_devices) if n)
            uneven.append(f"--config.{name}={size} (use {allowed})")
    return f"not divisible by {num_devices} devices: {', '.join(uneven)}" if uneven else None

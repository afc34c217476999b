"""Named methods and gradient masks, and the argument after the colon of --config=FILE:ARGUMENT.

A config file starts from `config.base()`, sets what its data set needs, and ends with `apply_arg`,
so that arguments such as `labels=250,method=fixmatch` work with every config file.
"""

import hashlib
import json
from typing import Any

import ml_collections

from layermatch_jax.config import base, fields
from layermatch_jax.errors import InputError, unknown
from layermatch_jax.method.policies import POLICIES

GRAD_RELU = (("classifier/.*", 0.0),)

# Named gradient masks, for ablations. A name says which layers pseudo-labels do not train:
# from_stage3 means stage 3 and all later layers, with the classifier; to_stage1 means the stem and
# stage 1. All backbones name their layers alike (models/__init__.py), so one list serves them all.
# A mask with a stage that the network does not have is refused. With three stages, from_stage3 is
# the last stage and to_stage1 the first half; with four (as in all pretrained networks),
# from_stage4 and to_stage2.
_LAST = ("(backbone/final_norm|classifier)/.*", 0.0)  # WideResNet and transformers have final_norm
MASKS = {
    "none": (),  # FixMatch
    "half_classifier": (("classifier/.*", 0.5),),
    "classifier": GRAD_RELU,
    "from_stage4": (("backbone/stage4.*", 0.0), _LAST),
    "from_stage3": (("backbone/stage[3-4].*", 0.0), _LAST),
    "from_stage2": (("backbone/stage[2-4].*", 0.0), _LAST),
    "everything": ((".*", 0.0),),  # unlabeled images count in BatchNorm's statistics alone
    "to_stage1": (("backbone/stem/.*", 0.0), ("backbone/stage1.*", 0.0)),
    "to_stage2": (("backbone/stem/.*", 0.0), ("backbone/stage[1-2].*", 0.0)),
    "backbone": (("backbone/.*", 0.0),),  # the reverse of Grad-ReLU
}

# A method is a set of settings; the others keep the values of base(). Each policy has a method of
# the same name, except fixed_threshold, whose method is fixmatch.
METHODS = {
    "supervised": {"unsupervised_weight": 0.0},  # no unlabeled image is loaded then
    # Frozen backbones: a run of no steps, whose classifier is fitted before the first one.
    **{
        name: {"unsupervised_weight": 0.0, "train_steps": 0, "model.head_init": name}
        for name in ("probe", "self_training")
    },
    "fixmatch": {},
    **{
        name: {"policy.name": name} | getattr(module, "PRESET", {})
        for name, module in POLICIES.items()
        if name != "fixed_threshold"
    },
    "grad_relu": {"layerwise.gradient_mask": GRAD_RELU},
    "avg_clustering": {"avg_clustering.centers": "classifier"},
    "layermatch": {
        "layerwise.gradient_mask": GRAD_RELU,
        "avg_clustering.centers": "classifier",
    },
}

# The settings that `METHOD+ADDITION` adds to a method.
ADDITIONS = {
    "layerwise": METHODS["layermatch"],
    "grad_relu": METHODS["grad_relu"],
    "avg_clustering": METHODS["avg_clustering"],
}


def method_choices(method: str) -> dict[str, Any]:
    """Returns the settings of a method: {dotted name: value}.

    Args:
      method: a key of METHODS, optionally followed by "+" and a key of ADDITIONS: "+grad_relu",
        "+avg_clustering", or "+layerwise" for both.

    Raises:
      InputError: no such method (names the nearest) or addition, or an addition to a method
        without a loss on unlabeled images.
    """
    _, plus, addition = method.partition("+")
    choices = METHODS[base_method(method)]
    if not plus:
        return choices
    if addition not in ADDITIONS:
        raise InputError(
            f"method {method!r}: only {', '.join(f'+{name}' for name in ADDITIONS)} can be added "
            "to a method. A gradient mask is set by :mask=NAME, centers by "
            "--config.avg_clustering.centers=NAME"
        )
    if not has_unsupervised_loss(method):
        raise InputError(
            f"{method}: {base_method(method)} has no unsupervised gradient that +{addition} could "
            "change. "
            "Leave it out"
        )
    return choices | ADDITIONS[addition]


def base_method(method: str) -> str:
    """Returns the part before "+": 'freematch' for 'freematch+grad_relu'.

    Raises:
      InputError: no such method; names the nearest.
    """
    name = method.partition("+")[0]
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return name


def method_name(method: str, gradient_mask: tuple, centers: str) -> str:
    """Returns the canonical name of a run's method, however its settings were written.

    Args:
      method: any name of the method, METHOD or METHOD+...; METHOD determines the policy.
      gradient_mask: layerwise.gradient_mask of the run.
      centers: avg_clustering.centers of the run.

    Returns:
      A key of METHODS, if one has exactly these settings. Otherwise METHOD with its additions:
      "+grad_relu", "+avg_clustering", or "+layerwise" for both; other masks and centers as in
      "fixmatch+mask=from_stage3" or "freematch+grad_relu+centers=features". All characters are safe
      in a path.

    Raises:
      InputError: no such method.
    """
    name = base_method(method)
    if METHODS[name].keys() <= METHODS["layermatch"].keys():  # FixMatch with a mask or centers
        name = "fixmatch"
    added = []
    if gradient_mask:
        added += ["grad_relu" if gradient_mask == GRAD_RELU else f"mask={mask_name(gradient_mask)}"]
    if centers != "none":
        added += ["avg_clustering" if centers == "classifier" else f"centers={centers}"]
    if added == ["grad_relu", "avg_clustering"]:
        added = ["layerwise"]
    name = "+".join([name, *added])
    return {
        "fixmatch+grad_relu": "grad_relu",
        "fixmatch+avg_clustering": "avg_clustering",
        "fixmatch+layerwise": "layermatch",
    }.get(name, name)


def trains_nothing(method: str) -> bool:
    """Tells whether a method only fits the classifier, on features of a frozen backbone.

    Raises:
      InputError: no such method.
    """
    return METHODS[base_method(method)].get("train_steps") == 0


def has_unsupervised_loss(method: str) -> bool:
    """Tells whether a method has a loss on unlabeled images; raises InputError as above."""
    return METHODS[base_method(method)].get("unsupervised_weight") != 0


def mask_name(gradient_mask: tuple) -> str:
    """Returns a gradient mask's key in MASKS, or 'custom-' and six hex digits of its SHA-256."""
    for name, mask in MASKS.items():
        if gradient_mask == mask:
            return name
    # The multipliers 0 and 0.0 must give the same name.
    numbers = json.loads(json.dumps(gradient_mask), parse_int=float)
    return f"custom-{hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:6]}"


def apply_method(config: ml_collections.ConfigDict, method: str) -> ml_collections.ConfigDict:
    """Applies the settings of a method.

    Args:
      config: a config to which no method was applied yet; changed in place.
      method: as in `method_choices`.

    Returns:
      The same config.

    Raises:
      InputError: as in `method_choices`.
    """
    names = {"method": method, "applied_method": method}
    config.update_from_flattened_dict(names | method_choices(method))
    return config


def exchange_method(config: ml_collections.ConfigDict, method: str) -> ml_collections.ConfigDict:
    """Copies a config and replaces the settings of its method by those of another method.

    Raises:
      InputError: as in `method_choices`.
    """
    # Resets only what its own method sets. What other methods set, such as μ, the user chose here.
    chosen = {"policy.name", *METHODS[base_method(config.method)], *METHODS["layermatch"]}
    if method_choices(method).get("policy.name", base().policy.name) != config.policy.name:
        chosen |= {f"policy.{name}" for name in config.policy}  # each policy has its own defaults
    neutral = {name: value for name, value in fields(base()).items() if name in chosen}
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(neutral)
    return apply_method(other, method)


def apply_arg(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
    """Applies the argument of --config=FILE:ARGUMENT, such as labels=250,method=fixmatch.

    Args:
      config: a data set's config, changed in place.
      arg: comma-separated key=value pairs: `labels` (a number for all classes together, a
        percentage of each class such as 10%, or all), `method` (a key of METHODS; default
        layermatch), `layerwise` (True appends "+layerwise" to the method), `mask` (a key of
        MASKS, which replaces the method's gradient mask).

    Returns:
      The same config.

    Raises:
      InputError: an unknown key, or a value that is not allowed.
    """
    given = parse_arg(arg, ("labels", "method", "layerwise", "mask"))
    if (labels := given.get("labels")) is not None:
        config.dataset.num_labels, config.dataset.label_fraction = _parse_labels(
            labels, config.dataset.num_labels
        )
    layerwise = given.get("layerwise", "False")
    if layerwise not in ("True", "False"):
        raise InputError(f"layerwise={layerwise}: give True or False")
    method = given.get("method", "layermatch")
    if layerwise == "True" and not method.endswith("+layerwise"):
        method += "+layerwise"
    apply_method(config, method)
    if (mask := given.get("mask")) is not None:
        if mask not in MASKS:
            raise unknown("gradient mask", mask, MASKS)
        config.layerwise.gradient_mask = MASKS[mask]
    return config


def _parse_labels(labels: str, num_labels: int) -> tuple[int, float]:
    """'250' -> (250, 0.0); '10%' -> (num_labels, 0.1)."""
    try:
        if labels == "all":
            return num_labels, 1.0
        if not labels.endswith("%"):
            return int(labels), 0.0
        # Refused here, because a fraction of 0 would mean num_labels.
        if 0 < (percent := float(labels[:-1])) <= 100:
            return num_labels, percent / 100
    except ValueError:
        pass
    raise InputError(
        f"labels={labels}: give a whole number of images for all classes together (labels=250), "
        "all, or a percentage of each class, above 0% and up to 100% (labels=10%)"
    )


def parse_arg(arg: str, keys: tuple[str, ...]) -> dict[str, str]:
    """Parses 'a=1,b=x' into {'a': '1', 'b': 'x'}.

    Raises:
      InputError: a part without '=', a key that is not in `keys`, or a key that is given twice.
    """
    given = {}
    for part in filter(None, arg.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"config argument {part!r}: write key=value, keys: {', '.join(keys)}")
        if key not in keys:
            raise unknown("config argument", key, keys)
        if key in given:
            raise InputError(f"config argument {key!r} is given twice: {given[key]!r}, {value!r}")
        given[key] = value
    return given

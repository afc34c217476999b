"""Every setting, the named methods, and what is refused before a run begins.

A config file in configs/ starts from `base()`, sets what its data set needs, and ends with
`apply_arg`, so that `--config=configs/cifar10.py:labels=250,method=fixmatch` works everywhere.
A setting that is None in `base()` is automatic: automatic.py computes it from the others.
"""

import hashlib
import json
import math
import re
from typing import Any

import ml_collections
from ml_collections import config_dict

from layermatch_jax.errors import InputError, unknown

GRAD_RELU = (("classifier/.*", 0.0),)

# Named gradient masks, for ablations. A name says what pseudo-labels do not train: from stage 3 on
# is stage 3 and all that follows, the classifier included; to stage 1 is the stem and stage 1. One
# list serves every backbone, for their paths are alike (models/__init__.py). A stage that a network
# does not have is refused: with three, from_stage3 is its last stage, to_stage1 its first half;
# with four (ResNet-50), from_stage4 and to_stage2.
_LAST = ("(backbone/final_norm|classifier)/.*", 0.0)  # only WideResNet has a final norm
MASKS = {
    "none": (),  # FixMatch
    "half_classifier": (("classifier/.*", 0.5),),
    "classifier": GRAD_RELU,
    "from_stage4": (("backbone/stage4.*", 0.0), _LAST),
    "from_stage3": (("backbone/stage[3-4].*", 0.0), _LAST),
    "from_stage2": (("backbone/stage[2-4].*", 0.0), _LAST),
    "everything": ((".*", 0.0),),  # unlabelled images count in BatchNorm's statistics alone
    "to_stage1": (("backbone/stem/.*", 0.0), ("backbone/stage1.*", 0.0)),
    "to_stage2": (("backbone/stem/.*", 0.0), ("backbone/stage[1-2].*", 0.0)),
    "backbone": (("backbone/.*", 0.0),),  # the reverse of Grad-ReLU
}

POLICIES = (
    "adamatch",
    "dash",
    "fixed_threshold",
    "flexmatch",
    "freematch",
    "mean_teacher",
    "pseudo_label",
    "softmatch",
    "uda",
)

# A method is a set of choices. Anything not named here is as in base().
METHODS = {
    "supervised": {"unsupervised_weight": 0.0},  # no unlabelled image is loaded then
    "pseudo_label": {"policy.name": "pseudo_label"},
    "mean_teacher": {"policy.name": "mean_teacher", "unsupervised_weight": 50.0},
    "uda": {"policy.name": "uda", "policy.threshold": 0.8},
    "fixmatch": {},
    "flexmatch": {"policy.name": "flexmatch"},
    "dash": {"policy.name": "dash"},
    "adamatch": {"policy.name": "adamatch"},
    "freematch": {"policy.name": "freematch"},
    "softmatch": {"policy.name": "softmatch"},
    "grad_relu": {"layerwise.gradient_mask": GRAD_RELU},
    "avg_clustering": {"avg_clustering.centres": "classifier"},
    "layermatch": {
        "layerwise.gradient_mask": GRAD_RELU,
        "avg_clustering.centres": "classifier",
    },
}

# What `METHOD+ADDITION` adds to a method's choices.
ADDITIONS = {
    "layerwise": METHODS["layermatch"],
    "grad_relu": METHODS["grad_relu"],
    "avg_clustering": METHODS["avg_clustering"],
}

# Between them lie whole calls of the train program.
_PERIODS = ("train_steps", "log_every", "eval_every", "checkpoint_every")

# Fields that may change between two starts of one run: they do not change its result.
RESULT_NEUTRAL = (
    "applied_method",  # says again what `method` says
    "parallelism",
    "dataset.data_dir",
    "dataset.on_broken",  # images left out make another data set, which is refused as such
    "input.backend",
    "input.prefetch",
    "input.steps_per_call",
    "log_every",
    "checkpoint_every",
    "checkpoints_kept",
    "compilation_cache",
    "tensorboard",
    "profile",
    "layer_report.at_steps",
    "layer_report.batches",
)


def base() -> ml_collections.ConfigDict:
    """The field's classic setting (FixMatch with WRN-28-2 on 32-pixel images), every field of it.

    Returns:
      A locked ConfigDict: assigning an unknown field is an error.
    """
    c = ml_collections.ConfigDict()

    # Set by :method=… or apply_method, which fill in policy, layerwise and avg_clustering. A run
    # writes down the name that says what its settings do (method_name).
    c.method = "fixmatch"  # a key of METHODS, or KEY+ADDITION
    c.applied_method = "fixmatch"  # the same; shows where `method` alone was changed
    c.seed = 0  # of initialisation, data order and augmentation
    c.train_steps = 2**20
    c.batch_size = 64  # labelled images a step, all devices and hosts together (B)
    c.unlabeled_ratio = 7  # unlabelled images per labelled one (μ); none where λ_u is 0
    c.unsupervised_weight = 1.0  # λ_u
    # of the evaluated average of the parameters, per step; None = automatic: 0.999, but a memory of
    # at most a tenth of the run, min(0.999, 1 - 10 / train_steps)
    c.ema_decay = config_dict.placeholder(float)
    c.parallelism = "pmap"  # 'pmap' | 'jit': two roads to the same numbers

    c.dataset = d = ml_collections.ConfigDict()
    d.name = "cifar10"  # cifar10 | cifar100 | stl10 | folder | npz | digits | fake
    d.data_dir = ""  # '' = $TFDS_DATA_DIR; the root of an image folder; the path of an .npz file
    d.num_labels = 250  # labelled images, all classes together
    d.label_fraction = 0.0  # of each class's images, in (0, 1]; 0 = num_labels counts
    d.label_seed = 0  # which images are labelled
    d.split_file = ""  # use this labeled_split.json in place of drawing one
    d.labeled_in_unlabeled = True  # labelled images are part of the unlabelled set too
    d.evaluate_on = "test"  # 'test' | 'validation' (20 % of the unlabelled training images)
    d.stored_size = 32  # side of the images as they are kept, pixels
    d.image_size = 32  # side of the crop that the network sees, pixels
    d.padding = 4  # reflected border before the random crop, pixels
    d.flip = True  # mirror left-right at random
    d.class_list = ""  # image folder: text file of the class folders to use, one a line
    d.on_broken = "error"  # image folder: broken images end the start, all named ('error'), or are
    # left out and named ('skip')
    d.alpha = "white"  # image folder: transparent images are put on white ('white'), or their alpha
    # channel is dropped ('drop')
    d.drop_test_duplicates = False  # leave out unlabelled images that equal a test image
    d.num_classes = 10  # fake data only

    c.augment = ml_collections.ConfigDict()
    c.augment.randaugment_ops = 3  # operations on each strong view (n)

    c.model = m = ml_collections.ConfigDict()
    m.name = "wide_resnet"  # wide_resnet | resnet50 | conv4 | linear
    m.depth = 28  # wide_resnet: layers
    m.widen_factor = 2  # wide_resnet: times 16 channels
    m.stages = 3  # wide_resnet: 3, or 4 for the STL-10 variant
    m.first_stride = 1  # wide_resnet: of its first stage; 2 for the STL-10 variant
    m.width = 32  # conv4: channels of its first convolution; linear: features
    m.dtype = "float32"  # 'float32' | 'bfloat16' computation; parameters stay float32
    m.bn_decay = config_dict.placeholder(float)  # of BatchNorm's running statistics, per step;
    # None = automatic, as ema_decay
    m.bn_epsilon = 1e-3
    m.remat = False  # recompute blocks in the backward pass: less memory, more time

    # Who reads a field stands behind it; policies/ has a file for each of POLICIES.
    c.policy = p = ml_collections.ConfigDict()
    p.name = "fixed_threshold"  # one of POLICIES; fixed_threshold is FixMatch's
    p.threshold = 0.95  # confidence that a pseudo-label needs (τ), in [0, 1]: fixed_threshold,
    # flexmatch, pseudo_label, uda
    p.temperature = config_dict.placeholder(float)  # of soft pseudo-labels: uda (None = 0.4),
    # dash (None = 0.5)
    p.momentum = config_dict.placeholder(float)  # of averages over the batches' predictions, per
    # step; None = automatic, as ema_decay: adamatch, freematch, softmatch
    p.relative_threshold = 0.9  # times the labelled rows' mean confidence: adamatch
    p.fairness_weight = 0.001  # of the regulariser (w_f); 0.01 at very few labels: freematch
    p.ramp = 0.4  # of train_steps, over which λ_u rises from 0: mean_teacher, pseudo_label
    p.signal_annealing = "none"  # of the labelled rows: uda; 'none' | 'linear' | 'log' | 'exp'
    p.warm_up = 2048 / 2**20  # of train_steps, in which every pseudo-label counts: dash
    p.period = 10240 / 2**20  # of train_steps, after which the bound falls: dash

    c.layerwise = ml_collections.ConfigDict()
    # (regular expression on whole parameter paths, multiplier in [0, 1]) of the unsupervised
    # gradient; the first match counts, no match means 1
    c.layerwise.gradient_mask = ()

    c.avg_clustering = a = ml_collections.ConfigDict()
    a.centres = "none"  # 'classifier' | 'features' | 'outputs' | 'none'
    # per update; None = automatic: as ema_decay for centres=classifier; the same with at most 0.99
    # for features; 0.6 per visit of an image for outputs
    a.momentum = config_dict.placeholder(float)
    a.warm_up = 10.0  # w: after t updates the momentum is at most (1 + t) / (w + t); 1 = none;
    # centres=classifier, features
    a.target_head = "classifier"  # centres=classifier: who labels, 'classifier' | 'centres'

    c.optimizer = o = ml_collections.ConfigDict()
    o.learning_rate = 0.03  # at step 0; falls as cos(7πk / 16K)
    o.momentum = 0.9
    o.nesterov = True
    o.weight_decay = 5e-4  # on convolution and dense kernels only

    c.input = ml_collections.ConfigDict()
    c.input.backend = "tf_data"  # 'tf_data': views are made on the host | 'device': all images are
    # kept in the devices' memory, and views are made there
    c.input.prefetch = 4  # tf_data: batches made ahead of the device
    # device: train steps in one call of the program (K); divides train_steps and the periods below.
    # For accelerators: XLA's convolutions are many times slower in a loop on a CPU
    c.input.steps_per_call = 1

    c.eval_batch_size = 512  # all devices together
    c.log_every = 256  # steps
    c.eval_every = 1024  # steps
    c.checkpoint_every = 4096  # steps
    c.checkpoints_kept = 2
    c.compilation_cache = config_dict.placeholder(str)  # folder of compiled programs, for restarts
    c.tensorboard = True  # event files
    c.profile = False  # benchmark: also write a trace of the loop (jax.profiler)

    c.layer_report = ml_collections.ConfigDict()
    c.layer_report.at_steps = ()  # of training: which layers gain from pseudo-labels then
    c.layer_report.batches = 128  # that gradients are averaged over; few make wide intervals
    return c.lock()


def method_choices(method: str) -> dict[str, Any]:
    """What a method sets, by dotted field name.

    Args:
      method: a key of METHODS, or one with "+" and a key of ADDITIONS behind it: "+grad_relu",
        "+avg_clustering", or "+layerwise" for both.

    Raises:
      InputError: no such method (names the nearest), or nothing can be added to it.
    """
    _, plus, addition = method.partition("+")
    choices = METHODS[base_method(method)]
    if not plus:
        return choices
    if addition not in ADDITIONS:
        raise InputError(
            f"method {method!r}: only {', '.join(f'+{name}' for name in ADDITIONS)} can be added "
            "to a method. A gradient mask is set by :mask=NAME, centres by "
            "--config.avg_clustering.centres=NAME"
        )
    if base_method(method) == "supervised":
        raise InputError(f"{method}: without an unsupervised gradient, +{addition} means nothing")
    return choices | ADDITIONS[addition]


def base_method(method: str) -> str:
    """'freematch' of 'freematch+grad_relu'.

    Raises:
      InputError: no such method; names the nearest.
    """
    name = method.partition("+")[0]
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return name


def method_name(method: str, gradient_mask: tuple, centres: str) -> str:
    """The one name of what a run does, however its settings were written.

    Args:
      method: any name of it, as METHOD or METHOD+...: METHOD tells the policy.
      gradient_mask: layerwise.gradient_mask of the run.
      centres: avg_clustering.centres of the run.

    Returns:
      A key of METHODS, where one means just this. Else METHOD with what is added to it:
      "+grad_relu", "+avg_clustering", or "+layerwise" for both; other masks and centres as in
      "fixmatch+mask=from_stage3" or "freematch+grad_relu+centres=features". All characters of it
      are safe in a path.

    Raises:
      InputError: no such method.
    """
    name = base_method(method)
    if METHODS[name].keys() <= METHODS["layermatch"].keys():  # FixMatch with a mask or centres
        name = "fixmatch"
    added = []
    if gradient_mask:
        added += ["grad_relu" if gradient_mask == GRAD_RELU else f"mask={mask_name(gradient_mask)}"]
    if centres != "none":
        added += ["avg_clustering" if centres == "classifier" else f"centres={centres}"]
    if added == ["grad_relu", "avg_clustering"]:
        added = ["layerwise"]
    name = "+".join([name, *added])
    return {
        "fixmatch+grad_relu": "grad_relu",
        "fixmatch+avg_clustering": "avg_clustering",
        "fixmatch+layerwise": "layermatch",
    }.get(name, name)


def mask_name(gradient_mask: tuple) -> str:
    """The key of MASKS that a gradient mask has; else 'custom-' and six digits of its SHA-256."""
    for name, mask in MASKS.items():
        if gradient_mask == mask:
            return name
    # 0 and 0.0 are one multiplier.
    numbers = json.loads(json.dumps(gradient_mask), parse_int=float)
    return f"custom-{hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:6]}"


def apply_method(config: ml_collections.ConfigDict, method: str) -> ml_collections.ConfigDict:
    """Fills in a method's choices.

    Args:
      config: one that no method was applied to yet; changed in place.
      method: as of `method_choices`.

    Returns:
      The same config.

    Raises:
      InputError: as `method_choices`.
    """
    names = {"method": method, "applied_method": method}
    config.update_from_flattened_dict(names | method_choices(method))
    return config


def exchange_method(config: ml_collections.ConfigDict, method: str) -> ml_collections.ConfigDict:
    """A copy of a config with another method's choices in place of its own.

    Raises:
      InputError: as `method_choices`.
    """
    chosen = set().union(*METHODS.values())
    neutral = {name: value for name, value in fields(base()).items() if name in chosen}
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(neutral)
    return apply_method(other, method)


def apply_arg(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
    """Applies what stands behind the colon of --config=file.py:labels=…,method=…,mask=….

    Args:
      config: a data set's config, changed in place.
      arg: comma-separated key=value pairs: `labels` (a number for all classes together, or a
        percentage of each class such as 10%), `method` (a key of METHODS; default layermatch),
        `layerwise` (True puts "+layerwise" behind the method), `mask` (a key of MASKS, in place of
        the method's gradient mask).

    Returns:
      The same config.

    Raises:
      InputError: an unknown key or a value that is none.
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
        if not labels.endswith("%"):
            return int(labels), 0.0
        # Refused here, because a fraction of 0 would mean num_labels.
        if 0 < (percent := float(labels[:-1])) <= 100:
            return num_labels, percent / 100
    except ValueError:
        pass
    raise InputError(
        f"labels={labels}: give a whole number of images for all classes together (labels=250), "
        "or a percentage of each class, above 0% and up to 100% (labels=10%)"
    )


def parse_arg(arg: str, keys: tuple[str, ...]) -> dict[str, str]:
    """Parses 'a=1,b=x' into {'a': '1', 'b': 'x'}.

    Raises:
      InputError: a part without '=', a key that is not in `keys`, or one that is there twice.
    """
    given = {}
    for part in filter(None, arg.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"config argument {part!r}: write key=value, keys: {', '.join(keys)}")
        if key not in keys:
            raise unknown("config argument", key, keys)
        if key in given:
            raise InputError(f"config argument {key!r} is there twice: {given[key]!r}, {value!r}")
        given[key] = value
    return given


def fields(config: ml_collections.ConfigDict) -> dict:
    """Every field by its dotted name, {'optimizer.momentum': 0.9, …}, as plain Python values."""

    def walk(tree, prefix):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.to_dict(), ""))


def from_fields(values: dict[str, Any]) -> ml_collections.ConfigDict:
    """The config that `fields` was made of, also where JSON has made its tuples lists.

    Raises:
      InputError: an unknown field.
    """

    def with_tuples(value):
        return tuple(map(with_tuples, value)) if isinstance(value, list | tuple) else value

    config = base()
    known = fields(config)
    for name in values:
        if name not in known:
            raise unknown("config field", name, known)
    config.update_from_flattened_dict({name: with_tuples(x) for name, x in values.items()})
    return config


def check_field(name: str) -> None:
    """Raises InputError, naming the nearest one, unless `name` is a field's dotted name."""
    if name not in fields(base()):
        raise unknown("config field", name, fields(base()))


def validate(config: ml_collections.ConfigDict, num_devices: int = 1) -> None:
    """Refuses what cannot be run, before anything is loaded or written.

    Args:
      config: the whole config, of automatic.resolve.
      num_devices: all devices of all hosts, which share every batch.

    Raises:
      InputError: says what was wrong, what is allowed and how to mend it.
    """
    for name, allowed in {
        "parallelism": ("pmap", "jit"),
        "dataset.evaluate_on": ("test", "validation"),
        "dataset.on_broken": ("error", "skip"),
        "dataset.alpha": ("white", "drop"),
        "input.backend": ("tf_data", "device"),
        "model.dtype": ("float32", "bfloat16"),
        "policy.name": POLICIES,
        "policy.signal_annealing": ("none", "linear", "log", "exp"),
        "avg_clustering.centres": ("classifier", "features", "outputs", "none"),
        "avg_clustering.target_head": ("classifier", "centres"),
    }.items():
        if _get(config, name) not in allowed:
            raise unknown(f"--config.{name}", _get(config, name), allowed)
    for name, low, high in (
        ("seed", 0, 2**32 - 1),
        ("train_steps", 1, None),
        ("batch_size", 1, None),
        ("unlabeled_ratio", 0, None),
        ("unsupervised_weight", 0, None),
        ("dataset.label_seed", 0, None),
        ("dataset.label_fraction", 0, 1),
        ("dataset.stored_size", 1, None),
        ("dataset.image_size", 2, None),
        ("dataset.padding", 0, config.dataset.stored_size - 1),
        ("augment.randaugment_ops", 0, None),
        ("policy.threshold", 0, 1),
        ("policy.relative_threshold", 0, None),
        ("policy.fairness_weight", 0, None),
        ("policy.ramp", 0, 1),
        ("policy.warm_up", 0, 1),
        ("policy.period", 0, 1),
        ("avg_clustering.warm_up", 1, None),
        ("model.widen_factor", 1, None),
        ("model.stages", 1, 4),
        ("model.first_stride", 1, None),
        ("model.width", 1, None),
        ("optimizer.weight_decay", 0, None),
        ("input.prefetch", 1, None),
        ("input.steps_per_call", 1, None),
        ("eval_batch_size", 1, None),
        ("log_every", 1, None),
        ("eval_every", 1, None),
        ("checkpoint_every", 1, None),
        ("checkpoints_kept", 1, None),
        ("layer_report.batches", 3, None),
    ):
        value = _get(config, name)
        if not math.isfinite(value):
            raise InputError(f"--config.{name}={value} must be a finite number")
        if value < low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"between {low} and {high}"
            raise InputError(f"--config.{name}={value} must be {limits}")
    for name in (  # at 1, nothing new would ever count
        "ema_decay",
        "avg_clustering.momentum",
        "model.bn_decay",
        "optimizer.momentum",
        "policy.momentum",
    ):
        value = _get(config, name)
        if value is not None and not 0 <= value < 1:
            raise InputError(
                f"--config.{name}={value} must be at least 0 and below 1: it is the share of the "
                "old value that a step keeps"
            )
    for name in ("model.bn_epsilon", "optimizer.learning_rate", "policy.temperature"):
        value = _get(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"--config.{name}={value} must be above 0 and finite")
    if config.unsupervised_weight > 0 and config.unlabeled_ratio == 0:
        raise InputError(
            "an unsupervised loss needs unlabelled images: set --config.unlabeled_ratio to 1 or "
            "more, or use :method=supervised"
        )
    if config.avg_clustering.target_head == "centres" and (
        config.avg_clustering.centres != "classifier"
    ):
        raise InputError(
            "--config.avg_clustering.target_head=centres needs --config.avg_clustering.centres="
            "classifier: only these centres are a classifier that can label"
        )
    # A run is called by its method: what makes another method of it is refused.
    method = base_method(config.method)
    policy = METHODS[method].get("policy.name", "fixed_threshold")
    if config.policy.name != policy:
        name = {"fixed_threshold": "fixmatch"}.get(config.policy.name, config.policy.name)
        raise InputError(
            f"--config.policy.name={config.policy.name} is not the policy of {config.method} "
            f"({policy}). Write --config=FILE:method={name}, which brings its other settings, too"
        )
    if (config.unsupervised_weight == 0) != (method == "supervised"):
        raise InputError(
            f"--config.unsupervised_weight={config.unsupervised_weight} with method "
            f"{config.method}: :method=supervised has the weight 0, all others one above it"
        )
    if method == "supervised" and (
        config.layerwise.gradient_mask or config.avg_clustering.centres != "none"
    ):
        raise InputError(
            "supervised has no unsupervised gradient: --config.layerwise.gradient_mask and "
            "--config.avg_clustering.centres mean nothing to it"
        )
    brings = config.avg_clustering.centres == "outputs" or (
        config.avg_clustering.target_head == "centres"
    )
    if config.policy.name == "mean_teacher" and brings:
        raise InputError(
            "--config.policy.name=mean_teacher brings its own targets, the EMA model's: averaged "
            "ones would never be used. Take --config.avg_clustering.centres=classifier, features "
            "or none, and --config.avg_clustering.target_head=classifier"
        )
    padded = config.dataset.stored_size + 2 * config.dataset.padding
    if config.dataset.image_size > padded:
        raise InputError(
            f"--config.dataset.image_size={config.dataset.image_size} is more than stored_size + "
            f"2 · padding = {padded} pixels: no crop fits"
        )
    K, periods = config.input.steps_per_call, [_get(config, name) for name in _PERIODS]
    if K > 1 and config.input.backend != "device":
        raise InputError(
            f"--config.input.steps_per_call={K} needs --config.input.backend=device: a call of "
            "several steps makes its batches itself"
        )
    if math.gcd(K, *periods) != K:
        common = math.gcd(*periods)
        allowed = ", ".join(str(k) for k in range(1, common + 1) if common % k == 0)
        raise InputError(
            f"--config.input.steps_per_call={K} does not divide {', '.join(_PERIODS)} = "
            f"{', '.join(map(str, periods))}. Take one of {allowed}, or other periods"
        )
    for step in config.layer_report.at_steps:
        if not (isinstance(step, int) and 1 <= step <= config.train_steps and step % K == 0):
            raise InputError(
                f"--config.layer_report.at_steps: {step!r} is none. Give whole numbers from 1 to "
                f"train_steps = {config.train_steps}"
                + (f", multiples of input.steps_per_call = {K}" if K > 1 else "")
            )
    if config.layer_report.at_steps and config.method == "supervised":
        raise InputError("--config.layer_report.at_steps: supervised has no pseudo-labels")
    uneven = []
    for name in ("batch_size", "eval_batch_size"):
        size = _get(config, name)
        if size % num_devices:
            below = size - size % num_devices
            allowed = " or ".join(str(n) for n in (below, below + num_devices) if n)
            uneven.append(f"--config.{name}={size} (use {allowed})")
    if uneven:
        raise InputError(f"not divisible by {num_devices} devices: {', '.join(uneven)}")
    for pair in config.layerwise.gradient_mask:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
            raise InputError(
                f"gradient mask entry {pair!r}: write (regular expression, multiplier), as in "
                "--config.layerwise.gradient_mask=\"(('classifier/.*', 0.0),)\", or take a named "
                f"one, --config=FILE:mask=NAME: {', '.join(MASKS)}"
            )
        if not (isinstance(pair[1], (int, float)) and 0 <= pair[1] <= 1):
            raise InputError(f"gradient mask {pair[0]!r}: multiplier {pair[1]!r} is not in [0, 1]")
        try:
            re.compile(pair[0])
        except re.error as error:
            raise InputError(f"gradient mask {pair[0]!r} is no expression: {error}") from None


def _get(config, name: str):
    for key in name.split("."):
        config = config[key]
    return config

"""The table of all settings of a run: default, meaning and bounds.

presets.py has the named methods and gradient masks, rules.py the settings that exclude each other.
A setting without a value here is automatic: automatic.py computes it. The settings of a policy are
in the policy's file, those of the optimizer in method/optimizer.py, those of the backbones in
models/settings.py.
"""

from typing import Any

import ml_collections
from flax import traverse_util
from ml_collections import config_dict

from layermatch_jax import renamed
from layermatch_jax.errors import unknown
from layermatch_jax.method.optimizer import SETTINGS as OPTIMIZER_SETTINGS
from layermatch_jax.method.policies import POLICIES
from layermatch_jax.models.settings import SETTINGS as MODEL_SETTINGS
from layermatch_jax.setting import Setting, decay


def _of_policies() -> dict[str, Setting]:
    """Collects the settings of all policies: {'policy.NAME': Setting}."""
    readers = {}
    for policy, module in POLICIES.items():
        for name, setting in module.SETTINGS.items():
            readers.setdefault(name, []).append((policy, setting))
    merged = {}
    for name, by_policy in readers.items():
        listed = ", ".join(
            policy if callable(setting.default) else f"{policy} ({setting.default})"
            for policy, setting in by_policy
        )
        setting = by_policy[0][1]
        merged[f"policy.{name}"] = setting._replace(
            # None: each policy has its own default
            default=None, kind=setting.type, meaning=f"{setting.meaning} Read by {listed}.",
        )  # fmt: skip
    return merged


SETTINGS: dict[str, Setting] = {
    "method": Setting(
        "fixmatch",
        "Name of the method, for example fixmatch or freematch+layerwise. Do not set this field: "
        ":method=NAME sets it together with the fields of the method. config.json has the name "
        "that fits the settings of the run.",
    ),
    "applied_method": Setting(
        "fixmatch",
        "Internal, do not set it: a copy of `method` that :method=NAME writes. If the two differ, "
        "`method` was changed without its settings, and the run does not start.",
        neutral=True,
    ),
    "seed": Setting(
        0,
        "Seed of the initial parameters, the order of the images and their augmentation.",
        low=0,
        high=2**32 - 1,
    ),
    # Only for methods that fit nothing but the classifier it is 0 (automatic.py).
    "train_steps": Setting(2**20, "Train steps of the whole run.", low=0),
    "batch_size": Setting(64, "Labeled images in a batch (B), over all devices and hosts.", low=1),
    "unlabeled_ratio": Setting(
        7,
        "Unlabeled images for each labeled image (μ). With unsupervised_weight=0, no unlabeled "
        "images are loaded.",
        low=0,
    ),
    "unsupervised_weight": Setting(1.0, "Weight of the loss on pseudo-labels (λ_u).", low=0),
    "ema_decay": decay("the EMA of the parameters, with which accuracies are reported"),
    "parallelism": Setting(
        "pmap",
        "How a step runs on several devices; both values give the same numbers.",
        choices=("pmap", "jit"),
        neutral=True,
    ),
    # ---- Data ----
    "dataset.name": Setting(
        "cifar10",
        "Data set: cifar10, cifar100, stl10, folder, npz, digits or fake (made-up images, for "
        "tests).",
    ),
    "dataset.data_dir": Setting(
        "",
        "Where the data are: the folder of prepared tfds sets ('': $TFDS_DATA_DIR), the root of an "
        "image folder, or the path of an .npz file.",
        neutral=True,
    ),
    "dataset.num_labels": Setting(250, "Number of labeled images, of all classes together."),
    "dataset.label_fraction": Setting(
        0.0,
        "Share of the training images of each class that is labeled. 1: all training images; 0: "
        "dataset.num_labels is used.",
        low=0,
        high=1,
    ),
    "dataset.label_seed": Setting(0, "Seed that chooses the labeled images.", low=0),
    "dataset.split_file": Setting(
        "",
        "Path of the labeled_split.json of another run, to use the same labeled images. '': they "
        "are drawn.",
    ),
    "dataset.labeled_in_unlabeled": Setting(
        True, "Whether the labeled images are part of the unlabeled set, too."
    ),
    "dataset.evaluate_on": Setting(
        None,
        "Images for evaluation. test: the test set; validation: 20% of the training images that "
        "are not labeled; cross_validation: the labeled images, by linear probes on the features "
        "of the run (see docs/data.md), before the first and after the last step only; none: no "
        "evaluation. Automatic: test; cross_validation for a folder without test images.",
        choices=("test", "validation", "cross_validation", "none"),
        kind=str,
    ),
    "dataset.stored_size": Setting(
        32, "Side of the stored images, before the random crop, in pixels.", low=1
    ),
    "dataset.image_size": Setting(32, "Side of the crop that the network sees, in pixels.", low=2),
    "dataset.padding": Setting(
        4, "Reflected border that is added before the random crop, in pixels.", low=0
    ),
    "dataset.flip": Setting(True, "Whether views are mirrored left-right at random."),
    "dataset.class_list": Setting(
        "",
        "For folder: text file with the names of the class folders to use, one on each line. '': "
        "all.",
    ),
    "dataset.on_broken": Setting(
        "error",
        "For folder: what to do with images that cannot be decoded. error: name all of them and do "
        "not start; skip: leave them out and name them.",
        choices=("error", "skip"),
        neutral=True,  # images left out make another data set, which is refused as such
    ),
    "dataset.alpha": Setting(
        "white",
        "For folder: what to do with transparency. white: put the image on white; drop: ignore the "
        "alpha channel.",
        choices=("white", "drop"),
    ),
    "dataset.cache_dir": Setting(
        "",
        "For folder: where decoded images are kept for later runs, so that each is decoded only "
        "once. '': layermatch_jax/images in the user's cache folder ($XDG_CACHE_HOME or "
        "~/.cache). none: nowhere; an image is decoded whenever a batch needs it.",
        neutral=True,
    ),
    "dataset.drop_test_duplicates": Setting(
        False, "Whether unlabeled images that equal a test image are left out."
    ),
    "dataset.num_classes": Setting(10, "For fake: number of classes."),
    "augment.randaugment_ops": Setting(
        3, "Number of RandAugment operations on each strong view (n).", low=0
    ),
    **MODEL_SETTINGS,
    # ---- Method: pseudo-labels, and which layers see them ----
    "policy.name": Setting(
        "fixed_threshold",
        "Policy: the rule that gives each unlabeled image a pseudo-label and a weight. Set by "
        ":method=NAME. fixed_threshold is the policy of fixmatch, grad_relu, avg_clustering and "
        "layermatch.",
        choices=tuple(POLICIES),
    ),
    **_of_policies(),
    "layerwise.gradient_mask": Setting(
        (),
        "Pairs (regular expression on whole parameter paths, multiplier in [0, 1]) for the "
        "gradient of the loss on pseudo-labels. The first match counts; no match means 1.",
    ),
    "avg_clustering.centers": Setting(
        "none",
        "Centers that the loss on pseudo-labels pulls the features to. classifier: the averaged "
        "classifier; features: averaged features of each class; outputs: the current classifier, "
        "with pseudo-labels from averaged predictions; none: the current classifier.",
        choices=("classifier", "features", "outputs", "none"),
    ),
    "avg_clustering.momentum": Setting(
        None,
        "Momentum of the centers: the share of the old average that an update keeps. Automatic: "
        "for classifier min(0.999, 1 - 10 / train_steps), for features min(0.99, 1 - 10 / "
        "train_steps), for outputs 0.6 at each visit of an image.",
        low=0,
        below=1,
        kind=float,
    ),
    "avg_clustering.warm_up": Setting(
        10.0,
        "For centers=classifier and features: w; after t updates the momentum is at most (1 + t) / "
        "(w + t). 1: no warm-up.",
        low=1,
    ),
    "avg_clustering.target_head": Setting(
        "classifier",
        "For centers=classifier: the head whose predictions become pseudo-labels.",
        choices=("classifier", "centers"),
    ),
    **OPTIMIZER_SETTINGS,
    # ---- How a run proceeds ----
    "input.backend": Setting(
        "tf_data",
        "Where views are made. tf_data: on the host. device: on the devices, which keep all "
        "images in their memory.",
        choices=("tf_data", "device"),
        neutral=True,
    ),
    "input.prefetch": Setting(
        4, "For tf_data: number of batches that are prepared in advance.", low=1, neutral=True
    ),
    "input.steps_per_call": Setting(
        1,
        "For device: number of training steps inside one compiled call. Use it on accelerators "
        "only: on a CPU, XLA's convolutions are many times slower inside a loop.",
        low=1,
        neutral=True,
    ),
    "input.cache_views": Setting(
        0,
        "With frozen first layers (model.freeze): number of versions of each view of each image "
        "that pass through these layers once, before training; steps then choose among them and "
        "run only the layers behind. 0: new views in each step.",
        low=0,
    ),
    "eval_batch_size": Setting(512, "Images in an evaluation batch, over all devices.", low=1),
    "log_every": Setting(256, "Steps between two lines of the log.", low=1, neutral=True),
    "eval_every": Setting(1024, "Steps between two evaluations.", low=1),
    "checkpoint_every": Setting(4096, "Steps between two checkpoints.", low=1, neutral=True),
    "checkpoints_kept": Setting(
        2, "Number of the newest checkpoints that are kept.", low=1, neutral=True
    ),
    "compilation_cache": Setting(
        None,
        "Folder in which compiled programs are stored, so that a restart is quicker.",
        kind=str,
        neutral=True,
    ),
    "tensorboard": Setting(True, "Whether TensorBoard's event files are written.", neutral=True),
    "profile": Setting(
        False,
        "With --mode=benchmark: whether a trace of the training loop is written (jax.profiler).",
        neutral=True,
    ),
    "layer_report.at_steps": Setting(
        (), "Steps of training at which a layer report is made.", neutral=True
    ),
    "layer_report.batches": Setting(
        128,
        "Number of batches over which a layer report averages gradients; fewer give wider "
        "intervals.",
        low=3,
        neutral=True,
    ),
}

# Settings that may change between two starts of one run: they do not change its result.
RESULT_NEUTRAL = tuple(name for name, setting in SETTINGS.items() if setting.neutral)


def base() -> ml_collections.ConfigDict:
    """Creates the field's classic config: FixMatch with WRN-28-2 on 32-pixel images.

    Returns:
      A ConfigDict with every setting. It is locked: assigning an unknown field is an error. A
      setting that is None is automatic. Names of earlier versions are aliases of today's fields.
    """
    config = ml_collections.ConfigDict()
    for name, setting in SETTINGS.items():
        default = setting.default
        if default is None or callable(default):
            default = config_dict.placeholder(setting.type)
        group, field = _group(config, name)
        group[field] = default
    for old, new in renamed.FIELDS.items():
        (group, field), (today, name) = _group(config, old), _group(config, new)
        group[field] = today.get_ref(name)
    return config.lock()


def _group(config: ml_collections.ConfigDict, name: str) -> tuple[ml_collections.ConfigDict, str]:
    """Finds a field: (the group that holds it, its name in the group). Creates missing groups."""
    *groups, field = name.split(".")
    for key in groups:
        if key not in config:
            config[key] = ml_collections.ConfigDict()
        config = config[key]
    return config, field


def fields(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Flattens a config to plain Python values by dotted name: {'optimizer.momentum': 0.9, …}."""
    values = traverse_util.flatten_dict(config.to_dict(), sep=".")
    return {name: value for name, value in values.items() if name not in renamed.FIELDS}


def from_fields(values: dict[str, Any]) -> ml_collections.ConfigDict:
    """Creates the config with these settings; the inverse of `fields`.

    Lists become tuples, because JSON turns tuples into lists. Names and values of earlier versions
    (renamed.py) become today's.

    Raises:
      InputError: an unknown setting.
    """

    def with_tuples(value):
        return tuple(map(with_tuples, value)) if isinstance(value, list | tuple) else value

    values = renamed.fields(values)
    for name in values:
        check_field(name)
    config = base()
    config.update_from_flattened_dict({name: with_tuples(x) for name, x in values.items()})
    return config


def check_field(name: str) -> None:
    """Raises InputError, naming the nearest setting, unless `name` is a setting's dotted name."""
    if name not in SETTINGS and name not in renamed.FIELDS:
        raise unknown("config field", name, sorted(SETTINGS))


def apply_arg(config: ml_collections.ConfigDict, arg: str) -> ml_collections.ConfigDict:
    """Calls `presets.apply_arg`; config files of earlier versions find it under this name."""
    from layermatch_jax import presets

    return presets.apply_arg(config, arg)

"""Reads and writes result.json, and formats it for the terminal."""

import subprocess
from typing import Any

import flax
import jax
import ml_collections
from etils import epath

import layermatch_jax
from layermatch_jax import presets, renamed
from layermatch_jax.runtime import files, metrics
from layermatch_jax.runtime.workdir import CONFIG, DATA, RESULT, SPLIT

# Of an accuracy by cross-validation after training.
TOO_HIGH = "too high after training, because the backbone was trained with all of these labels"


def read_result(workdir: epath.Path) -> dict[str, Any] | None:
    """Reads result.json; None if the run is not finished.

    Raises:
      InputError: the file is damaged.
    """
    path = workdir / RESULT
    if not path.exists():
        return None
    again = f"Delete it: the command of the run writes it again from {metrics.FILE}."
    return renamed.in_result(files.read_json(path, again))


def write_result(
    workdir: epath.Path,
    config: ml_collections.ConfigDict,
    split: dict[str, Any],
    measured: dict[str, Any],
) -> dict[str, Any]:
    """Writes result.json: settings, results, device and versions.

    Args:
      workdir: the run's folder.
      config: the whole config, resolved.
      split: the content of labeled_split.json.
      measured: from metrics.summarize.

    Returns:
      The content of the file.
    """
    result = {
        "method": config.method,
        **trained_layers(config),
        "dataset": config.dataset.name,
        "num_labels": split["num_labels"],
        "label_seed": config.dataset.label_seed,
        "seed": config.seed,
        "train_steps": config.train_steps,
        **measured,
        "split_sha256": split["sha256"],
        "parallelism": config.parallelism,
        **provenance(),
    }
    files.write_json(workdir / RESULT, result)
    return result


def trained_layers(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Names the gradient mask and the centers of a run, for results and tables."""
    return {
        "mask": presets.mask_name(config.layerwise.gradient_mask),
        "centers": config.avg_clustering.centers,
    }


def provenance() -> dict[str, Any]:
    """Returns the device, the versions and the commit of a measurement."""
    return {
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "versions": {
            "layermatch_jax": layermatch_jax.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
        },
        "git_commit": _git_commit(),
    }


def as_text(result: dict[str, Any], workdir: epath.Path) -> str:
    """Formats a result for the terminal."""
    speed = result["images_per_second"]
    speed = "" if speed is None else f", {speed:.0f} images/s"
    steps = f"{result['train_steps']} steps in {result['wall_seconds']:.0f} s{speed}"
    lines = [
        f"{result['method']} on {result['dataset']}, {result['num_labels']} labels "
        f"(label seed {result['label_seed']}, seed {result['seed']}): "
        + (steps if result["train_steps"] else "a classifier on a frozen backbone"),
    ]
    if "mask" in result:  # not in results of older versions
        lines.insert(1, f"gradient mask {result['mask']}, centers {result['centers']}")
    lines += ["", *_accuracies(result)]
    if result["mask_rate"] is not None:
        shown = f"{result['mask_rate']:.1%} used"
        if result["pseudo_label_accuracy"] is not None:
            shown += f", {result['pseudo_label_accuracy']:.1%} of these right"
        if result["pseudo_label_accuracy_all"] is not None:
            shown += f", {result['pseudo_label_accuracy_all']:.1%} of all right"
        else:
            shown += f"; how many are right is not known: {metrics.TRUTH_UNKNOWN}"
        lines += ["", f"pseudo-labels over the run: {shown}"]
    written = f"files: {workdir}/ ({RESULT}, {metrics.FILE}, {SPLIT}, {CONFIG}, {DATA})"
    return "\n".join([*lines, "", written])


def evaluated_on(result: dict[str, Any]) -> str:
    """Returns the kind of images on which a run was evaluated; 'none' if it has no accuracy."""
    kinds = (name.removesuffix("_accuracy") for name in result if name.endswith("_accuracy"))
    return next((kind for kind in kinds if kind != "pseudo_label"), "none")


def _accuracies(result: dict[str, Any]) -> list[str]:
    """Formats the accuracies of a result as lines."""
    kind = evaluated_on(result)
    if kind == "none":
        return ["no accuracy: the run has no images for an evaluation"]
    by_parameters = result[f"{kind}_accuracy"]
    if kind == "cross_validation":
        return _estimates(result)
    lines = [f"{kind} accuracy      last   median{result['evaluations_in_median']:<4} best"]
    for parameters, values in by_parameters.items():
        numbers = "".join(f"{100 * values[k]:8.2f} %" for k in ("last", "median20", "best"))
        lines.append(f"  {parameters:<14}{numbers}")
    if "macro_f1_ema" in result:  # not in results of older versions
        lines.append(f"macro-averaged F1 (EMA, last): {result['macro_f1_ema']:.1%}")
    return lines


def _estimates(result: dict[str, Any]) -> list[str]:
    """Formats the accuracies by cross-validation as lines."""
    trained = result["train_steps"] > 0
    lines = [
        "accuracy by cross-validation, an estimate by linear probes on the features, over "
        f"{result['held_out']} labeled images (there are no test images):"
    ]
    if trained and "before_training" in result:
        lines.append(_estimate("before training", result["before_training"]))
    last = result["cross_validation_accuracy"]["ema"]["last"]
    when = "after training" if trained else "frozen backbone"
    lines.append(_estimate(when, {**result, "accuracy_ema": last}))
    if trained:
        lines.append(f"  {TOO_HIGH}")
    return [*lines, f"macro-averaged F1, {when}: {result['macro_f1_ema']:.1%}"]


def _estimate(when: str, scores: dict[str, Any]) -> str:
    low, high = scores["interval_ema"]
    return f"  {when + ':':17} {scores['accuracy_ema']:.1%} (95 % interval {low:.1%} to {high:.1%})"


def _git_commit() -> str | None:
    """Returns the commit of this code, with '-dirty' if it was changed; None if not known."""
    root = epath.Path(layermatch_jax.__file__).parent.parent
    if not (root / ".git").exists():  # installed, perhaps within the repository of another project
        return None
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=root, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None

"""Pictures of what happened over training, from the logs alone."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from layermatch_jax.after import analysis, figures
from layermatch_jax.after.analysis import Curve
from layermatch_jax.after.report.logs import Log
from layermatch_jax.after.report.pages import Note, Picture, as_picture
from layermatch_jax.runtime import metrics

_POINTS = 300  # of a line; more are averaged in groups
_POINTS_OF_MANY = 100
_COLUMNS = 120  # of a map of classes
_BANDED = 6  # methods that have a band; those of more would hide each other


class Panel(NamedTuple):
    """A picture of quantities over training; '{images}' in its texts is what was evaluated on."""

    title: str
    unit: str
    split: str  # 'train', or 'evaluation': the one of the run
    lines: dict[str, str]  # {name of a metric: what it is}
    caption: str
    percent: bool = False  # the quantities are fractions


PANELS = (
    Panel(
        "Accuracy",
        "% of {images} images",
        "evaluation",
        {"accuracy_ema": "EMA of the parameters", "accuracy": "raw parameters"},
        "Share of the {images} images whose class is predicted: by the moving average of the "
        "parameters (EMA), which the results are of, and by the parameters as they are (raw).",
        percent=True,
    ),
    Panel(
        "Pseudo-labels",
        "%",
        "train",
        {
            "mask_rate": "used (mask rate)",
            "pseudo_label_accuracy": "right, of those used",
            "pseudo_label_accuracy_all": "right, of all",
        },
        "How many pseudo-labels count (their mean weight), and how many are right, of the "
        "unlabeled images whose class is known. Training does not see these classes; labeled "
        "images, whose class it sees, are left out.",
        percent=True,
    ),
    Panel(
        "Losses in training",
        "nats",
        "train",
        {"loss_supervised": "on labels", "loss_unsupervised": "on pseudo-labels"},
        "Cross-entropies, means over the batch (mean_teacher's on pseudo-labels: squared error). A "
        "pseudo-label that is not used counts as 0.",
    ),
    Panel(
        "Loss on {images} images",
        "nats",
        "evaluation",
        {"loss_ema": "EMA of the parameters", "loss": "raw parameters"},
        "Cross-entropy. It can rise while accuracy does not fall: mistakes get more confident.",
    ),
    Panel(
        "Thresholds",
        "% confidence",
        "train",
        {
            "class_threshold": "mean over the classes",
            "global_threshold": "of all classes (τ)",
            "confidence_mean": "below it weights fall (μ)",
        },
        "Confidence that a pseudo-label needs to be used.",
        percent=True,
    ),
    Panel(
        "Learning rate",
        "learning rate",
        "train",
        {"learning_rate": "learning rate"},
        "Mean over each logged window.",
    ),
    Panel(
        "Do the two losses agree?",
        "cosine",
        "train",
        {"classifier_gradient_cosine": "of the classifier's gradients"},
        "Cosine between the linear classifier's gradients by the loss on labels and by that on "
        "pseudo-labels: at 1 they pull the same way, below 0 against each other.",
    ),
)
# Of these a run without pseudo-labels logged zeros, in earlier versions.
_OF_PSEUDO_LABELS = ("loss_unsupervised", "class_threshold", "classifier_gradient_cosine")


def of_one(log: Log) -> list[Picture]:
    """The panels of one run, with a line for each quantity."""
    pictures = []
    for panel in PANELS:
        series = [
            figures.Series(label, *analysis.thinned(_curve(log, panel.split, name), _POINTS))
            for name, label in panel.lines.items()
        ]
        pictures += _drawn(panel, panel.title, series, log.evaluated_on)
    return pictures


def of_several(groups: dict[str, list[Log]]) -> list[str | Picture]:
    """How lines and bands are to be read, and a picture for each quantity, a line for each method.

    Args:
      groups: of logs.by_method.
    """
    banded = len(groups) <= _BANDED
    if all(len(of_method) == 1 for of_method in groups.values()):
        reading = "One run of each method: what a repetition would change is not seen."
    else:
        reading = "Lines: means over the runs of a method, as far as all of them have come. "
        reading += (
            "Bands: ± one standard deviation (sd) over these runs."
            if banded
            else "Of so many methods no bands are drawn; the table has standard deviations."
        )
    images = next(iter(groups.values()))[0].evaluated_on
    pictures = []
    for panel in PANELS:
        for name, label in panel.lines.items():
            series = []
            for method, of_method in groups.items():
                band = analysis.band([_curve(log, panel.split, name) for log in of_method])
                series.append(_with_band(method, band, banded))
            title = panel.title if len(panel.lines) == 1 else f"{panel.title}: {label}"
            pictures += _drawn(panel, title, series, images)
    return [reading, *pictures] if pictures else []


def of_classes(log: Log, names: Sequence[str]) -> list[Note | Picture]:
    """What one run counted by class; nothing if it makes no pseudo-labels.

    Args:
      log: the run's.
      names: of its classes.
    """
    if not len(_curve(log, "train", "mask_rate").steps):
        return []
    parts = []
    counted, truths = (_by_class(log, name) for name in ("class_pseudo_labels", "class_truths"))
    if np.any(truths.values > 0):
        last = counted.values[-1].sum() / max(truths.values[-1].sum(), 1)
        figure = figures.class_counts(*counted, truths.values, names)
        alt = "Of each class, over training steps: how many unlabeled images of a batch have it "
        alt += "as a pseudo-label that is used, beside how many are of it. In the end, "
        alt += f"{last:.0%} of the images have a pseudo-label that is used."
        caption = "Used pseudo-labels against the truth: how many unlabeled images of a batch are "
        caption += "of the class, and how many have it as a pseudo-label that is used, right or "
        caption += "wrong. More pseudo-labels than images means that others are taken for it."
        parts.append(as_picture(figure, alt, caption))
    elif len(truths.steps):
        unknown = f"How many pseudo-labels are right is not known: {metrics.TRUTH_UNKNOWN}."
        parts.append(Note(unknown))
    else:
        parts.append(Note("The run is of a version that did not count pseudo-labels by class."))
    for name, title, unit, caption in (
        (
            "class_acceptance",
            "Pseudo-labels used, by class",
            "% of the class's pseudo-labels",
            "Mean weight of the pseudo-labels of each class. Gray: it had none.",
        ),
        (
            "class_threshold",
            "Threshold, by class",
            "% confidence",
            "Confidence that a pseudo-label of the class needs to be used.",
        ),
    ):
        curve = _by_class(log, name)
        if not np.isfinite(curve.values).any():
            continue
        highest = 1.0
        if name == "class_threshold":
            if not np.ptp(curve.values, axis=1).any():
                continue  # one for all classes: the panel has it
            highest = curve.values.max()
        figure = figures.class_map(*curve, names, title, unit, limits=(0, highest))
        parts.append(as_picture(figure, f"{title}, as colors over training steps.", caption))
    return parts


def _curve(log: Log, split: str, name: str) -> Curve:
    """A quantity's curve; of one by class, its mean."""
    if log.config.method == "supervised" and name in _OF_PSEUDO_LABELS:
        return Curve(np.zeros(0, int), np.zeros(0))
    curve = analysis.curve(log.lines, log.evaluated_on if split == "evaluation" else split, name)
    return curve if curve.values.ndim < 2 else Curve(curve.steps, curve.values.mean(axis=1))


def _by_class(log: Log, name: str) -> Curve:
    """Of values [T, K]; T is 0 if the policy or an older version did not log it."""
    curve = analysis.curve(log.lines, "train", name)
    values = curve.values if curve.values.ndim == 2 else np.zeros((0, 1))
    return analysis.thinned(Curve(curve.steps, values), _COLUMNS)


def _with_band(method: str, band: analysis.Band, banded: bool) -> figures.Series:
    label = f"{method} ({band.count} runs)" if band.count > 1 else method
    if band.deviation is None or not banded:
        points = _POINTS if banded else _POINTS_OF_MANY
        return figures.Series(label, *analysis.thinned(Curve(band.steps, band.mean), points))
    both = Curve(band.steps, np.stack([band.mean, band.deviation], axis=1))
    steps, values = analysis.thinned(both, _POINTS)
    mean, deviation = values.T
    return figures.Series(label, steps, mean, mean - deviation, mean + deviation)


def _drawn(
    panel: Panel, title: str, series: Sequence[figures.Series], images: str
) -> list[Picture]:
    """The panel's picture; none if nothing of it is known."""
    known = [one for one in series if len(one.steps)]
    if not known:
        return []
    texts = (text.format(images=images) for text in (title, panel.unit, panel.caption))
    title, unit, caption = texts
    figure = figures.draw_curves(series, title, unit, percent=panel.percent)
    said = "{:.1%}" if panel.percent else "{:.3g}"
    ends = (f"{one.label} {said.format(one.values[-1])} at step {one.steps[-1]}" for one in known)
    return [as_picture(figure, f"{title}, over training steps: {'; '.join(ends)}.", caption)]

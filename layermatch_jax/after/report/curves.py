"""Figures of quantities over training, from the logs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from layermatch_jax.after import analysis, figures
from layermatch_jax.after.analysis import Curve
from layermatch_jax.after.report.logs import Log
from layermatch_jax.after.report.pages import Note, Picture, as_picture
from layermatch_jax.runtime import metrics

_POINTS = 300  # maximum points of a line; neighbors are averaged
_POINTS_OF_MANY = 100  # the same if there are many lines
_COLUMNS = 120  # maximum columns of a map of classes
_BANDED = 6  # maximum number of methods with bands; more bands would hide each other


class Panel(NamedTuple):
    """A figure of quantities over training. '{images}' in texts stands for test or validation."""

    title: str
    unit: str
    split: str  # 'train', or 'evaluation' for the run's evaluation split
    lines: dict[str, str]  # {name of a metric: label of its line}
    caption: str
    percent: bool = False  # the quantities are fractions


PANELS = (
    Panel(
        "Accuracy",
        "% of {images} images",
        "evaluation",
        {"accuracy_ema": "EMA of the parameters", "accuracy": "raw parameters"},
        "Share of the {images} images with a right prediction, by the averaged parameters (EMA), "
        "which give the results, and by the raw parameters.",
        percent=True,
    ),
    Panel(
        "Pseudo-labels",
        "%",
        "train",
        {
            "mask_rate": "used (mask rate)",
            "pseudo_label_accuracy": "right, of used ones",
            "pseudo_label_accuracy_all": "right, of all",
        },
        "Share of pseudo-labels that are used (mean weight), and share that is right among "
        "unlabeled images of known class. Training does not use these classes. Labeled images are "
        "left out, because training uses their classes.",
        percent=True,
    ),
    Panel(
        "Losses in training",
        "nats",
        "train",
        {"loss_supervised": "on labels", "loss_unsupervised": "on pseudo-labels"},
        "Cross-entropies, means over the batch (for mean_teacher, the loss on pseudo-labels is a "
        "squared error). Pseudo-labels that are not used count as 0.",
    ),
    Panel(
        "Loss on {images} images",
        "nats",
        "evaluation",
        {"loss_ema": "EMA of the parameters", "loss": "raw parameters"},
        "Cross-entropy. It can rise at constant accuracy, if mistakes get more confident.",
    ),
    Panel(
        "Thresholds",
        "% confidence",
        "train",
        {
            "class_threshold": "mean over the classes",
            "global_threshold": "for all classes (τ)",
            "confidence_mean": "mean confidence; below it weights fall",
        },
        "Minimum confidence of a pseudo-label that is used.",
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
        "Cosine between the gradients of the loss on labels and of the loss on pseudo-labels, for "
        "the linear classifier: 1 means the same direction, below 0 means that they conflict.",
    ),
)
# Earlier versions logged zeros of these metrics for runs without pseudo-labels.
_OF_PSEUDO_LABELS = ("loss_unsupervised", "class_threshold", "classifier_gradient_cosine")


def of_one(log: Log) -> list[Picture]:
    """Draws the panels of one run, with a line for each quantity."""
    pictures = []
    for panel in PANELS:
        series = [
            figures.Series(label, *analysis.thinned(_curve(log, panel.split, name), _POINTS))
            for name, label in panel.lines.items()
        ]
        pictures += _drawn(panel, panel.title, series, log.evaluated_on)
    return pictures


def of_several(groups: dict[str, list[Log]]) -> list[str | Picture]:
    """Explains lines and bands, and draws each quantity with a line for each method.

    Args:
      groups: from logs.by_method.
    """
    banded = len(groups) <= _BANDED
    if all(len(of_method) == 1 for of_method in groups.values()):
        reading = "One run of each method, so the variation between repetitions is unknown."
    else:
        reading = (
            "Lines: means over the runs of a method, up to the last step that all have reached. "
        )
        reading += (
            "Bands: ± one standard deviation (sd) over these runs."
            if banded
            else f"No bands for more than {_BANDED} methods; the table has standard deviations."
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
    """Draws pseudo-labels by class of one run; returns [] for a run without pseudo-labels.

    Args:
      log: the log of the run.
      names: names of its classes.
    """
    if not len(_curve(log, "train", "mask_rate").steps):
        return []
    parts = []
    counted, truths = (_by_class(log, name) for name in ("class_pseudo_labels", "class_truths"))
    if np.any(truths.values > 0):
        last = counted.values[-1].sum() / max(truths.values[-1].sum(), 1)
        figure = figures.class_counts(*counted, truths.values, names)
        alt = (
            "For each class, over training steps: unlabeled images in a batch that have the class "
        )
        alt += "as a used pseudo-label, and images whose true class it is. At the end, "
        alt += f"{last:.0%} of the images have a used pseudo-label."
        caption = (
            "Used pseudo-labels and true classes: unlabeled images in a batch whose true class "
        )
        caption += "is this one, and images that have it as a used pseudo-label, right or wrong. "
        caption += "More pseudo-labels than images means that images of other classes get it."
        parts.append(as_picture(figure, alt, caption))
    elif len(truths.steps):
        unknown = f"The accuracy of pseudo-labels is not known: {metrics.TRUTH_UNKNOWN}."
        parts.append(Note(unknown))
    else:
        parts.append(Note("The run is from a version that did not count pseudo-labels by class."))
    for name, title, unit, caption in (
        (
            "class_acceptance",
            "Pseudo-labels used, by class",
            "% of the class's pseudo-labels",
            "Mean weight of the pseudo-labels of each class. Gray: no pseudo-labels.",
        ),
        (
            "class_threshold",
            "Threshold, by class",
            "% confidence",
            "Minimum confidence of a pseudo-label of the class that is used.",
        ),
    ):
        curve = _by_class(log, name)
        if not np.isfinite(curve.values).any():
            continue
        highest = 1.0
        if name == "class_threshold":
            if not np.ptp(curve.values, axis=1).any():
                continue  # all classes have one threshold, which the panel shows
            highest = curve.values.max()
        figure = figures.class_map(*curve, names, title, unit, limits=(0, highest))
        parts.append(as_picture(figure, f"{title}, as colors over training steps.", caption))
    return parts


def _curve(log: Log, split: str, name: str) -> Curve:
    """Returns the curve of a quantity; for a quantity by class, the mean over classes."""
    if log.config.method == "supervised" and name in _OF_PSEUDO_LABELS:
        return Curve(np.zeros(0, int), np.zeros(0))
    curve = analysis.curve(log.lines, log.evaluated_on if split == "evaluation" else split, name)
    return curve if curve.values.ndim < 2 else Curve(curve.steps, curve.values.mean(axis=1))


def _by_class(log: Log, name: str) -> Curve:
    """Returns a curve of values [T, K]; T is 0 if the run did not log the quantity."""
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
    """Draws a panel; returns [] if all its series are empty."""
    known = [one for one in series if len(one.steps)]
    if not known:
        return []
    texts = (text.format(images=images) for text in (title, panel.unit, panel.caption))
    title, unit, caption = texts
    figure = figures.draw_curves(series, title, unit, percent=panel.percent)
    said = "{:.1%}" if panel.percent else "{:.3g}"
    ends = (f"{one.label} {said.format(one.values[-1])} at step {one.steps[-1]}" for one in known)
    return [as_picture(figure, f"{title}, over training steps: {'; '.join(ends)}.", caption)]

"""Figures of a run's images, and of its model's predictions and features."""

from typing import NamedTuple

import numpy as np

from layermatch_jax import setup
from layermatch_jax.after import analysis, pictures
from layermatch_jax.after.model import Outputs
from layermatch_jax.after.report.pages import Picture, Table, as_picture
from layermatch_jax.after.runs import Run
from layermatch_jax.data import feed as feed_lib
from layermatch_jax.data.augment import crop
from layermatch_jax.data.images import Images

_VIEWS = 8  # images with their views
_MISTAKES = 24  # images with wrong predictions
_CONFUSED = 10  # pairs of classes in a table
_POINTS = 2000  # images in the feature map


def draw_views(config, data: setup.Data, step: int) -> Picture:
    """Draws images of a step, and their views as the network gets them.

    Args:
      config: the run's config.
      data: the run's images.
      step: 0-based.
    """
    partition = data.partition
    sampler = setup.create_sampler(config, partition)
    layout = sampler.layout
    mu, names = layout.mu, partition.class_names
    rows = slice(min(config.batch_size, -(-_VIEWS // max(mu, 1))))
    feed = feed_lib.create(config, partition, sampler, rows)
    made = np.asarray(feed.one_step(step).images)
    draws = sampler.draw(step).rows(rows)
    if mu:
        source, positions = partition.unlabeled, draws.unlabeled.reshape(-1)[:_VIEWS]
        shown = layout.split(made).unlabeled
    else:
        source, positions = partition.labeled, draws.labeled[:_VIEWS]
        shown = layout.split(made).labeled
    pixels = [_middle(source, positions, config), *(x[:_VIEWS] for x in shown.values())]
    kinds = ["image", *(f"{name.replace('_', ' ')} view" for name in shown)]
    hidden = "unknown or labeled"  # see splits.Partition
    truths = [names[c] if c >= 0 else hidden for c in source.labels[positions]]
    titles = [truths, *([""] * len(truths) for _ in kinds[1:])]
    whose = "unlabeled" if mu else "labeled"
    return as_picture(
        pictures.draw_images(pixels, titles, kinds),
        f"{len(positions)} {whose} images of step {step + 1}, each above its "
        f"{' and '.join(kinds[1:])}. Their classes: {', '.join(truths)}.",
        f"The first {whose} images of step {step + 1}, and their views, which the network gets"
        + (
            ". Pseudo-labels are made from weak views; training on them uses strong views."
            if "strong" in shown
            else "."
        ),
    )


def predictions(run: Run, data: setup.Data, answer: Outputs) -> list[Picture | Table]:
    """Draws the confusion matrix and the most confident mistakes, with tables of the classes.

    Args:
      run: the run of the model.
      data: the run's images.
      answer: the model's outputs for the evaluation images.
    """
    images, names = data.partition.evaluation, run.class_names
    kind = run.config.dataset.evaluate_on
    guesses = answer.probabilities.argmax(axis=1)
    matrix = analysis.confusion_matrix(images.labels, guesses, len(names))
    accuracy = np.trace(matrix) / max(matrix.sum(), 1)
    parts = [
        as_picture(
            pictures.confusion(matrix, names),
            f"Confusion matrix of {matrix.sum()} {kind} images in {len(names)} classes; "
            f"{accuracy:.1%} are on the diagonal.",
            f"Confusion matrix: true classes (rows) and predicted classes (columns), in % of the "
            f"class's {kind} images. By the EMA parameters of step {run.step}; {accuracy:.1%} of "
            f"{matrix.sum():,} predictions are right.",
        )
    ]
    parts.append(
        Table(
            "Each class",
            ("class", "number", "images", "right", "times predicted"),
            [
                (
                    name,
                    str(k),
                    str(matrix[k].sum()),
                    f"{matrix[k, k] / max(matrix[k].sum(), 1):.1%}",
                    str(matrix[:, k].sum()),
                )
                for k, name in enumerate(names)
            ],
            folded=True,
        )
    )
    if pairs := analysis.most_confused(matrix, _CONFUSED):
        parts.append(
            Table(
                "The most frequent mistakes",
                ("true class", "predicted class", "images", "share of the class"),
                [(names[i], names[j], str(n), f"{n / matrix[i].sum():.0%}") for i, j, n in pairs],
            )
        )
    wrong = analysis.confident_mistakes(answer.probabilities, images.labels, _MISTAKES)
    if len(wrong):
        sure = answer.probabilities[wrong].max(axis=1)
        pairs = [(names[images.labels[n]], names[guesses[n]]) for n in wrong]
        between = " " if max(len(a) + len(b) for a, b in pairs) < 12 else "\n"
        titles = [f"{a}{between}→ {b}\n{p:.1%}" for (a, b), p in zip(pairs, sure, strict=True)]
        pixels = _middle(images, wrong, run.config)
        lines = range(0, len(wrong), _VIEWS)
        parts.append(
            as_picture(
                pictures.draw_images(
                    [pixels[i : i + _VIEWS] for i in lines], [titles[i : i + _VIEWS] for i in lines]
                ),
                f"{len(wrong)} {kind} images with a wrong prediction (true class, predicted "
                "class, confidence): " + "; ".join(title.replace("\n", " ") for title in titles),
                f"The {len(wrong)} most confident mistakes on {kind} images: true class → "
                "predicted class, with its probability. Some labels of the data set may be wrong.",
            )
        )
    return parts


def features(run: Run, data: setup.Data, answer: Outputs) -> list[Picture]:
    """Draws the features of the evaluation images in two dimensions, with the centers."""
    labels, names = data.partition.evaluation.labels, run.class_names
    if answer.features.shape[1] < 2 or len(labels) < 2:
        return []
    known = np.flatnonzero(labels >= 0)
    plane = analysis.principal_plane(answer.features[known])
    shown = known[np.linspace(0, len(known) - 1, min(_POINTS, len(known))).astype(int)]
    points, centers = plane.project(answer.features[shown]), _centers(run)
    if centers.places:
        stars = plane.project(centers.vectors)
    else:
        stars = (centers.vectors - centers.vectors.mean(axis=0)) @ plane.axes
        radius = np.quantile(np.linalg.norm(points, axis=1), 0.9)
        stars = stars * radius / max(np.linalg.norm(stars, axis=1).max(), 1e-12)
    figure = pictures.feature_map(
        points,
        labels[shown],
        names,
        plane.shares,
        stars,
        (answer.probabilities.argmax(axis=1) != labels)[shown],
    )
    return [
        as_picture(
            figure,
            f"Map of the features of {len(shown)} {run.config.dataset.evaluate_on} images in "
            f"{len(names)} classes, with a center for each class. The two axes have "
            f"{plane.shares.sum():.0%} of the features' variance.",
            f"Features of {len(shown):,} {run.config.dataset.evaluate_on} images (EMA parameters) "
            "in the plane of the first two principal components. The plane has "
            f"{plane.shares.sum():.0%} of the variance, so classes that overlap here may be "
            f"separate in other dimensions. {centers.caption}",
        )
    ]


class _Centers(NamedTuple):
    vectors: np.ndarray  # [K, D], NaN for a class that has none
    places: bool  # True: points among the features; False: directions
    caption: str


def _centers(run: Run) -> _Centers:
    """Returns the centers that the loss pulls the features of each class to."""
    reading, state = run.config.avg_clustering.centers, run.state.centers
    if reading == "features":
        vectors = np.where(state["updates"][:, None] > 0, state["centers"], np.nan)
        return _Centers(
            vectors,
            True,
            "Stars: the averages of features that the loss uses as centers; only directions count.",
        )
    averaged = reading == "classifier"
    classifier = state if averaged else run.state.ema_params["classifier"]
    which = "averaged classifier" if averaged else "classifier (EMA)"
    return _Centers(
        np.asarray(classifier["kernel"]).T,
        False,
        f"Stars: the columns of the {which}, the directions that the loss pulls each class to. "
        "Their mean is subtracted, and they are scaled by one factor so that 90 % of the images "
        "are closer to the middle than the farthest star.",
    )


def _middle(images: Images, positions: np.ndarray, config) -> np.ndarray:
    return crop.center_crop(images.read(positions), config.dataset.image_size)

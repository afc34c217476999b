"""Pictures of a run's images, and of what its model says of them."""

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

_VIEWS = 8  # images that are shown with their views
_MISTAKES = 24
_CONFUSED = 10  # pairs of classes
_POINTS = 2000  # images in the feature map


def draw_views(config, data: setup.Data, step: int) -> Picture:
    """Images of a step, as they are and as the network was given them.

    Args:
      config: the run's.
      data: its images.
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
        f"The first {whose} images of step {step + 1}, and what the network was given of them"
        + (
            ": pseudo-labels are made on weak views and learnt on strong ones."
            if "strong" in shown
            else "."
        ),
    )


def predictions(run: Run, data: setup.Data, answer: Outputs) -> list[Picture | Table]:
    """Which classes are taken for which others, and the mistakes that the model is surest of.

    Args:
      run: whose model it is.
      data: its images.
      answer: of the run's evaluation images.
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
            f"Confusion matrix: what images of each class (rows) are taken for, in % of the "
            f"class's {kind} images. EMA parameters of step {run.step}: {accuracy:.1%} of "
            f"{matrix.sum():,} images are right.",
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
                ("true class", "taken for", "images", "of the class"),
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
                f"{len(wrong)} {kind} images that are predicted wrong, each with its class, the "
                "predicted class and the confidence: "
                + "; ".join(title.replace("\n", " ") for title in titles),
                f"The {len(wrong)} mistakes on {kind} images that the model is surest of: true "
                "class → predicted class, with its probability. Some may be wrong labels.",
            )
        )
    return parts


def features(run: Run, data: setup.Data, answer: Outputs) -> list[Picture]:
    """The features of the run's evaluation images in two dimensions, with the classes' centers."""
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
            f"What the classifier sees of {len(shown):,} {run.config.dataset.evaluate_on} images "
            "(EMA parameters), in the two directions in which it varies most (principal "
            f"components): {plane.shares.sum():.0%} of the variance, so classes that lie on each "
            f"other here may be apart. {centers.caption}",
        )
    ]


class _Centers(NamedTuple):
    vectors: np.ndarray  # [K, D], NaN for a class that has none
    places: bool  # among the features; else directions
    caption: str


def _centers(run: Run) -> _Centers:
    """What the features of each class are pulled to."""
    reading, state = run.config.avg_clustering.centers, run.state.centers
    if reading == "features":
        vectors = np.where(state["updates"][:, None] > 0, state["centers"], np.nan)
        return _Centers(
            vectors,
            True,
            "Stars: the averages of features that the loss pulls to; only their directions count.",
        )
    averaged = reading == "classifier"
    classifier = state if averaged else run.state.ema_params["classifier"]
    which = "averaged classifier" if averaged else "classifier (EMA)"
    return _Centers(
        np.asarray(classifier["kernel"]).T,
        False,
        f"Stars: the columns of the {which}, the directions that the loss pulls each class to; "
        "less their mean, and with one factor for all, by which the farthest is as far from the "
        "middle as nine tenths of the images.",
    )


def _middle(images: Images, positions: np.ndarray, config) -> np.ndarray:
    return crop.center_crop(images.read(positions), config.dataset.image_size)

"""The log of a run (metrics.jsonl, TensorBoard events), and the summary computed from it."""

import json
import math
import os
import statistics
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from layermatch_jax.errors import InputError, NonFiniteLossError
from layermatch_jax.method import windows
from layermatch_jax.runtime import clock as clock_lib
from layermatch_jax.runtime import events, files

FILE = "metrics.jsonl"
UNKNOWN = -1  # number of lines, in a checkpoint of a version that did not save it
# Fields of metrics.jsonl that depend on the speed of the machine.
TIME_FIELDS = ("seconds", "steps_per_second", "images_per_second")

# Why the accuracy of pseudo-labels is missing; all messages and reports use this wording.
TRUTH_UNKNOWN = "no unlabeled image has a known class (labeled images do not count)"


class Log:
    """metrics.jsonl and TensorBoard events of one run.

    It appends to metrics.jsonl; `cut_back` has removed the lines after the step that the run
    resumes from. Without a workdir it writes nothing and only checks for divergence: one of several
    processes writes, but all must stop when the loss is not finite.

    Attributes:
      lines: number of lines of metrics.jsonl; 0 without a workdir.
      latest: {split: values of its newest line} of this start; a new dict after every line.
    """

    def __init__(
        self,
        workdir: epath.Path | None,
        step: int,
        clock: clock_lib.Clock,
        images_per_step: int,
        tensorboard: bool,
    ):
        self._path = workdir / FILE if workdir else None
        self.lines = len(read(workdir)) if workdir else 0
        self._events = _event_file(workdir, step) if workdir and tensorboard else None
        self._clock, self._images_per_step = clock, images_per_step
        self.latest = {}

    def train(self, step: int, window: dict) -> None:
        """Fetches and writes a window of train steps that ends with `step`.

        `seconds` in the line is the clock's time since the last window. The speeds are null if no
        step was timed.

        Raises:
          NonFiniteLossError: the loss of a step in the window is NaN or infinite.
        """
        window = jax.device_get(window)
        windows.check_finite(window)
        spent = self._clock.next_window()
        timed = spent["timed_steps"] and spent["timed_seconds"]
        speed = spent["timed_steps"] / spent["timed_seconds"] if timed else None
        times = {
            "seconds": spent["seconds"],
            "steps_per_second": speed,
            "images_per_second": speed and speed * self._images_per_step,
        }
        self._write(step, "train", windows.means(window["sums"]) | times)

    def evaluation(self, step: int, split: str, scores: dict[str, Any], seconds: float) -> None:
        """Writes the scores of an evaluation (`evaluate.scores`) and its duration in seconds.

        Raises:
          NonFiniteLossError: the loss with the raw or the EMA parameters is NaN or infinite.
        """
        estimated = split == "cross_validation"  # without any image to hold out, its loss is NaN
        if not estimated and not math.isfinite(scores["loss"] + scores["loss_ema"]):
            raise NonFiniteLossError(f"the {split} loss is not finite at step {step}")
        self._write(step, split, scores | {"seconds": seconds})

    def to_disk(self) -> None:
        """Forces metrics.jsonl to disk, so that a power cut removes no line a checkpoint counts."""
        if self._path and self._path.exists() and "://" not in str(self._path):
            with open(self._path, "ab") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self._events:
            self._events.close()

    def _write(self, step: int, split: str, values: dict[str, Any]) -> None:
        if not self._path:
            return
        # JSON has no NaN: a diagnostic that is not finite is written as null.
        known = lambda x: x if math.isfinite(x or 0) else None  # noqa: E731
        values = {
            name: [known(x) for x in value] if isinstance(value, list) else known(value)
            for name, value in values.items()
        }
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "split": split} | values) + "\n")
        self.lines += 1
        self.latest = self.latest | {split: values}
        if self._events:
            tags = {f"{split}/{name}": x for name, x in values.items() if x is not None}
            by_class = {tag: x for tag, x in tags.items() if isinstance(x, list)}
            scalars = {tag: x for tag, x in tags.items() if tag not in by_class}
            self._events.write(step, scalars, by_class)


def _event_file(workdir: epath.Path, step: int) -> events.EventFile | None:
    try:
        return events.EventFile(workdir / "tensorboard", first_step=step + 1)
    except ImportError:
        logging.warning("TensorBoard is not installed: no events are written.")
        return None


def read(workdir: epath.Path, count: int | None = None) -> list[dict[str, Any]]:
    """Reads the lines of metrics.jsonl.

    Args:
      workdir: the run's folder.
      count: number of lines to read; later ones are left out. None = all complete lines, which may
        be none; a run that is training may have an incomplete last line.

    Raises:
      InputError: a line is damaged, or there are fewer than `count`.
    """
    path = workdir / FILE
    lines = path.read_bytes().split(b"\n")[:-1][:count] if path.exists() else []
    read = []
    for number, line in enumerate(lines, 1):
        try:
            read.append(json.loads(line))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise InputError(
                f"{path} is damaged in line {number} ({error}). Bring the file back from a backup; "
                "without it the run has no result. Or use another --workdir to start a new run."
            ) from None
    if count is not None and len(read) < count:
        raise InputError(
            f"{path} holds {len(read)} of the {count} lines that the run wrote, and the result "
            "needs all of them. Bring the file back from a backup, or use another --workdir to "
            "start a new run."
        )
    return read


def cut_back(workdir: epath.Path, count: int, step: int) -> None:
    """Removes the lines of metrics.jsonl that were written after a checkpoint was saved.

    The resumed run writes them again. So each line is there once, however often it is interrupted.

    Args:
      workdir: the run's folder.
      count: number of lines when the checkpoint was saved; UNKNOWN = keep the lines up to `step`.
      step: the step of the checkpoint.

    Raises:
      InputError: as in `read`; nothing was changed.
    """
    lines = read(workdir, None if count == UNKNOWN else count)
    lines = [line for line in lines if line["step"] <= step]
    files.write_text(workdir / FILE, "".join(json.dumps(line) + "\n" for line in lines))


# ---------------------------------------------------------------------------------------------
# The result, computed from metrics.jsonl so that interruptions do not change it.


# Fields of the last evaluation that the result keeps.
_ESTIMATE = ("accuracy_ema", "interval_ema")
_LAST = ("macro_f1_ema", "class_precision_ema", "class_recall_ema", "interval_ema", "held_out")


def summarize(lines: list[dict[str, Any]], split: str) -> dict[str, Any]:
    """Computes the accuracies and averages of a run.

    Args:
      lines: the lines of metrics.jsonl.
      split: config.dataset.evaluate_on.

    Returns:
      {f'{split}_accuracy': {'raw' and 'ema': {'last', 'median20', 'best'}} in [0, 1]; only 'ema'
      for cross_validation, and the field is missing for 'none' or if no image could be held out;
      'macro_f1_ema', 'class_precision_ema' and 'class_recall_ema': from the last evaluation (see
      `evaluate.class_scores`); for cross_validation also 'interval_ema' and 'held_out', and, from
      pretrained weights, 'before_training': 'accuracy_ema' and 'interval_ema' of step 0;
      'evaluations_in_median': number of evaluations in 'median20', at most 20;
      'mask_rate': mean over all pseudo-labels of the run; None if it makes none;
      'pseudo_label_accuracy' (of the used ones) and 'pseudo_label_accuracy_all' (of all), where the
      true label is known, which never counts labeled images; None if there are none. These three
      means do not depend on how the steps were cut into log windows;
      'wall_seconds': time of training and evaluation, over all starts of the run. It includes one
      compilation of the train step and of the evaluation for each start. It leaves out loading the
      data, checkpoints, layer reports, and steps that were lost and repeated;
      'images_per_second': views through the backbone in training, median over the log windows,
      without the first call of the train program in each start; None if there is no other call}.
    """
    evaluations = [line for line in lines if line["split"] == split]
    start = {}
    if split == "cross_validation" and evaluations and evaluations[0]["step"] == 0:
        start = {"before_training": {name: evaluations[0][name] for name in _ESTIMATE}}
    # The evaluation of pretrained weights before the first step is the result of a run of no steps.
    evaluations = [line for line in evaluations if line["step"]] or evaluations
    windows = [line for line in lines if line["split"] == "train"]
    accuracy = {}
    for name, field in (("raw", "accuracy"), ("ema", "accuracy_ema")):
        values = [x for line in evaluations if (x := line.get(field)) is not None]
        if not values:
            continue
        accuracy[name] = {
            "last": values[-1],
            "median20": statistics.median(values[-20:]),
            "best": max(values),
        }
    # A mean over the run weights each window by the number of pseudo-labels that the window's mean
    # is taken over: all, those with a known true label, or the used ones among these. Older
    # versions did not save these counts.
    steps = np.diff([0, *(line["step"] for line in windows)])
    used = [line["mask_rate"] or 0 for line in windows]
    counts = {
        "mask_rate": np.ones(len(windows)),
        "pseudo_label_accuracy": [
            sum(line.get("class_pseudo_labels") or [x])
            for line, x in zip(windows, used, strict=True)
        ],
        "pseudo_label_accuracy_all": [sum(line.get("class_truths") or [1]) for line in windows],
    }
    means = {}
    for name, by_step in counts.items():
        known = [
            (line[name], n)
            for line, n in zip(windows, steps * by_step, strict=True)
            if line[name] is not None
        ]
        means[name] = statistics.fmean(*zip(*known, strict=True)) if known else None
    speeds = [s for line in windows if (s := line["images_per_second"]) is not None]
    return {
        **({f"{split}_accuracy": accuracy} if accuracy else {}),
        **{
            name: evaluations[-1][name] for name in _LAST if evaluations and name in evaluations[-1]
        },
        **start,
        "evaluations_in_median": min(20, len(evaluations)),
        **means,
        "wall_seconds": round(sum(line["seconds"] for line in lines), 1),
        "images_per_second": round(statistics.median(speeds), 1) if speeds else None,
    }


def missing_accuracy(results: Iterable[dict[str, Any]]) -> str:
    """Explains missing accuracies of pseudo-labels below a table; '' if none is missing."""
    missing = any(
        result["mask_rate"] is not None and result["pseudo_label_accuracy_all"] is None
        for result in results
    )
    return f"Accuracies of pseudo-labels are missing where {TRUTH_UNKNOWN}." if missing else ""

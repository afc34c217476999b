"""What a run writes down: metrics.jsonl, TensorBoard events, progress, result.json."""

import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from layermatch_jax import events, files
from layermatch_jax.errors import InputError, NonFiniteLossError

FILE = "metrics.jsonl"
NEVER = np.iinfo(np.int32).max
PROGRESS_SECONDS = 2.0
# Fields of metrics.jsonl that depend on the machine; all others are the run's own.
TIME_FIELDS = ("seconds", "steps_per_second", "images_per_second")

# ---------------------------------------------------------------------------------------------
# Windows: what happened since the last log line, summed on the device.


def empty_window(window) -> dict:
    """A window without steps, of the form of another one (or its shapes)."""
    return {
        "sums": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), window["sums"]),
        "nonfinite_step": np.array(NEVER, np.int32),
    }


def window_of(metrics: dict, step: jax.Array) -> dict:
    """The window of one step.

    Args:
      metrics: {name: float32 [2] or [2, K]} of [sum, weight] pairs, 'loss' among them.
      step: int32 [], the step's number, 1-based.

    Returns:
      {'sums': the metrics, 'nonfinite_step': int32 [], the step if its loss is NaN or infinite,
      else NEVER}.
    """
    finite = jnp.isfinite(metrics["loss"][0])
    return {"sums": metrics, "nonfinite_step": jnp.where(finite, NEVER, step)}


def add_up(windows: dict) -> dict:
    """The window of all steps, of windows that are stacked along a new first axis."""
    return {
        "sums": jax.tree.map(lambda x: jnp.sum(x, axis=0), windows["sums"]),
        "nonfinite_step": jnp.min(windows["nonfinite_step"]),
    }


@jax.jit
def join(window: dict, later: dict) -> dict:
    """The window of the steps of both."""
    return add_up(jax.tree.map(lambda *x: jnp.stack(x), window, later))


def check_finite(window: dict, state=None) -> None:
    """Raises NonFiniteLossError, naming the step, if a run has diverged.

    Args:
      window: one of its losses may be NaN or infinite.
      state: a TrainState, if that is to be checked as well: the step whose loss is the last finite
        one may have spoilt it, and then it is no good checkpoint.
    """
    step = int(window["nonfinite_step"])
    if step != NEVER:
        raise NonFiniteLossError(f"the loss is not finite at step {step}")
    if state is not None and not _all_finite(state):
        raise NonFiniteLossError(f"the update of step {int(state.step)} is not finite")


@jax.jit
def _all_finite(tree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def means(sums: dict) -> dict[str, float | list[float | None] | None]:
    """{name: [sum, weight]} -> {name: sum / weight}, None where nothing was counted.

    What is counted by class, [2, K], becomes a list of K.
    """

    def mean(total, weight):
        return float(total) / float(weight) if weight > 0 else None

    return {
        name: mean(*pair) if np.ndim(pair) == 1 else [mean(*p) for p in zip(*pair, strict=True)]
        for name, pair in sums.items()
    }


# ---------------------------------------------------------------------------------------------
# The log.


class Log:
    """metrics.jsonl, TensorBoard events and the progress lines of one run.

    It adds to metrics.jsonl, which `cut_back` has brought to the step that the run goes on from.
    Without a workdir it only checks what it is given: of several processes one writes, and all
    notice that the run has diverged.

    Attributes:
      lines: how many metrics.jsonl has; 0 without a workdir.
    """

    def __init__(
        self,
        workdir: epath.Path | None,
        step: int,
        train_steps: int,
        images_per_step: int,
        tensorboard: bool,
    ):
        self._path = workdir / FILE if workdir else None
        self.lines = len(read(workdir)) if workdir else 0
        self._events = _event_file(workdir, step) if workdir and tensorboard else None
        self._train_steps, self._images_per_step = train_steps, images_per_step
        self._latest = {}  # the newest line of each split
        self._start = step
        self._started = self._lap = self._printed = time.monotonic()

    def train(self, step: int, window: dict) -> None:
        """Fetches and writes a window of train steps that ends with `step`.

        Raises:
          NonFiniteLossError: the loss of one of its steps is NaN or infinite.
        """
        window = jax.device_get(window)
        check_finite(window)
        steps, seconds = float(window["sums"]["loss"][1]), self._seconds()
        self._write(
            step,
            "train",
            means(window["sums"])
            | {
                "seconds": seconds,
                "steps_per_second": steps / seconds,
                "images_per_second": steps * self._images_per_step / seconds,
            },
        )
        due = time.monotonic() - self._printed >= PROGRESS_SECONDS or step == self._train_steps
        if due and self._path:
            self._printed = time.monotonic()
            print(self._progress(step), file=sys.stderr, flush=True)

    def evaluation(self, step: int, split: str, scores: dict[str, float]) -> None:
        """Writes the scores of an evaluation.

        Raises:
          NonFiniteLossError: the loss of the split is NaN or infinite, with either parameters.
        """
        if not math.isfinite(scores["loss"] + scores["loss_ema"]):
            raise NonFiniteLossError(f"the {split} loss is not finite at step {step}")
        self._write(step, split, scores | {"seconds": self._seconds()})

    def to_disk(self) -> None:
        """Returns when a power cut can take nothing from metrics.jsonl: for a checkpoint."""
        if self._path and self._path.exists() and "://" not in str(self._path):
            with open(self._path, "ab") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self._events:
            self._events.close()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done within counts as neither training nor evaluation: not in their seconds."""
        start = time.monotonic()
        yield
        passed = time.monotonic() - start
        self._lap, self._started = self._lap + passed, self._started + passed

    def _write(self, step: int, split: str, values: dict[str, Any]) -> None:
        if not self._path:
            return
        # JSON has no word for NaN: a diagnostic that is not finite is not known.
        known = lambda x: x if math.isfinite(x or 0) else None  # noqa: E731
        values = {
            name: [known(x) for x in value] if isinstance(value, list) else known(value)
            for name, value in values.items()
        }
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "split": split} | values) + "\n")
        self.lines += 1
        self._latest[split] = values
        if self._events:
            tags = {f"{split}/{name}": x for name, x in values.items() if x is not None}
            by_class = {tag: x for tag, x in tags.items() if isinstance(x, list)}
            scalars = {tag: x for tag, x in tags.items() if tag not in by_class}
            self._events.write(step, scalars, by_class)

    def _seconds(self) -> float:
        """Since the line before this one; the first one's include compilation."""
        before, self._lap = self._lap, time.monotonic()
        return self._lap - before

    def _progress(self, step: int) -> str:
        train = self._latest["train"]
        parts = [f"step {step:>{len(str(self._train_steps))}}/{self._train_steps}"]
        parts.append(f"loss {train['loss']:.3f}")
        if train["mask_rate"] is not None:
            parts.append(f"pseudo-labels {train['mask_rate']:4.0%} used")
        if train["pseudo_label_accuracy"] is not None:
            parts.append(f"{train['pseudo_label_accuracy']:4.0%} right")
        for split, line in self._latest.items():
            if split != "train":
                parts.append(f"{split} {line['accuracy']:.1%}, EMA {line['accuracy_ema']:.1%}")
        seconds = (time.monotonic() - self._started) / (step - self._start)
        parts.append(f"{1 / seconds:.1f} steps/s")
        parts.append(f"{duration((self._train_steps - step) * seconds)} left")
        return "  ".join(parts)


def _event_file(workdir: epath.Path, step: int) -> events.EventFile | None:
    try:
        return events.EventFile(workdir / "tensorboard", first_step=step + 1)
    except ImportError:
        logging.warning("TensorBoard is not installed: no events are written.")
        return None


def read(workdir: epath.Path, count: int | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl.

    Args:
      workdir: the run's folder.
      count: how many lines there must be; more are left out. None = all: none if the file is not
        there, and without a last line that was cut off, as of a run that is under way.

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
                f"{path} is damaged in line {number} ({error}). Bring the file back from a backup. "
                "Without it the run has no result: take another --workdir to start anew."
            ) from None
    if count is not None and len(read) < count:
        raise InputError(
            f"{path} holds {len(read)} of the {count} lines that the run wrote: the result would "
            "leave out the others. Bring the file back from a backup, or take another --workdir "
            "to start anew."
        )
    return read


def cut_back(workdir: epath.Path, count: int) -> None:
    """Keeps the first `count` lines of metrics.jsonl: those of the time of a checkpoint.

    So that every line is there once however often the run was interrupted.

    Raises:
      InputError: as `read`; nothing was changed.
    """
    lines = read(workdir, count)
    files.write_text(workdir / FILE, "".join(json.dumps(line) + "\n" for line in lines))


def duration(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# ---------------------------------------------------------------------------------------------
# The result, computed from metrics.jsonl so that an interrupted run reports what another does.


def result(lines: list[dict[str, Any]], split: str) -> dict[str, Any]:
    """Accuracies and averages of a run.

    Args:
      lines: of metrics.jsonl.
      split: 'test' or 'validation', the one that was evaluated.

    Returns:
      {f'{split}_accuracy': {'raw' and 'ema': {'last', 'median20', 'best'}} in [0, 1],
      'evaluations_in_median': at most 20; 'mask_rate', 'pseudo_label_accuracy' and
      'pseudo_label_accuracy_all': over all pseudo-labels of the run (None if never known), however
      its steps were cut into log windows,
      'wall_seconds': of training and evaluation, over all starts of the run,
      'images_per_second': views through the backbone in training, median of the log windows}.
    """
    evaluations = [line for line in lines if line["split"] == split]
    windows = [line for line in lines if line["split"] == "train"]
    accuracy = {}
    for name, field in (("raw", "accuracy"), ("ema", "accuracy_ema")):
        values = [line[field] for line in evaluations]
        accuracy[name] = {
            "last": values[-1],
            "median20": statistics.median(values[-20:]),
            "best": max(values),
        }
    # Windows count by their steps, and the accuracy of the used ones by how many were used.
    steps = np.diff([0, *(line["step"] for line in windows)])
    used = [n * (line["mask_rate"] or 0) for n, line in zip(steps, windows, strict=True)]
    means = {}
    for name, counts in (
        ("mask_rate", steps),
        ("pseudo_label_accuracy", used),
        ("pseudo_label_accuracy_all", steps),
    ):
        values = [line[name] for line in windows]
        known = [(value, n) for value, n in zip(values, counts, strict=True) if value is not None]
        means[name] = statistics.fmean(*zip(*known, strict=True)) if known else None
    return {
        f"{split}_accuracy": accuracy,
        "evaluations_in_median": min(20, len(evaluations)),
        **means,
        "wall_seconds": round(sum(line["seconds"] for line in lines), 1),
        "images_per_second": round(
            statistics.median(line["images_per_second"] for line in windows), 1
        ),
    }

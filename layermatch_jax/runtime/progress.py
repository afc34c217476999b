"""Prints the progress of a run while it trains."""

import sys
import time
from typing import Any

import jax
import ml_collections
from absl import logging

from layermatch_jax import config as config_lib
from layermatch_jax.runtime import clock as clock_lib

PERIOD = 2.0  # seconds between two lines
_LONG_COMPILATION = 5  # seconds
_LONG_RUN = 24 * 3600  # seconds on a CPU
# Settings that make a run long.
_COSTS = ("train_steps", "batch_size", "unlabeled_ratio", "dataset.image_size", "model.name")
_COSTS_OF_MODELS = {
    "wide_resnet": ("model.depth", "model.widen_factor"),
    "conv4": ("model.width",),
    "linear": ("model.width",),
}


class Progress:
    """Prints to stderr what a run does and how long it will take.

    If there are several processes, only the first one creates this object.
    """

    def __init__(self, config: ml_collections.ConfigDict, step: int, clock: clock_lib.Clock):
        self._config, self._clock = config, clock
        self._began = self._printed = time.monotonic()
        self._compiling, self._foreseen = step < config.train_steps, False
        # The pace is measured from this (step, time): after the first call, and again after the
        # first evaluation, because both compile a program.
        self._evaluated, self._from = False, None
        self._shown = {}
        if self._compiling:
            _say("compiling the train step ...")

    def update(self, step: int, latest: dict[str, dict[str, Any]]) -> None:
        """Prints what is new; call it after every call of the train program.

        Args:
          step: the last step of the call.
          latest: from metrics.Log: the newest line of each split.
        """
        train_steps, now = self._config.train_steps, time.monotonic()
        if self._compiling and self._clock.first_call:
            self._compiling, self._from = False, self._clock.first_call
            seconds = self._clock.first_call[1] - self._began
            if seconds > _LONG_COMPILATION:
                _say(f"compiled, and run for the first time, in {about(seconds)}")
        if not self._foreseen and self._clock.step_seconds and step < train_steps:
            self._foreseen = True
            foresee(self._config, self._clock.step_seconds, train_steps - step)
        if len(latest) > 1 and not self._evaluated:
            self._evaluated, self._from = True, (step, now)
        due = step == train_steps or now - self._printed >= PERIOD
        if due and "train" in latest and latest is not self._shown:
            self._printed, self._shown = now, latest
            _say(line(step, train_steps, latest, self._seconds_left(step, now)))

    def _seconds_left(self, step: int, now: float) -> float | None:
        """Estimates the time left from the pace so far, evaluations included; None if not known."""
        first, since = self._from or (step, now)
        pace = (now - since) / (step - first) if step > first else self._clock.step_seconds
        return None if pace is None else pace * (self._config.train_steps - step)


def foresee(config: ml_collections.ConfigDict, step_seconds: float, steps: int) -> None:
    """Prints how long the remaining `steps` will take; warns of more than a day on a CPU."""
    seconds, device = steps * step_seconds, jax.devices()[0]
    shown = f"{step_seconds:.2g}" if step_seconds < 10 else f"{step_seconds:.0f}"
    _say(
        f"a step takes {shown} s: the remaining {steps:,} steps will take about {about(seconds)} "
        f"on {jax.device_count()} x {device.device_kind}, without evaluations"
    )
    if device.platform == "cpu" and seconds > _LONG_RUN:
        logging.warning(
            "%s is long, and a GPU or TPU would be much faster. On this CPU, lower some of %s",
            about(seconds),
            ", ".join(
                f"--config.{name}={value}"
                for name, value in config_lib.fields(config).items()
                if name in (*_COSTS, *_COSTS_OF_MODELS.get(config.model.name, ()))
            ),
        )


def line(
    step: int, train_steps: int, latest: dict[str, dict[str, Any]], seconds_left: float | None
) -> str:
    """Formats a line of at most 80 columns (longer if several numbers are unusually long).

    Args:
      step: the current step.
      train_steps: the last step.
      latest: {split: its newest line of metrics.jsonl}; 'train' and, after an evaluation, 'test' or
        'validation'.
      seconds_left: estimated time to the end; None if not known yet.
    """
    train = latest["train"]
    parts = [f"{step:>{len(str(train_steps))}}/{train_steps}", f"loss {train['loss']:.2f}"]
    shares = (("used", train["mask_rate"]), ("right", train["pseudo_label_accuracy"]))
    if known := [f"{name} {share:.0%}" for name, share in shares if share is not None]:
        parts.append(" ".join(known))
    for split, scores in latest.items():
        if split == "cross_validation" and scores["accuracy_ema"] is not None:
            parts.append(f"cross-val. {scores['accuracy_ema']:.1%}")
        elif split in ("test", "validation"):
            name = {"validation": "val."}.get(split, split)
            parts.append(f"{name} {scores['accuracy']:.1%} EMA {scores['accuracy_ema']:.1%}")
    if seconds_left is not None:
        parts.append(f"{short(seconds_left)} left")
    return "  ".join(parts)


def short(seconds: float) -> str:
    """'2:05' (minutes and seconds), '1.5 h', '63 h' or '140 d'."""
    hours = seconds / 3600
    if hours < 1:
        return clock_lib.duration(seconds)
    return f"{hours:.2g} h" if hours < 99.5 else f"{hours / 24:.0f} d"


def about(seconds: float) -> str:
    """Formats seconds roughly: 90 -> '90 s', 5000 -> '83 minutes', 10_000_000 -> '116 days'."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

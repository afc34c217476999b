"""The progress that a run prints while it trains."""

import types

import jax
import pytest
from absl import logging

from layermatch_jax import config as config_lib
from layermatch_jax.runtime import progress
from layermatch_jax.runtime.clock import EMPTY, Clock

DAY = 86400


def train(**changed):
    return {"loss": 1.2345, "mask_rate": 0.951, "pseudo_label_accuracy": 0.926} | changed


def scores(raw=0.9412, ema=0.9438):
    return {"accuracy": raw, "accuracy_ema": ema}


def test_a_line():
    latest = {"train": train(), "test": scores()}
    assert progress.line(50, 1000, latest, 125.0) == (
        "  50/1000  loss 1.23  used 95% right 93%  test 94.1% EMA 94.4%  2:05 left"
    )


def test_a_line_says_nothing_of_what_is_not_known():
    latest = {"train": train(pseudo_label_accuracy=None)}
    assert progress.line(5, 10, latest, None) == " 5/10  loss 1.23  used 95%"
    latest = {"train": train(pseudo_label_accuracy=None, mask_rate=None)}
    assert progress.line(5, 10, latest, 3) == " 5/10  loss 1.23  0:03 left"


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize(
    ("step", "train_steps", "left"),
    [(524_288, 2**20, 63 * 3600), (2**20, 2**20, 0), (12_000, 20_000, 3599), (9, 2**20, 140 * DAY)],
)
def test_a_line_has_80_columns(split, step, train_steps, left):
    latest = {"train": train(), split: scores()}
    assert len(progress.line(step, train_steps, latest, left)) <= 80


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(125, "2:05"), (5400, "1.5 h"), (63 * 3600, "63 h"), (140 * DAY, "140 d")],
)
def test_what_is_left_in_few_characters(seconds, text):
    told = progress.line(1, 10, {"train": train()}, seconds)
    assert told.endswith(f"  {text} left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.4, "1 s"), (90, "90 s"), (5000, "83 minutes"), (100_000, "28 hours"),
     (10_000_000, "116 days")],
)  # fmt: skip
def test_about(seconds, text):
    assert progress.about(seconds) == text


class Run:
    """A run of 100 steps that take 2 s each, after 30 s of compilation; time is a number."""

    def __init__(self, monkeypatch, capsys, step=0, **fields):
        self.now, self.step, self._capsys = 1000.0, step, capsys
        time = types.SimpleNamespace(monotonic=lambda: self.now)
        for module in (progress, progress.clock_lib):
            monkeypatch.setattr(module, "time", time)
        self.config = config_lib.base()
        self.config.update_from_flattened_dict({"train_steps": 100} | fields)
        self.clock = Clock(step, EMPTY)
        self.progress = progress.Progress(self.config, step, self.clock)

    def train(self, seconds, latest=None, evaluation=0):
        self.now, self.step = self.now + seconds, self.step + 1
        self.clock.done(self.step)
        with self.clock.paused():
            self.now += evaluation
        self.progress.update(self.step, latest or {})
        return self._capsys.readouterr().err


def test_what_is_told_before_the_first_line(monkeypatch, capsys):
    run = Run(monkeypatch, capsys)
    assert capsys.readouterr().err == "compiling the train step ...\n"
    assert run.train(32) == "compiled, and run for the first time, in 32 s\n"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    assert run.train(2) == (
        f"a step takes 2 s: the remaining 98 steps will take about 3 minutes on {devices}, "
        "without evaluations\n"
    )
    assert run.train(2) == ""


def test_a_short_compilation_is_not_told_of(monkeypatch, capsys):
    run = Run(monkeypatch, capsys)
    capsys.readouterr()
    assert run.train(1) == ""


def test_the_time_left_does_not_count_compilation(monkeypatch, capsys):
    run = Run(monkeypatch, capsys, step=10)
    for seconds in (32, 2, 2):
        run.train(seconds)
    latest = {"train": train()}
    # Steps 12 to 14 took 2 s each, 86 are left. With compilation (9.5 s a step) it would be 13:37.
    assert run.train(2, latest).endswith("  used 95% right 93%  2:52 left\n")
    latest |= {"test": scores()}  # the first evaluation compiles, too
    assert run.train(2, dict(latest), evaluation=40).endswith("EMA 94.4%  2:50 left\n")
    run.train(2, dict(latest))
    # Steps 16 and 17 took 10 s with the second evaluation: 5 s for each of the 83 that are left.
    assert run.train(2, dict(latest), evaluation=6).endswith("  6:55 left\n")


def test_a_line_is_told_when_there_is_something_new_but_not_too_often(monkeypatch, capsys):
    run = Run(monkeypatch, capsys)
    for seconds in (32, 2):
        run.train(seconds)
    latest = {"train": train()}
    assert run.train(2, latest).startswith("  3/100  loss 1.23")
    assert run.train(60, latest) == "", "nothing new"
    assert run.train(1, dict(latest)).startswith("  5/100  loss 1.23")
    assert run.train(1, dict(latest)) == "", "a line a second is too many"


def test_the_last_line_is_complete(monkeypatch, capsys):
    run = Run(monkeypatch, capsys, train_steps=3)
    run.train(1)
    run.train(0.1)
    assert run.train(0.1, {"train": train(), "test": scores(0.5, 0.25)}) == (
        "3/3  loss 1.23  used 95% right 93%  test 50.0% EMA 25.0%  0:00 left\n"
    )


@pytest.mark.parametrize(("steps", "warned"), [(43_000, False), (44_000, True)])
def test_more_than_a_day_on_a_cpu_is_a_warning(steps, warned, monkeypatch, capsys, caplog):
    logging.set_verbosity(logging.WARNING)  # as main does
    run = Run(monkeypatch, capsys, train_steps=steps)  # of 2 s: a day has 43,200
    run.train(32)
    assert f"the remaining {steps - 2:,} steps will take about 24 hours on" in run.train(2)
    message = " ".join(record.getMessage() for record in caplog.records)
    assert bool(message) == warned
    if warned:
        assert message.startswith("24 hours is long, and a GPU or TPU would be much faster.")
        for setting in ("train_steps=44000", "batch_size=64", "unlabeled_ratio=7", "model.depth=28",
                        "model.widen_factor=2"):  # fmt: skip
            assert f"--config.{setting}" in message
        assert "model.width" not in message, "the network has none"

"""The clock counts the seconds and steps of training alone."""

import numpy as np
import pytest

from layermatch_jax.runtime import clock


@pytest.fixture
def now(monkeypatch):
    """The current time, a list of one number that a test sets."""
    now = [100.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    return now


def test_the_first_call_of_a_start_is_training_but_not_speed(now):
    ticking = clock.Clock(0, clock.EMPTY)
    for at, done in ((130, 0), (131, 2), (131.5, 4), (132, 6)):  # 30 s of compilation, 2 steps
        now[0] = at
        ticking.done(done)
        assert (ticking.first_call is None) == (done < 2)
        assert (ticking.step_seconds is None) == (done < 4)
    assert ticking.first_call == (2, 131)
    assert ticking.step_seconds == 0.25  # 1 s for 4 steps
    assert ticking.next_window() == {"seconds": 32, "timed_seconds": 1, "timed_steps": 4}
    assert ticking.window() == clock.EMPTY


def test_a_pause_is_no_training(now):
    ticking = clock.Clock(0, clock.EMPTY)
    now[0] += 1
    ticking.done(1)
    now[0] += 2
    ticking.done(2)
    with ticking.paused():
        now[0] += 1000
    now[0] += 4
    ticking.done(3)
    assert ticking.next_window() == {"seconds": 7, "timed_seconds": 6, "timed_steps": 2}


def test_a_window_goes_on_from_a_checkpoint(now):
    before = {"seconds": 9.0, "timed_seconds": 8.0, "timed_steps": 4.0}
    ticking = clock.Clock(5, {name: np.float32(x) for name, x in before.items()})
    now[0] += 20  # the resumed run compiles again
    ticking.done(6)
    now[0] += 2
    ticking.done(7)
    assert ticking.window() == {"seconds": 31, "timed_seconds": 10, "timed_steps": 5}
    assert ticking.step_seconds == 2
    assert all(value.dtype == np.float32 for value in ticking.window().values())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3725, "1:02:05"),
     (227_000, "63:03:20")],
)  # fmt: skip
def test_duration(seconds, text):
    assert clock.duration(seconds) == text

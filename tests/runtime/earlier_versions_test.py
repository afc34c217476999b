"""Checkpoints of earlier versions are read as today's."""

import numpy as np
import pytest
from etils import epath

from layermatch_jax.errors import InputError
from layermatch_jax.runtime import checkpoint


def of_today(head_stats):
    return {
        "state": {"step": np.int32(0), "params": {"w": np.zeros(3)}, "head_stats": head_stats},
        "window": {"sums": {"loss": np.zeros(2), "loss_fairness": np.zeros(2)}},
        "clock": {"seconds": np.float32(7)},
        "lines": np.int32(-1),
    }


@pytest.fixture
def saved_before(tmp_path):
    """A checkpoint of version 0.1: no clock, no lines, no heads, and an earlier name of a loss."""
    workdir = epath.Path(tmp_path)
    with checkpoint.open_manager(workdir, kept=1) as manager:
        checkpoint.save(
            manager,
            2,
            {
                "state": {"step": np.int32(2), "params": {"w": np.array([1.0, 2.0, 3.0])}},
                "window": {
                    "sums": {"loss": np.array([5.0, 2.0]), "regulariser": np.array([0.5, 2.0])}
                },
            },
        )
    return workdir


def test_a_run_of_before_goes_on(saved_before):
    with checkpoint.open_manager(saved_before, kept=1) as manager:
        run = checkpoint.restore_latest(manager, saved_before, of_today(head_stats={}))
    assert sorted(run) == ["clock", "lines", "state", "window"]
    assert run["state"]["step"] == 2
    assert run["state"]["head_stats"] == {}
    np.testing.assert_array_equal(run["state"]["params"]["w"], [1, 2, 3])
    assert sorted(run["window"]["sums"]) == ["loss", "loss_fairness"]
    np.testing.assert_array_equal(run["window"]["sums"]["loss_fairness"], [0.5, 2])
    assert run["clock"]["seconds"] == 7
    assert run["lines"] == -1


def test_a_method_without_that_loss_leaves_it_out(saved_before):
    template = of_today(head_stats={})
    del template["window"]["sums"]["loss_fairness"]
    with checkpoint.open_manager(saved_before, kept=1) as manager:
        run = checkpoint.restore_latest(manager, saved_before, template)
    assert sorted(run["window"]["sums"]) == ["loss"]
    np.testing.assert_array_equal(run["window"]["sums"]["loss"], [5, 2])


def test_the_state_of_before_is_read_alone(saved_before):
    state = checkpoint.read_state(saved_before, of_today(head_stats={})["state"])
    np.testing.assert_array_equal(state["params"]["w"], [1, 2, 3])
    assert state["head_stats"] == {}


def test_a_head_that_was_not_there_is_no_renaming(saved_before):
    template = of_today(head_stats={"projection": {"mean": np.zeros(2)}})
    with (
        checkpoint.open_manager(saved_before, kept=1) as manager,
        pytest.raises(InputError, match="head_stats/projection/mean: none in the checkpoint"),
    ):
        checkpoint.restore_latest(manager, saved_before, template)


def test_centers_under_their_earlier_name(tmp_path):
    centers = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    workdir = epath.Path(tmp_path)
    with checkpoint.open_manager(workdir, kept=1) as manager:
        state = {"step": np.int32(3), "centres": {"centres": centers, "updates": np.arange(2)}}
        checkpoint.save(manager, 3, {"state": state})
    empty = {"centers": np.zeros_like(centers), "updates": np.zeros(2, int)}
    read = checkpoint.read_state(workdir, {"step": np.int32(0), "centers": empty})
    assert sorted(read) == ["centers", "step"]
    np.testing.assert_array_equal(read["centers"]["centers"], centers)
    np.testing.assert_array_equal(read["centers"]["updates"], [0, 1])

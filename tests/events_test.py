"""Event files, as TensorBoard reads them."""

import numpy as np
import pytest
from etils import epath

from layermatch_jax import events

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_tensorboard_reads_what_was_written(tmp_path):
    file = events.EventFile(epath.Path(tmp_path) / "tensorboard")
    file.write(10, {"train/loss": 1.5}, {"train/by_class": [0.25, None, 0.75], "none": [None]})
    file.write(20, {"train/loss": 0.5, "test/accuracy": 0.9}, {})
    seen_while_open = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(seen_while_open.Tensors("train/loss")) == 2
    file.close()

    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(read.Tags()["tensors"]) == {"train/loss", "train/by_class", "test/accuracy"}
    scalars = [(e.step, e.tensor_proto.float_val[0]) for e in read.Tensors("train/loss")]
    assert scalars == [(10, 1.5), (20, 0.5)]
    (event,) = read.Tensors("train/by_class")
    buckets = np.frombuffer(event.tensor_proto.tensor_content, np.float64).reshape(-1, 3)
    # Rows of (left, right, count): two numbers, from the one to the other.
    assert (buckets[0, 0], buckets[-1, 1], buckets[:, 2].sum()) == (0.25, 0.75, 2)


def test_two_starts_of_a_run_are_two_files(tmp_path):
    for _ in range(2):
        events.EventFile(epath.Path(tmp_path)).close()
    assert len(list(tmp_path.glob("*tfevents*"))) == 2

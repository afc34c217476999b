"""Event files, read by TensorBoard."""

import numpy as np
import pytest
from etils import epath

from layermatch_jax.runtime import events

# The reader that TensorBoard's own pages use.
accumulator = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")


def test_tensorboard_reads_what_was_written(tmp_path):
    file = events.EventFile(epath.Path(tmp_path) / "tensorboard", first_step=1)
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
    # Rows of (left edge, right edge, count): two numbers, one at each end.
    assert (buckets[0, 0], buckets[-1, 1], buckets[:, 2].sum()) == (0.25, 0.75, 2)


def test_after_a_resume_each_step_is_there_once(tmp_path):
    """Three starts: the second resumes at step 20, the third from an older checkpoint, step 10."""
    for first_step, steps, loss in ((1, (10, 20, 30), 1.0), (21, (30, 40), 2.0), (11, (20,), 3.0)):
        file = events.EventFile(epath.Path(tmp_path), first_step)
        for step in steps:
            file.write(step, {"train/loss": loss}, {"train/by_class": [0.5]})
        file.close()
        read = accumulator.EventAccumulator(str(tmp_path), purge_orphaned_data=True).Reload()
        seen = [(e.step, e.tensor_proto.float_val[0]) for e in read.Tensors("train/loss")]
        expected = {
            1: [(10, 1.0), (20, 1.0), (30, 1.0)],
            21: [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)],
            11: [(10, 1.0), (20, 3.0)],
        }
        assert seen == expected[first_step]
        assert [e.step for e in read.Tensors("train/by_class")] == [step for step, _ in seen]
    assert len(list(tmp_path.glob("*tfevents*"))) == 3

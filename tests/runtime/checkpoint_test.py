"""Checkpoints: what is restored, damaged ones, full disks, states that do not fit."""

import os
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from etils import epath

from layermatch_jax.errors import InputError, StorageError
from layermatch_jax.runtime import checkpoint


def tree(step):
    rng = np.random.RandomState(step)
    return {
        "state": {"kernel": rng.randn(30, 40).astype(np.float32), "zeros": np.zeros(7, np.float32)},
        "step": np.array(step, np.int32),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints of steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("saved")
    with checkpoint.open_manager(epath.Path(workdir), kept=5) as manager:
        for step in (2, 4):
            checkpoint.save(manager, step, tree(step))
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy of that workdir, to be damaged."""
    return epath.Path(shutil.copytree(saved, tmp_path / "run"))


def restore(workdir, template=None):
    with checkpoint.open_manager(workdir, kept=5) as manager:
        return checkpoint.restore_latest(manager, workdir, template or tree(0))


def assert_is(actual, step):
    expected = tree(step)
    np.testing.assert_array_equal(actual["state"]["kernel"], expected["state"]["kernel"])
    np.testing.assert_array_equal(actual["state"]["zeros"], expected["state"]["zeros"])
    assert actual["step"] == step


def test_the_newest_comes_back(workdir):
    assert_is(restore(workdir), 4)
    assert not (workdir / "checkpoints_damaged").exists()


def test_nothing_is_restored_where_nothing_was_saved(tmp_path):
    assert restore(epath.Path(tmp_path)) is None


def test_the_saved_tree_may_be_overwritten(tmp_path):
    workdir, current = epath.Path(tmp_path), tree(6)
    with checkpoint.open_manager(workdir, kept=5) as manager:
        checkpoint.save(manager, 6, current)
        current["state"]["kernel"][:] = 0
    assert_is(restore(workdir), 6)


NAMES = ["exp[1]", "[!a]", "a*b", "**", "a?b", "a\\b", "a%20b#", "a{b}", " a\n", "Äß", "x" * 255]


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_whatever_the_folder_is_called(name, tmp_path):
    decoy = tmp_path / "axb" / "checkpoints" / "2.orbax-checkpoint-tmp" / "ocdbt.process_0"
    decoy.mkdir(parents=True)  # the pattern a*b matches this, too
    workdir = epath.Path(tmp_path) / name / "run"
    workdir.mkdir(parents=True)
    assert not checkpoint.recorded(workdir)
    with checkpoint.open_manager(workdir, kept=5) as manager:
        checkpoint.save(manager, 2, tree(2))
    assert checkpoint.recorded(workdir)
    assert_is(restore(workdir), 2)
    assert_is({"state": checkpoint.read_state(workdir, tree(0)["state"]), "step": 2}, 2)
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["2"]


def test_a_relative_folder_with_such_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = epath.Path("exp[1]")
    workdir.mkdir()
    with checkpoint.open_manager(workdir, kept=5) as manager:
        checkpoint.save(manager, 2, tree(2))
        with pytest.raises(StorageError) as caught:
            checkpoint.save(manager, 1, tree(1))
    assert f"{tmp_path}/exp[1]/checkpoints holds a later one (2)" in str(caught.value)
    assert_is(restore(workdir), 2)


def test_what_was_written_is_known_to_open(workdir, monkeypatch):
    with checkpoint.open_manager(workdir, kept=5) as manager:
        save = manager.save

        def save_and_lose(step, **arguments):
            saved = save(step, **arguments)
            remove_arrays(workdir, step)
            (workdir / "checkpoints" / str(step) / "default" / "_METADATA").unlink()
            return saved

        monkeypatch.setattr(manager, "save", save_and_lose)
        with pytest.raises(StorageError) as caught:
            checkpoint.save(manager, 6, tree(6))
    said = f"the checkpoint of step 6 was written to {workdir}/checkpoints, but cannot be opened: "
    assert str(caught.value).startswith(said)


NOT_ALLOWED = [  # messages of Python and tensorstore
    (PermissionError(13, "Permission denied"), "Permission denied"),
    (OSError(24, "Too many open files"), "Too many open files"),
    (
        ValueError(
            'PERMISSION_DENIED: Error opening "zarr" driver: Failed to open: Permission denied '
            "[tensorstore_spec='{}'] [os_error_code='13']"
        ),
        "Permission denied",
    ),
]


@pytest.mark.parametrize(("error", "said"), NOT_ALLOWED)
def test_what_cannot_be_read_just_now_is_not_damaged(error, said, workdir, monkeypatch):
    def refuse(*_, **__):
        raise error

    with checkpoint.open_manager(workdir, kept=5) as manager:
        monkeypatch.setattr(manager, "restore", refuse)
        with pytest.raises(StorageError) as caught:
            checkpoint.restore_latest(manager, workdir, tree(0))
    assert str(caught.value).startswith(
        f"the checkpoint of step 4 in {workdir}/checkpoints cannot be read: {said}. "
    )
    assert not (workdir / "checkpoints_damaged").exists()


def test_a_folder_that_may_not_be_read_is_not_damaged(workdir, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/checkpoints/4/default"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for read in (restore, lambda workdir: checkpoint.read_state(workdir, tree(0)["state"])):
        with pytest.raises(StorageError, match=r"step 4 in .* cannot be read: Permission denied"):
            read(workdir)
    assert not (workdir / "checkpoints_damaged").exists()


def delete(path):
    path.unlink()


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [delete, cut_in_half, empty, change_a_byte])
def test_damage_is_noticed_whichever_file_it_hits(damage, saved, tmp_path):
    """The damaged checkpoint is not used, unless it is still intact: some files are copies."""
    files = [path for path in (saved / "checkpoints" / "4").rglob("*") if path.is_file()]
    fell_back = 0
    for number, file in enumerate(files):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        damage(workdir / file.relative_to(saved))
        restored = restore(epath.Path(workdir))
        assert_is(restored, int(restored["step"]))
        aside = workdir / "checkpoints_damaged" / "4"
        assert aside.exists() == (restored["step"] == 2)
        assert (workdir / "checkpoints" / "4").exists() != aside.exists()
        fell_back += aside.exists()
    assert fell_back >= 3, "the arrays, their directory and their description at least"


def remove_arrays(workdir, step):
    shutil.rmtree(workdir / "checkpoints" / str(step) / "default" / "d")


def test_a_damaged_one_is_told_of_and_its_step_can_be_saved_again(workdir, caplog):
    remove_arrays(workdir, 4)
    logging.set_verbosity(logging.WARNING)  # as main does
    with checkpoint.open_manager(workdir, kept=5) as manager:
        assert_is(checkpoint.restore_latest(manager, workdir, tree(0)), 2)
        checkpoint.save(manager, 4, tree(4))
    message = " ".join(record.getMessage() for record in caplog.records)
    assert f"Checkpoint of step 4 is damaged, moved to {workdir}/checkpoints_damaged/4" in message
    assert "Resuming from step 2." in message
    assert_is(restore(workdir), 4)
    assert (workdir / "checkpoints_damaged" / "4").exists()


def test_wrong_numbers_in_sound_files_are_noticed(workdir):
    other = tree(4)
    other["state"]["kernel"][3, 5] += 1e-6
    step = workdir / "checkpoints" / "4"
    step.rmtree()
    with (
        pytest.MonkeyPatch.context() as patch,
        checkpoint.open_manager(workdir, kept=5) as manager,
    ):
        patch.setattr(
            checkpoint, "_checksum", lambda saved, own=checkpoint._checksum: own(saved) ^ 1
        )
        checkpoint.save(manager, 4, other)
    assert_is(restore(workdir), 2)


def test_without_any_whole_one_nothing_is_started_anew(workdir):
    for step in (2, 4):
        remove_arrays(workdir, step)
    with pytest.raises(InputError) as caught:
        restore(workdir)
    message = str(caught.value)
    assert message.startswith(f"all checkpoints in {workdir}/checkpoints are damaged:\n  step 4: ")
    assert "\n  step 2: " in message
    assert "another --workdir to start a new run" in message
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]


def test_a_state_of_another_version_is_refused_by_name(workdir):
    template = tree(0)
    template["state"]["kernel"] = np.zeros((30, 41), np.float32)
    template["state"]["bias"] = np.zeros(41, np.float32)
    del template["state"]["zeros"]
    template["step"] = jnp.zeros((), jnp.float32)
    with pytest.raises(InputError) as caught:
        restore(workdir, template)
    first, *listed, last = str(caught.value).split("\n")
    assert first.startswith(f"{workdir}/checkpoints/4 is of another version or another model")
    assert listed == [
        "  run/state/bias: none in the checkpoint, float32[41] now",
        "  run/state/kernel: float32[30, 40] in the checkpoint, float32[30, 41] now",
        "  run/state/zeros: float32[7] in the checkpoint, none now",
        "  run/step: int32[] in the checkpoint, float32[] now",
    ]
    assert "or another --workdir" in last
    assert (workdir / "checkpoints" / "4").exists()


def test_one_that_does_not_fit_gives_way_to_an_older_one_that_does(workdir):
    """For example, if the names of its arrays are damaged."""
    with checkpoint.open_manager(workdir, kept=5) as manager:
        checkpoint.save(manager, 6, tree(6) | {"other": np.ones(3, np.float32)})
    assert_is(restore(workdir), 4)
    assert (workdir / "checkpoints_damaged" / "6").exists()


def test_what_is_not_written_is_not_called_saved(workdir):
    with (
        checkpoint.open_manager(workdir, kept=5) as manager,
        pytest.raises(StorageError, match=r"step 3 was not written: .* holds a later one \(4\)"),
    ):
        checkpoint.save(manager, 3, tree(3))


def test_half_written_ones_are_removed(workdir):
    left = workdir / "checkpoints" / "6.orbax-checkpoint-tmp"
    (left / "default").mkdir(parents=True)
    assert_is(restore(workdir), 4)
    assert not left.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield epath.Path(folder)
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_costs_no_earlier_checkpoint(small_disk):
    big = {"kernel": np.random.RandomState(0).randn(100_000).astype(np.float32)}  # 400 kB
    with checkpoint.open_manager(small_disk, kept=5) as manager:
        checkpoint.save(manager, 2, big)
        checkpoint.save(manager, 4, big)
        with pytest.raises(StorageError) as caught:
            checkpoint.save(manager, 6, big)
    message = str(caught.value)
    assert f"could not be written to {small_disk}/checkpoints: " in message
    assert "No space left on device" in message
    assert "(steps: 2, 4)" in message
    assert len(message) < 400
    np.testing.assert_array_equal(restore(small_disk, big)["kernel"], big["kernel"])


def test_a_storage_error_is_told_by_its_reason(workdir, monkeypatch):
    """With tensorstore's message, for machines where the test cannot fill a disk."""
    error = (
        'RESOURCE_EXHAUSTED: Error opening "zarr" driver: Error writing "x": Failed to write 166 '
        "bytes to file 14: No space left on device [tensorstore_spec='{\"create\":true}'] "
        "[os_error_code='28']"
    )
    with checkpoint.open_manager(workdir, kept=5) as manager:
        for raised in (ValueError(error), OSError(28, "No space left on device")):
            monkeypatch.setattr(manager, "save", lambda *a, e=raised, **k: (_ for _ in ()).throw(e))
            with pytest.raises(StorageError, match=r"No space left on device\. Earlier ones are"):
                checkpoint.save(manager, 6, tree(6))
        monkeypatch.setattr(manager, "save", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # a bug is not reported as a full disk
            checkpoint.save(manager, 6, tree(6))


def test_the_folder_of_a_bucket_stays_one(monkeypatch):
    opened = []

    class Manager:
        def __init__(self, folder, **_):
            opened.append(str(folder))

        def close(self):
            pass

    monkeypatch.setattr(checkpoint.ocp, "CheckpointManager", Manager)
    for workdir in ("gs://bucket/run", "runs/x"):
        with checkpoint.open_manager(epath.Path(workdir), kept=5):
            pass
    assert opened == ["gs://bucket/run/checkpoints", f"{os.getcwd()}/runs/x/checkpoints"]


class PermissionDeniedError(Exception):
    """Has the name of TensorFlow's class."""


REFUSED = [  # messages of tensorstore and TensorFlow
    ValueError(
        'PERMISSION_DENIED: Error opening "zarr" driver: Error reading Byte range [0, 288) of '
        "gs://bucket/run/checkpoints/4/default/d/50ef: no access [http_response_code='403'] "
        "[tensorstore_spec='{\"create\":true}']"
    ),
    PermissionDeniedError("HTTP response code 403: no access\n\t when reading gs://bucket/run/x"),
]


@pytest.mark.parametrize("refused", REFUSED)
def test_what_a_bucket_refuses_is_neither_damaged_nor_a_mistake(refused, workdir, monkeypatch):
    def refuse(*_, **__):
        raise refused

    with checkpoint.open_manager(workdir, kept=5) as manager:
        monkeypatch.setattr(manager, "restore", refuse)
        with pytest.raises(type(refused)):
            checkpoint.restore_latest(manager, workdir, tree(0))
        monkeypatch.setattr(manager, "save", refuse)
        with pytest.raises(StorageError, match=r"no access.*Earlier ones are kept \(steps: 2, 4\)"):
            checkpoint.save(manager, 6, tree(6))
    assert not (workdir / "checkpoints_damaged").exists()


def test_what_is_missing_in_a_bucket_is_damage(workdir, monkeypatch):
    with checkpoint.open_manager(workdir, kept=5) as manager:
        restore = manager.restore

        def of_2_alone(step, **arguments):
            if step == 4:
                raise ValueError("NOT_FOUND: Error reading gs://bucket/run/checkpoints/4/default/d")
            return restore(step, **arguments)

        monkeypatch.setattr(manager, "restore", of_2_alone)
        assert_is(checkpoint.restore_latest(manager, workdir, tree(0)), 2)

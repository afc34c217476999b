"""Which errors are explained in a sentence, and which are bugs."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layermatch_jax import errors, modes


@pytest.mark.parametrize(
    ("number", "mend"),
    [
        (errno.ENOSPC, "Make room"),
        (
            errno.EACCES,
            "Give yourself permission to read and write it, or choose another place for it",
        ),
        (errno.EROFS, "Make its file system writable, or choose another place for it"),
        (errno.ENAMETOOLONG, "Use a shorter name"),
        (errno.ENOTDIR, "A file has the name that a folder needs. Move the file away"),
        (errno.EISDIR, "A folder has the name that a file needs. Move the folder away"),
        (errno.EIO, "The disk, or the connection to it, failed. Repair it"),
        (errno.ELOOP, "Mend this"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(number, mend):
    said = errors.explained(OSError(number, "No luck", "/runs/a/metrics.jsonl"))
    assert said.startswith(f"StorageError: /runs/a/metrics.jsonl: No luck. {mend}")
    assert said.endswith("; then run the same command again to resume")


def test_writing_names_no_file():
    said = errors.explained(OSError(errno.ENOSPC, "No space left on device"))
    assert said == (
        "StorageError: No space left on device. Make room; "
        "then run the same command again to resume"
    )


@pytest.mark.parametrize(
    "error",
    [OSError("of a library"), ConnectionError(111, "refused"), ValueError("x"), KeyError(1)],
)
def test_a_mistake_keeps_its_traceback(error):
    assert errors.explained(error) is None


def raised(action):
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_no_memory_on_a_device():
    # Sixteen terabytes: no machine of the tests has them.
    error = raised(lambda: jnp.zeros(2**42, jnp.float32).block_until_ready())
    assert "RESOURCE_EXHAUSTED" in str(error)
    said = errors.explained(error)
    assert said.startswith("OutOfMemory: this run needs more memory than the device has (RESOURCE_")
    for setting in ("batch_size", "unlabeled_ratio", "model.remat=True", "model.dtype=bfloat16"):
        assert f"--config.{setting}" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 21474836480 bytes.", True),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.11G of 15.48G hbm.\n\nTotal hbm usage >= 20.63G",
            True,
        ),
        ("INTERNAL: Failed to allocate: CUDA_ERROR_OUT_OF_MEMORY: out of memory", True),
        ("INVALID_ARGUMENT: shapes do not fit", False),
    ],
)
def test_no_memory_as_accelerators_say_it(text, memory):
    said = errors.explained(jax.errors.JaxRuntimeError(text))
    assert (said is not None) == memory
    if memory:
        assert "\n" not in said


def test_no_memory_on_the_host():
    error = raised(lambda: np.empty(2**60, np.uint8))
    assert isinstance(error, MemoryError)
    said = errors.explained(error)
    assert said.startswith("OutOfMemory: this machine has no memory left (Unable to allocate ")
    assert "--config.dataset.stored_size" in said
    assert errors.explained(MemoryError()).startswith(
        "OutOfMemory: this machine has no memory left (MemoryError)"
    )


def test_numbers_of_the_operating_system():
    assert errors.os_error_number(PermissionError(13, "x")) == 13
    assert errors.os_error_number(ValueError("a [os_error_code='28'] b")) == 28
    assert errors.os_error_number(ValueError("28")) is None


@pytest.mark.parametrize(
    ("mode", "resumes"), [("train", True), ("predict", True), ("export", False)]
)
def test_only_modes_that_resume_say_so(call, tmp_path, monkeypatch, mode, resumes):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "/full/file")

    monkeypatch.setitem(modes.MODES, mode, full)
    status, _, err = call(f"--mode={mode}", f"--workdir={tmp_path}")
    assert status == 1
    assert "then run the same command again" in err
    assert ("to resume" in err) == resumes

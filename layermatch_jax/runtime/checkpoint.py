"""Orbax checkpoints that do not depend on the number of devices, with a checksum.

The state is the same in all processes, so only the first one writes and reads checkpoints. It sends
what it read to the others (`hosts.from_first`).
"""

import contextlib
import errno
import functools
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import serialization, traverse_util

from layermatch_jax.errors import InputError, StorageError, os_error_number, refusal
from layermatch_jax.runtime import earlier_versions, saved_arrays

FOLDER, DAMAGED = "checkpoints", "checkpoints_damaged"
_SHOWN = 10  # leaves that do not fit, listed in a message
# Orbax reads *, ? and [ in a path as patterns. Tensorstore cannot read a path with a backslash.
NO_NAME = re.compile(r"[*?\[\\]")
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class DamagedError(Exception):
    """The arrays that were read are not those that were saved."""


@contextlib.contextmanager
def open_manager(workdir: epath.Path, kept: int):
    """Opens Orbax's manager of workdir/checkpoints; removes incomplete checkpoints.

    The run waits while a checkpoint is written, so that a failure is known at its step.
    """
    alone = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
    )
    several = {"multiprocessing_options": alone} if jax.process_count() > 1 else {}
    _silence_latecomers()
    with _folder(workdir) as folder:
        manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=kept,
                create=not several,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
                **several,
            ),
            item_handlers=ocp.StandardCheckpointHandler(),
        )
        with contextlib.closing(manager):
            yield manager


@contextlib.contextmanager
def _folder(workdir: epath.Path) -> Iterator[epath.Path]:
    """Yields workdir/checkpoints under a path that Orbax can use, valid inside the `with` only."""
    if "://" in str(workdir):  # resolve() would turn it into a local path
        yield workdir / FOLDER
        return
    workdir = workdir.resolve()  # Orbax accepts no relative path
    if not NO_NAME.search(str(workdir)):
        yield workdir / FOLDER
        return
    with tempfile.TemporaryDirectory() as other:
        link = epath.Path(other) / "workdir"
        os.symlink(workdir, link)
        yield link / FOLDER


def _name(manager: ocp.CheckpointManager) -> str:
    """Returns the real path of the folder of checkpoints, for messages."""
    folder = str(manager.directory)
    return folder if "://" in folder else os.path.realpath(folder)


def recorded(workdir: epath.Path) -> bool:
    """Whether a checkpoint was ever saved in a workdir, even if it is damaged now."""
    folders = [workdir / name for name in (FOLDER, DAMAGED)]
    return any(step.name.isdigit() for f in folders if f.exists() for step in f.iterdir())


def save(manager: ocp.CheckpointManager, step: int, tree) -> None:
    """Saves a tree of arrays as the checkpoint of `step`; the tree may be donated afterwards.

    Raises:
      StorageError: it could not be written, or what was written cannot be opened.
    """
    saved = jax.device_get(serialization.to_state_dict(tree))
    saved = {"run": saved, "checksum": np.array(_checksum(saved), np.uint32)}
    with _explained(manager):
        written = manager.save(step, args=ocp.args.StandardSave(saved))
    if not written:
        raise StorageError(
            f"the checkpoint of step {step} was not written: {_name(manager)} holds a later one "
            f"({manager.latest_step()}). Move it away; then run the same command again to resume"
        )
    try:
        there = saved_arrays.shapes(manager.directory / str(step) / "default")
        lost = _differences(traverse_util.unflatten_dict(there, sep="/"), saved)
    except Exception as error:  # of any kind
        lost = [_line(error)]
    if lost:
        raise StorageError(
            f"the checkpoint of step {step} was written to {_name(manager)}, but cannot be opened: "
            f"{lost[0]}. Use another --workdir, on another disk if you can"
        )


def restore_latest(manager: ocp.CheckpointManager, workdir: epath.Path, tree):
    """Restores the newest checkpoint that is intact, in the structure of `tree`.

    The arrays are restored to the host through a NumPy template: a template of device arrays would
    tie the checkpoint to the devices that wrote it. The caller places them on its own devices.
    Newer checkpoints that are damaged are moved to workdir/checkpoints_damaged, with a warning.

    Returns:
      The tree of NumPy arrays; None if there is no checkpoint.

    Raises:
      InputError: all checkpoints are damaged, or the newest intact one has another structure (the
        message lists the differences).
      StorageError: a checkpoint may be intact, but cannot be read at present.
    """
    template = jax.tree.map(np.asarray, serialization.to_state_dict(tree))
    damaged, misfit = {}, None
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            restored = _restore(manager, step, template)
        except InputError as error:  # if only its metadata are damaged, an older one fits
            misfit = misfit or InputError(f"{workdir / FOLDER / str(step)} {error}")
            damaged[step] = "its state does not fit"
            continue
        except Exception as error:  # of any kind: the file may hold anything
            _raise_unless_damage(error, manager, step)
            damaged[step] = _line(error)
            continue
        _set_aside(manager, workdir, damaged, f"Resuming from step {step}.")
        return serialization.from_state_dict(tree, restored)
    if misfit:
        raise misfit
    if damaged:
        listed = "".join(f"\n  step {step}: {reason}" for step, reason in damaged.items())
        raise InputError(
            f"all checkpoints in {workdir / FOLDER} are damaged:{listed}\nBring one back from a "
            "backup, or use another --workdir to start a new run."
        )
    return None


def read_state(workdir: epath.Path, state, step: int | None = None):
    """Reads the saved state of a run, which may still be training; changes nothing in its folder.

    Args:
      workdir: the run's folder.
      state: a state, or shapes, with the wanted structure; None = the structure that was saved.
      step: the step of the checkpoint; None = the newest that is intact.

    Returns:
      The state with NumPy arrays; nested dictionaries of them for state=None.

    Raises:
      InputError: there is no such checkpoint, or none is intact and has this structure.
    """
    if not (workdir / FOLDER).exists():
        raise InputError(f"{workdir} has no checkpoint yet")

    def zeros(tree):
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)

    template = {} if state is None else {"state": zeros(serialization.to_state_dict(state))}
    _silence_latecomers()
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(_folder(workdir))
        with _orbax_silent():  # Orbax warns about all effects of read_only
            manager = ocp.CheckpointManager(
                folder,
                options=ocp.CheckpointManagerOptions(read_only=True),
                item_handlers=ocp.StandardCheckpointHandler(),
            )
        opened.callback(manager.close)
        folder = _name(manager)
        there = sorted(manager.all_steps(), reverse=True)
        if step is not None and step not in there:
            listed = ", ".join(map(str, sorted(there))) or "none yet"
            raise InputError(f"{folder} has no step {step}; there are: {listed}")
        reasons = []
        for wanted in there if step is None else [step]:
            try:
                _check_rights(manager.directory / str(wanted))
                saved = manager.item_metadata(wanted).tree["run"]
                restored = _restore(manager, wanted, zeros(dict(saved)) | template)["state"]
                return serialization.from_state_dict(state, restored) if template else restored
            except Exception as error:  # of any kind: the file may hold anything
                _raise_unless_damage(error, manager, wanted)
                reasons.append(f"\n  step {wanted}: {error}")
                logging.warning("Checkpoint of step %d in %s cannot be read", wanted, folder)
    raise InputError(
        f"no checkpoint in {folder} can be read:{''.join(reasons) or ' there is none'}"
    )


def _raise_unless_damage(error: Exception, manager: ocp.CheckpointManager, step: int) -> None:
    """Raises if a checkpoint may be intact, but cannot be read at present (no permission, …)."""
    if isinstance(error, MemoryError) or refusal(error):
        raise error
    number = os_error_number(error)
    if number and number not in _NOT_THERE:
        raise StorageError(
            f"the checkpoint of step {step} in {_name(manager)} cannot be read: "
            f"{os.strerror(number)}. Mend this, for example give yourself permission to read it, "
            f"and start again. Or move the folder {step} away to resume from an older checkpoint"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _restore(manager: ocp.CheckpointManager, step: int, template):
    _check_rights(manager.directory / str(step))
    saved = manager.item_metadata(step).tree
    expected = {
        "run": earlier_versions.as_saved(template, saved.get("run", {})),
        "checksum": np.zeros((), np.uint32),
    }
    differences = _differences(saved, expected)
    if differences:
        more = len(differences) - _SHOWN
        raise InputError(
            "is of another version or another model; its state does not fit:\n  "
            + "\n  ".join(differences[:_SHOWN])
            + (f"\n  and {more} more" if more > 0 else "")
            + "\nUse the version that wrote it, or another --workdir to start a new run."
        )
    restored = manager.restore(step, args=ocp.args.StandardRestore(expected))
    if int(restored["checksum"]) != _checksum(restored["run"]):
        raise DamagedError("the checksum does not match the arrays")
    return earlier_versions.as_today(restored["run"], template)


def _check_rights(folder: epath.Path) -> None:
    """Raises PermissionError if a subfolder may not be read; Orbax would take it for empty."""

    def refuse(error: OSError) -> None:
        raise error

    if "://" not in str(folder):
        for _ in os.walk(folder, onerror=refuse):
            pass


def _differences(saved, expected) -> list[str]:
    """Lists leaves that are missing in one tree or differ in shape or dtype; a line for each."""
    before, now = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): (
                tuple(leaf.shape),
                np.dtype(leaf.dtype).name,
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (saved, expected)
    )

    def shown(leaf):
        return "none" if leaf is None else f"{leaf[1]}{list(leaf[0])}"

    return [
        f"{path}: {shown(before.get(path))} in the checkpoint, {shown(now.get(path))} now"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    ]


def _checksum(tree) -> int:
    """CRC-32 of all arrays, in the order of their paths."""
    checksum = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        checksum = zlib.crc32(jax.tree_util.keystr(path).encode(), checksum)
        checksum = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8), checksum)
    return checksum


def _set_aside(manager, workdir: epath.Path, damaged: dict[int, str], consequence: str) -> None:
    for step, reason in damaged.items():
        to = workdir / DAMAGED / str(step)
        logging.warning("Checkpoint of step %d is damaged, moved to %s: %s", step, to, reason)
        if to.exists():
            to.rmtree()
        to.parent.mkdir(parents=True, exist_ok=True)
        (workdir / FOLDER / str(step)).rename(to)
    if damaged:
        logging.warning(consequence)
        manager.reload()


@contextlib.contextmanager
def _explained(manager: ocp.CheckpointManager):
    """Turns errors of the storage, as Orbax raises them, into a StorageError."""
    try:
        with _orbax_silent():  # its threads print long messages before they raise
            yield
    except Exception as error:
        reason = refusal(error)
        if not (reason or os_error_number(error)):
            raise
        reason = reason or ": ".join(str(error).split(" [tensorstore_spec")[0].split(": ")[-2:])
        kept = ", ".join(map(str, manager.all_steps())) or "none"
        raise StorageError(
            f"a checkpoint could not be written to {_name(manager)}: {reason}. Earlier ones are "
            f"kept (steps: {kept}). Mend this, for example make room there; then run the same "
            "command again to resume from the last one."
        ) from error


@contextlib.contextmanager
def _orbax_silent():
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@functools.cache
def _silence_latecomers() -> None:
    """Silences the tracebacks that tensorstore prints for arrays that fail after the first one.

    Orbax raises the error of the first one alone.
    """
    hook = sys.unraisablehook

    def told(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = told

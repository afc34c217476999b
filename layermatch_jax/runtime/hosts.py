"""The processes of a run: how they find each other, agree, and stop together.

A run on several hosts has one process on each host, all started by the same command. Each process
loads its rows of every batch. Only the first one reads and writes the workdir; it sends to the
others what it read.
"""

import contextlib
import functools
import importlib.util
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from layermatch_jax.errors import InputError
from layermatch_jax.runtime import parallel

T = TypeVar("T")
# A process that fails waits this long for the others before it exits. JAX's default is 300 s.
_PATIENCE = {"shutdown_timeout_seconds": 10}


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of the run; call it before JAX is used.

    Without arguments it detects a TPU pod or a Slurm step of several tasks. Anywhere else the run
    has one process.

    Args:
      coordinator: HOST:PORT that the first process listens on.
      num_processes: number of processes of the run.
      process_id: number of this process, from 0 (the first one) to num_processes − 1.

    Raises:
      InputError: only some of the arguments are given, or they do not fit together.
    """
    given = (coordinator, num_processes, process_id)
    # The preemption service would catch SIGTERM, which `signals` below must get.
    jax.config.update("jax_enable_preemption_service", False)
    if given == (None, None, None):
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            jax.distributed.initialize(cluster_detection_method="slurm", **_PATIENCE)
        elif importlib.util.find_spec("libtpu"):
            with contextlib.suppress(ValueError):  # libtpu is installed, but this is no TPU host
                jax.distributed.initialize(**_PATIENCE)
        return
    if None in given:
        raise InputError(
            "several processes need all of --coordinator=HOST:PORT, --num_processes=N and "
            "--process_id=0..N-1. On a TPU pod and under Slurm's srun, give none of them"
        )
    if not (coordinator.rpartition(":")[0] and coordinator.rpartition(":")[2].isdigit()):
        raise InputError(f"--coordinator={coordinator}: write HOST:PORT, as in 10.0.0.1:8476")
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id={process_id} must be between 0 and --num_processes − 1 = "
            f"{num_processes - 1}"
        )
    jax.distributed.initialize(coordinator, num_processes, process_id, **_PATIENCE)


def is_first() -> bool:
    """Whether this process is the one that reads and writes the workdir."""
    return jax.process_index() == 0


def from_first(tree: T) -> T:
    """Sends the first process's values to all processes.

    Args:
      tree: arrays or scalars; structure, shapes and dtypes are the same in all processes.

    Returns:
      The first process's values; NumPy arrays if there are several processes.
    """
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Makes all processes raise if the block raises in one of them.

    The other processes raise an InputError. Otherwise they would wait for the failed one until a
    timeout.
    """
    error = None
    try:
        yield
    except Exception as mine:  # of any kind: a mistake, a full disk
        error = mine
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.bool_(error is not None))
        if failed.any() and error is None:
            raise InputError(
                f"process {', '.join(map(str, np.flatnonzero(failed)))} of "
                f"{jax.process_count()} failed to start; its own output says why"
            )
    if error:
        raise error


# ---------------------------------------------------------------------------------------------
# Stopping early.


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], str | None]]:
    """Catches SIGTERM and the first Ctrl-C; the second Ctrl-C ends the process at once.

    Yields:
      A function that returns the name of the first signal, or None before a signal has come.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # Python lets only the main thread catch signals
        return
    received = []
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    # Python calls these handlers between two bytecode instructions, so not while the main thread
    # compiles (up to a minute). It writes the number of a signal to this socket at once.
    to_watcher, numbers = socket.socketpair()
    to_watcher.setblocking(False)
    wakeup = signal.set_wakeup_fd(to_watcher.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(numbers, tuple(before)), daemon=True)
    watcher.start()
    try:
        yield lambda: signal.Signals(received[0]).name if received else None
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        to_watcher.close()
        watcher.join()
        numbers.close()


def _watch(numbers: socket.socket, watched: tuple[int, ...]) -> None:
    """Prints an answer to the first signal, and ends the process at the second Ctrl-C."""
    seen = []
    while byte := numbers.recv(1):
        number = byte[0]
        if number not in watched:
            continue
        if number == signal.SIGINT and number in seen:
            # Skips Python's clean-up, which can crash while XLA compiles. No file is damaged by
            # this, because checkpoints and small files are written atomically.
            _say("Interrupted: all steps since the last checkpoint are lost")
            os._exit(130)
        if not seen:
            name = signal.Signals(number).name
            _say(
                f"{name}: the run finishes the steps under way, saves a checkpoint and stops. "
                f"Ctrl-C{' again' if number == signal.SIGINT else ' twice'} ends it at once"
            )
        seen.append(number)


def _say(text: str) -> None:
    # Not print, because the main thread may be inside a print.
    os.write(2, f"{text}\n".encode())


def vote(stop: bool) -> bool | jax.Array:
    """Whether any process wants to stop; bool() of the result is the same in all processes.

    All processes must call it equally often. The devices compute the result after the steps that
    were dispatched before. So bool() does not wait if it is called a step later.
    """
    if jax.process_count() == 1:
        return stop
    votes = np.full(jax.local_device_count(), stop)
    return _any()(jax.make_array_from_process_local_data(parallel.by_rows("jit"), votes))


@functools.cache
def _any():
    return jax.jit(jnp.any, out_shardings=parallel.replicated("jit"))

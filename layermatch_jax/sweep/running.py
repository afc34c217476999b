"""Runs a grid on this machine."""

import concurrent.futures
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

from layermatch_jax.runtime import clock
from layermatch_jax.sweep import grid
from layermatch_jax.sweep.grid import Cell
from layermatch_jax.sweep.table import measured


def run_all(cells: list[Cell], jobs: int, finished: int) -> list[tuple[Cell, int]]:
    """Runs cells, `jobs` at a time, and prints each outcome; returns failures [(cell, status)]."""
    failed, start, total = [], time.monotonic(), len(cells) + finished
    print(f"{total} runs: {finished} finished, {len(cells)} to do, {jobs} at a time", flush=True)
    with processes(jobs) as (pool, running):
        runs = {pool.submit(run, cell, running): cell for cell in cells}
        for done, future in enumerate(concurrent.futures.as_completed(runs), 1):
            cell, status = runs[future], future.result()
            scores = measured(cell)
            if status or not scores:
                failed.append((cell, status))
                outcome = f"FAILED, exit status {status}"
            else:
                outcome = f"{scores['median20']:.1f} %"
            elapsed = time.monotonic() - start
            print(
                f"{finished + done}/{total}  {cell}: {outcome}  "
                f"{clock.duration(elapsed)} passed, about "
                f"{clock.duration(elapsed / done * (len(cells) - done))} left",
                flush=True,
            )
    return failed


@contextlib.contextmanager
def processes(jobs: int):
    """Yields a pool of threads and the set of their processes; all end with this process."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = {end: signal.signal(end, interrupt) for end in (signal.SIGTERM, signal.SIGHUP)}
    pool, running = concurrent.futures.ThreadPoolExecutor(jobs), set()
    try:
        yield pool, running
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
        for process in list(running):  # they save a checkpoint
            process.wait()
        if not isinstance(error, KeyboardInterrupt):
            raise
        print("\nstopped; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)
    pool.shutdown()


def run(cell: Cell, running: set[subprocess.Popen]) -> int:
    """Runs one cell in its own process with its output in log.txt; returns the exit status.

    The process is in the set `running` while it lives.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    print(f"{cell}: started, follow it by  tail -f {log(cell)}", flush=True)
    paths = filter(None, [str(grid.ROOT), os.environ.get("PYTHONPATH")])
    with log(cell).open("a") as file:
        process = subprocess.Popen(
            grid.PROGRAM + cell.arguments,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
    running.add(process)
    status = process.wait()
    running.discard(process)
    return status


def log(cell: Cell) -> pathlib.Path:
    """Returns the path of the file with the output of a cell's run."""
    return cell.folder / "log.txt"


def last_line(path: pathlib.Path) -> str:
    """Returns the last line of a text file that is not empty, or 'no output'."""
    lines = path.read_text("utf-8", "replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")

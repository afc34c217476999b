"""The runs of a grid, on this machine."""

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
    """Runs cells, some at a time; tells of each; returns those that failed, with their status."""
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
    """A pool of threads, and the set of processes they wait for; none outlives the runner."""

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
        for process in list(running):  # they save what they have
            process.wait()
        if not isinstance(error, KeyboardInterrupt):
            raise
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)
    pool.shutdown()


def run(cell: Cell, running: set[subprocess.Popen]) -> int:
    """Runs one cell in a process of its own, its output in log.txt; returns the exit status.

    The process is in `running` as long as it lives.
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
    """What the cell's run prints."""
    return cell.folder / "log.txt"


def last_line(path: pathlib.Path) -> str:
    """The last line of a text file that is not empty."""
    lines = path.read_text("utf-8", "replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")

"""A run from beginning to end; read this file from top to bottom."""

import collections
import contextlib
import functools
import sys
import time
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from etils import epath

from layermatch_jax import automatic, evaluate, initial_weights, rules, setup
from layermatch_jax.after.layer_report import measuring, record
from layermatch_jax.data import description, splits
from layermatch_jax.errors import NonFiniteLossError, Stopped
from layermatch_jax.method import state, windows
from layermatch_jax.runtime import checkpoint, hosts, metrics, parallel, progress
from layermatch_jax.runtime import clock as clock_lib
from layermatch_jax.runtime import result as result_lib
from layermatch_jax.runtime import workdir as workdir_lib


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: str,
    told_to_stop: Callable[[], str | None] = lambda: None,
    prepared: setup.Prepared | None = None,
) -> dict | None:
    """Trains, evaluates and writes the results; resumes from the newest checkpoint if there is one.

    If the workdir holds a run without a checkpoint, the files of that run are moved aside
    (`workdir.set_aside`). In a run of several processes (`hosts.connect`), each process calls this
    function, with the same config.

    Args:
      config: the whole config.
      workdir: folder of the run (local or gs://); created if it is missing. Only the first process
        reads and writes it.
      told_to_stop: from `hosts.signals`; returns the name of the signal that told the run to stop.
      prepared: from `setup.prepare`, with the same resolved config; only settings that do not
        change the programs, such as periods, may differ. None = prepared here.

    Returns:
      The content of result.json; None in all processes except the first.

    Raises:
      InputError: the config, the data or the workdir cannot be used; nothing was changed.
      NonFiniteLossError: training diverged; the last good checkpoint is kept.
      StorageError: a checkpoint could not be written or read; earlier ones are kept.
      Stopped: a process was told to stop; the last step has a checkpoint.
    """
    # --- Check the config and the workdir; nothing is written before all checks have passed ------
    workdir, first, result = epath.Path(workdir).expanduser(), hosts.is_first(), None
    with hosts.all_or_none():
        config = automatic.resolve(config)
        rules.validate(config, jax.device_count())
        if first:
            workdir_lib.check(workdir, config)
            result = result_lib.read_result(workdir)
    if hosts.from_first(result is not None):
        if first:
            done = f"The run in {workdir} is already finished: nothing to do.\n"
            print(done, file=sys.stderr)
        return result

    # --- Data, state and programs ----------------------------------------------------------------
    if prepared is None:
        kept = initial_weights.kept_normalization(workdir, config)
        prepared = setup.prepare(config, setup.load(config, kept))
    feed, partition = prepared.data.feed, prepared.data.partition
    place = functools.partial(parallel.place_batch, parallelism=config.parallelism)
    empty_window = parallel.replicate(prepared.empty_window, config.parallelism)
    if config.layer_report.at_steps:
        report_layers = measuring.create(
            config, partition, feed, prepared.resident, prepared.layer_gradients
        )
    run = {
        "state": prepared.initial,
        "window": prepared.empty_window,
        "clock": clock_lib.EMPTY,
        "lines": np.int32(metrics.UNKNOWN),
    }

    with contextlib.ExitStack() as to_the_end:
        # --- Begin, or resume --------------------------------------------------------------------
        with hosts.all_or_none():
            if first:
                workdir.mkdir(parents=True, exist_ok=True)
                to_the_end.enter_context(workdir_lib.lock(workdir))
                workdir_lib.set_aside(workdir)
                workdir_lib.check(workdir, config)  # again: another process may have run here
                description.check(workdir, prepared.data.description)
                workdir_lib.check_split(workdir, partition.record)
                checkpoints = to_the_end.enter_context(
                    checkpoint.open_manager(workdir, config.checkpoints_kept)
                )
                run = checkpoint.restore_latest(checkpoints, workdir, run) or run
                metrics.cut_back(workdir, int(run["lines"]), int(run["state"].step))
                description.write(workdir, prepared.data.description)
                initial_weights.write(workdir, prepared.data.weights)
                workdir_lib.write_config(workdir, config)
                splits.write_split(partition.record, workdir / workdir_lib.SPLIT)
        run = parallel.replicate(hosts.from_first(run), config.parallelism)
        current, window = run["state"], run["window"]
        start, resident = int(current.step), prepared.resident
        if feed.from_state and start < config.train_steps:
            with hosts.all_or_none():
                resident = feed.from_state(current, prepared.data.statistics)
        clock = clock_lib.Clock(start, run["clock"])
        log = metrics.Log(
            workdir if first else None,
            start,
            clock,
            prepared.data.images_per_step,
            tensorboard=config.tensorboard,
        )
        to_the_end.callback(log.close)
        if first:
            record.cut_back(workdir, start)
            introduce(config, prepared, current, workdir)
            told = progress.Progress(config, start, clock)

        def evaluate_state(step: int) -> None:
            began = time.monotonic()
            scores = evaluate.scores(
                prepared.eval_step, current, prepared.data.statistics, partition, config
            )
            seconds = time.monotonic() - began
            log.evaluation(step, config.dataset.evaluate_on, scores, seconds)

        def save_state(step: int) -> None:
            windows.check_finite(window, current)
            if first:
                log.to_disk()
                rest = {"clock": clock.window(), "lines": np.int32(log.lines)}
                # No name is kept for the tree, which would hold its arrays.
                checkpoint.save(checkpoints, step, {"state": current, "window": window, **rest})
            hosts.from_first(step)  # the other processes wait until it is saved

        # --- The loop: one chunk is the input of K steps (input.steps_per_call) -------------------
        pending = collections.deque()  # complete windows whose steps the devices may still compute
        before, previous, vote = start, window, False
        try:
            if start == 0 and int(run["lines"]) == metrics.UNKNOWN:
                if evaluate.is_due(config, 0):  # what pretrained weights are worth before training
                    evaluate_state(0)
                if config.train_steps == 0:
                    save_state(0)
            for step, chunk in feed.chunks(range(start, config.train_steps)):
                current, of_chunk = prepared.train_program(current, resident, place(chunk))
                window = windows.join(window, of_chunk)
                # Wait for the call before this one, so that the device is never idle and the host
                # is at most one call ahead. The vote reaches all processes at the same step.
                jax.block_until_ready(previous)
                stop, vote = bool(vote), hosts.vote(told_to_stop() is not None)
                # With several CPU devices the host has waited for this call as well.
                done = step if window["nonfinite_step"].is_ready() else before
                clock.done(done)
                before, previous = step, window

                last = step == config.train_steps
                evaluate_now = evaluate.is_due(config, step)
                save_now = last or stop or step % config.checkpoint_every == 0
                report_now = step in config.layer_report.at_steps
                if last or step % config.log_every == 0:
                    pending.append((step, window))
                    window = empty_window
                while pending and pending[0][0] <= done:
                    log.train(*pending.popleft())
                if evaluate_now or report_now or save_now:
                    jax.block_until_ready(previous)
                    clock.done(step)
                    with clock.paused():
                        while pending:
                            log.train(*pending.popleft())
                        if evaluate_now:
                            evaluate_state(step)
                        if report_now:
                            report = report_layers(current)
                            if first:
                                record.add(workdir, report)
                        if save_now:  # before the next call, so that the state is that of `step`
                            save_state(step)
                if first:
                    told.update(step, log.latest)
                if stop and not last:
                    raise Stopped(
                        f"by {told_to_stop() or 'another process'} at step {step} of "
                        f"{config.train_steps}. A checkpoint is saved in {workdir}. Run the same "
                        "command again to resume"
                    )
        except NonFiniteLossError as error:
            if not first:
                raise
            latest = checkpoints.latest_step()
            kept = latest and f"The checkpoint of step {latest} is kept"
            kept = kept or "No checkpoint was written yet"
            mend = "Start a new run with a lower --config.optimizer.learning_rate"
            if config.model.dtype != "float32":
                mend += " or with --config.model.dtype=float32"
            raise NonFiniteLossError(f"{error}. {kept} in {workdir}. {mend}") from None

        # --- The end -----------------------------------------------------------------------------
        if not first:
            return None
        written = metrics.read(workdir, log.lines)
        measured = metrics.summarize(written, config.dataset.evaluate_on)
        return result_lib.write_result(workdir, config, partition.record, measured)


def introduce(
    config: ml_collections.ConfigDict,
    prepared: setup.Prepared,
    current: state.TrainState,
    workdir: epath.Path,
) -> None:
    """Prints what is trained, on which data and devices, and from which step."""
    partition = prepared.data.partition
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        devices += f" of {jax.process_count()} processes"
    size = parameter_overview.count_parameters(current.params)
    print(
        f"{config.method} on {config.dataset.name}: {len(partition.labeled.labels)} labeled, "
        f"{len(partition.unlabeled.labels)} unlabeled, {_evaluated(config, partition)} of "
        f"{len(partition.class_names)} classes\n"
        f"{config.model.name}, {size:,} parameters, on {devices} ({config.parallelism}); "
        f"{workdir}, step {int(current.step)} of {config.train_steps}",
        *automatic.explained(config),
        *initial_weights.told(workdir),
        *prepared.notes,
        *prepared.data.notes,
        *unmeasured(config, partition),
        sep="\n",
        file=sys.stderr,
    )


def unmeasured(config: ml_collections.ConfigDict, partition: splits.Partition) -> list[str]:
    """Tells the user if the accuracy of pseudo-labels cannot be measured; a list of sentences."""
    if config.unsupervised_weight == 0 or np.any(partition.unlabeled.labels >= 0):
        return []
    return [f"accuracy of pseudo-labels: not measured, because {metrics.TRUTH_UNKNOWN}"]


def _evaluated(config: ml_collections.ConfigDict, partition: splits.Partition) -> str:
    kind, count = config.dataset.evaluate_on, len(partition.evaluation.labels)
    return f"{count} {kind} images" if kind in ("test", "validation") else "no test images"

"""A run from beginning to end. Read it from top to bottom: it is the protocol."""

import collections
import contextlib
import functools
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from clu import parameter_overview
from etils import epath

from layermatch_jax import automatic, evaluate, rules
from layermatch_jax.after import layer_report
from layermatch_jax.data import description, pipeline, sources, splits
from layermatch_jax.data import feed as feed_lib
from layermatch_jax.data.sampler import Sampler
from layermatch_jax.errors import InputError, NonFiniteLossError, Stopped
from layermatch_jax.method import assembly, policies, program, state, steps, windows
from layermatch_jax.runtime import checkpoint, hosts, metrics, parallel, progress
from layermatch_jax.runtime import clock as clock_lib
from layermatch_jax.runtime import workdir as workdir_lib


class Data(NamedTuple):
    """The images of a run, on the host."""

    statistics: tuple  # of sources.channel_statistics
    partition: splits.Partition
    feed: feed_lib.Feed
    images_per_step: int  # views through the backbone
    notes: tuple[str, ...]  # of the source: what the user is told at the start
    description: dict  # of data_file.describe


class Prepared(NamedTuple):
    """A run that could begin: its data, its initial state, its programs."""

    data: Data
    resident: Any  # what the feed keeps on the devices
    method: assembly.Method
    initial: state.TrainState
    train_program: Callable  # (state, resident, placed call) -> (state, window of its steps)
    eval_step: Callable  # (state, placed EvalBatch) -> metrics
    layer_gradients: Callable  # of layer_report
    empty_window: dict


def load(config: ml_collections.ConfigDict, statistics: tuple | None = None) -> Data:
    """Source -> split -> the draws of every step -> a feed of the steps.

    Args:
      config: the whole config, resolved (automatic.resolve) and validated.
      statistics: what a run that is opened again kept of `channel_statistics`; None = taken of the
        training images.

    Raises:
      InputError: the data cannot be used.
    """
    source = None
    with hosts.all_or_none():
        if hosts.is_first():
            source = sources.load(config.dataset)
    with hosts.all_or_none():
        # The others after the first: it may have had to download the set to a folder they share.
        source = source or sources.load(config.dataset)
    with hosts.all_or_none():
        mine = sources.digest(source)
        if (hosts.from_first(mine) != mine).any():
            raise InputError(
                "this process found other images or classes than the first one. Give all processes "
                "the same files; an image that only one of them cannot read is a difference, too"
            )
        partition = splits.partition(source, config.dataset)
        sampler = create_sampler(config, partition)
        rows = parallel.host_rows(config.batch_size)
        statistics = statistics or sources.channel_statistics(source.train)
        return Data(
            statistics=statistics,
            partition=partition,
            feed=feed_lib.create(config, partition, sampler, rows),
            images_per_step=config.batch_size * len(sampler.layout.kinds),
            notes=source.notes,
            description=description.describe(source, config.dataset, statistics),
        )


def create_sampler(config: ml_collections.ConfigDict, partition: splits.Partition) -> Sampler:
    """The draws of a run: of the views that its policy wants, and of the policy's own."""
    policy = policies.create(config)
    layout = assembly.create_layout(config, policy)
    return pipeline.create_sampler(config, partition, layout, policy.draws)


def prepare(config: ml_collections.ConfigDict, data: Data, resident: Any = None) -> Prepared:
    """Places what the devices keep, and makes the state and the programs of a run.

    Args:
      config: the whole config, resolved (automatic.resolve) and validated.
      data: of `load`.
      resident: another run's, of the same data on the same devices; None = placed here.

    Raises:
      InputError: the images do not fit where they are to be kept, or cannot be read; the gradient
        mask fits no parameter.
    """
    feed, partition = data.feed, data.partition
    if config.compilation_cache:
        parallel.keep_compiled(config.compilation_cache)
    initial = state.create(
        config,
        num_classes=len(partition.class_names),
        num_unlabeled=len(partition.unlabeled.labels),
        labels=partition.labeled.labels,
        axis_name=parallel.axis_name(config.parallelism),
    )
    with hosts.all_or_none():
        method = assembly.create_method(config, initial.params, data.statistics)
        if resident is None:
            parallel.check_room(feed.resident_bytes)
            resident = feed.resident(config.parallelism)
    train_program = parallel.compile_step(
        functools.partial(program.train_steps, batch=feed.batch, method=method),
        config.parallelism,
        resident=True,
    )
    eval_step = parallel.compile_step(
        functools.partial(steps.eval_step, method=method), config.parallelism, donate_state=False
    )
    layer_gradients = layer_report.compile_gradients(config, feed, method)
    example = parallel.place_batch(feed.example, config.parallelism)
    _, window = jax.eval_shape(train_program, initial, resident, example)
    empty_window = windows.empty_window(window)
    return Prepared(
        data, resident, method, initial, train_program, eval_step, layer_gradients, empty_window
    )


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: str,
    told_to_stop: Callable[[], str | None] = lambda: None,
    prepared: Prepared | None = None,
) -> dict | None:
    """Trains, evaluates and writes everything down; goes on where an earlier start left off.

    If that start saved no checkpoint, its files are moved aside (`workdir.set_aside`). With several
    processes (`hosts.connect`) all of them call it, with the same config.

    Args:
      config: the whole config.
      workdir: folder of the run (local or gs://), made if it is not there. The first process alone
        reads and writes it.
      told_to_stop: of `hosts.signals`, the name of the signal that asked the run to stop.
      prepared: of `prepare`, by the same config (resolved) but for periods and the like; None =
        made here.

    Returns:
      What result.json holds; None in all processes but the first.

    Raises:
      InputError: the config, the data or the workdir cannot be used; nothing was changed.
      NonFiniteLossError: training diverged; the last good checkpoint is kept.
      StorageError: a checkpoint could not be written; earlier ones are kept.
      Stopped: a process was told to stop; there is a checkpoint of the last step.
    """
    # --- Can this run be made? Until all of it is known, nothing is written ----------------------
    workdir, first, result = epath.Path(workdir).expanduser(), hosts.is_first(), None
    with hosts.all_or_none():
        config = automatic.resolve(config)
        rules.validate(config, jax.device_count())
        if first:
            workdir_lib.check(workdir, config)
            result = workdir_lib.read_result(workdir)
    if hosts.from_first(result is not None):
        if first:
            done = f"{workdir} holds this run, and it is finished: nothing to do.\n"
            print(done, file=sys.stderr)
        return result

    # --- Data, state and programs ----------------------------------------------------------------
    prepared = prepared or prepare(config, load(config))
    feed, partition = prepared.data.feed, prepared.data.partition
    place = functools.partial(parallel.place_batch, parallelism=config.parallelism)
    empty_window = parallel.replicate(prepared.empty_window, config.parallelism)
    if config.layer_report.at_steps:
        report_layers = layer_report.create(
            config, partition, feed, prepared.resident, prepared.layer_gradients
        )
    run = {
        "state": prepared.initial,
        "window": prepared.empty_window,
        "clock": clock_lib.EMPTY,
        "lines": np.int32(metrics.UNKNOWN),
    }

    with contextlib.ExitStack() as to_the_end:
        # --- Begin, or go on ---------------------------------------------------------------------
        with hosts.all_or_none():
            if first:
                workdir.mkdir(parents=True, exist_ok=True)
                to_the_end.enter_context(workdir_lib.lock(workdir))
                workdir_lib.set_aside(workdir)
                workdir_lib.check(workdir, config)  # again: another run may have been here since
                description.check(workdir, prepared.data.description)
                workdir_lib.check_split(workdir, partition.record)
                checkpoints = to_the_end.enter_context(
                    checkpoint.open_manager(workdir, config.checkpoints_kept)
                )
                run = checkpoint.restore_latest(checkpoints, workdir, run) or run
                metrics.cut_back(workdir, int(run["lines"]), int(run["state"].step))
                description.write(workdir, prepared.data.description)
                workdir_lib.write_config(workdir, config)
                splits.write_split(partition.record, workdir / workdir_lib.SPLIT)
        run = parallel.replicate(hosts.from_first(run), config.parallelism)
        current, window = run["state"], run["window"]
        start = int(current.step)
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
            layer_report.cut_back(workdir, start)
            introduce(config, prepared.data, current, workdir)
            told = progress.Progress(config, start, clock)

        # --- The loop: a call is one train step, or several --------------------------------------
        pending = collections.deque()  # full windows that the devices may still be working on
        before, previous, vote = start, window, False
        try:
            for step, call in feed.calls(range(start, config.train_steps)):
                current, of_call = prepared.train_program(current, prepared.resident, place(call))
                window = windows.join(window, of_call)
                # Wait for the call before this one: the device is never idle, nor far behind. All
                # processes learn at the same step that one of them was told to stop.
                jax.block_until_ready(previous)
                stop, vote = bool(vote), hosts.vote(told_to_stop() is not None)
                # Several CPU devices make the host wait for this call, too.
                done = step if window["nonfinite_step"].is_ready() else before
                clock.done(done)
                before, previous = step, window

                last = step == config.train_steps
                evaluate_now = last or step % config.eval_every == 0
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
                            began = time.monotonic()
                            scores = evaluate.evaluate(
                                prepared.eval_step, current, partition.evaluation, config
                            )
                            seconds = time.monotonic() - began
                            log.evaluation(step, config.dataset.evaluate_on, scores, seconds)
                        if report_now:
                            report = report_layers(current)
                            if first:
                                layer_report.add(workdir, report)
                        if save_now:  # before the next call is taken: state and step agree
                            windows.check_finite(window, current)
                            if first:
                                log.to_disk()
                                saved = {
                                    "state": current,
                                    "window": window,
                                    "clock": clock.window(),
                                    "lines": np.int32(log.lines),
                                }
                                checkpoint.save(checkpoints, step, saved)
                            hosts.from_first(step)  # nobody goes on, or leaves, before
                if first:
                    told.update(step, log.latest)
                if stop and not last:
                    raise Stopped(
                        f"by {told_to_stop() or 'another process'} at step {step} of "
                        f"{config.train_steps}, and saved in {workdir}: the same command goes on"
                    )
        except NonFiniteLossError as error:
            if not first:
                raise
            latest = checkpoints.latest_step()
            kept = latest and f"The checkpoint of step {latest} is kept"
            kept = kept or "No checkpoint was written yet"
            raise NonFiniteLossError(f"{error}. {kept} in {workdir}") from None

        # --- The end -----------------------------------------------------------------------------
        if not first:
            return None
        written = metrics.read(workdir, log.lines)
        measured = metrics.result(written, config.dataset.evaluate_on)
        return workdir_lib.write_result(workdir, config, partition.record, measured)


def introduce(
    config: ml_collections.ConfigDict, data: Data, current: state.TrainState, workdir: epath.Path
) -> None:
    """Says what is about to be trained, on what, and from which step."""
    partition = data.partition
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        devices += f" of {jax.process_count()} processes"
    size = parameter_overview.count_parameters(current.params)
    print(
        f"{config.method} on {config.dataset.name}: {len(partition.labeled.labels)} labelled, "
        f"{len(partition.unlabeled.labels)} unlabelled, {len(partition.evaluation.labels)} "
        f"{config.dataset.evaluate_on} images of {len(partition.class_names)} classes\n"
        f"{config.model.name}, {size:,} parameters, on {devices} ({config.parallelism}); "
        f"{workdir}, step {int(current.step)} of {config.train_steps}",
        *automatic.explained(config),
        *data.notes,
        *unmeasured(config, partition),
        sep="\n",
        file=sys.stderr,
    )


def unmeasured(config: ml_collections.ConfigDict, partition: splits.Partition) -> list[str]:
    """Says so where the run cannot know how many of its pseudo-labels are right."""
    if config.unsupervised_weight == 0 or np.any(partition.unlabeled.labels >= 0):
        return []
    return [f"accuracy of pseudo-labels: not measured, because {metrics.TRUTH_UNKNOWN}"]

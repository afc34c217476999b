"""A run from beginning to end. Read it from top to bottom: it is the protocol."""

import collections
import contextlib
import functools
import sys
from collections.abc import Callable

import jax
import ml_collections
from clu import parameter_overview
from etils import epath

from layermatch_jax import checkpoint, evaluate, hosts, metrics, parallel, state, steps
from layermatch_jax import config as config_lib
from layermatch_jax import workdir as workdir_lib
from layermatch_jax.data import pipeline, sources, splits
from layermatch_jax.errors import NonFiniteLossError, Stopped


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: str,
    told_to_stop: Callable[[], str | None] = lambda: None,
) -> dict | None:
    """Trains, evaluates and writes everything down; goes on where an earlier start left off.

    With several processes (`hosts.connect`) all of them call it, with the same config.

    Args:
      config: the whole config.
      workdir: folder of the run (local or gs://), made if it is not there. The first process alone
        reads and writes it.
      told_to_stop: of `hosts.signals`, the name of the signal that asked the run to stop.

    Returns:
      What result.json holds; None in all processes but the first.

    Raises:
      InputError: the config, the data or the workdir cannot be used; nothing was changed.
      NonFiniteLossError: training diverged; the last good checkpoint is kept.
      StorageError: a checkpoint could not be written; earlier ones are kept.
      Stopped: a process was told to stop; there is a checkpoint of the last step.
    """
    # --- Can this run be made? Until all of it is known, nothing is written ----------------------
    workdir, first, result = epath.Path(workdir), hosts.is_first(), None
    with hosts.all_or_none():
        config_lib.validate(config, jax.device_count())
        if first:
            workdir_lib.check(workdir, config)
            result = workdir_lib.read_result(workdir)
    if hosts.from_first(result is not None):
        if first:
            done = f"{workdir} holds this run, and it is finished: nothing to do.\n"
            print(done, file=sys.stderr)
        return result
    if config.compilation_cache:
        parallel.keep_compiled(config.compilation_cache)

    # --- Data: source -> split -> the draws of every step ----------------------------------------
    source = None
    with hosts.all_or_none():
        if first:
            source = sources.load(config.dataset)
    with hosts.all_or_none():
        # The others after the first: it may have had to download the set to a folder they share.
        source = source or sources.load(config.dataset)
        partition = splits.partition(source, config.dataset)
        sampler = pipeline.create_sampler(config, partition)
        rows = parallel.host_rows(config.batch_size)
        example, _ = pipeline.weak_views(partition, sampler, config.dataset.padding, 0, rows)
        if first:
            workdir_lib.check_split(workdir, partition.record)
    place = functools.partial(parallel.place_batch, parallelism=config.parallelism)

    # --- State and steps -------------------------------------------------------------------------
    initial = state.create(
        config,
        num_classes=len(partition.class_names),
        num_unlabeled=len(partition.unlabeled.labels),
        axis_name=parallel.axis_name(config.parallelism),
    )
    with hosts.all_or_none():
        statistics = sources.channel_statistics(source.train)
        method = steps.create_method(config, initial.params, statistics)
    train_step = parallel.compile_step(
        functools.partial(steps.train_step, method=method), config.parallelism
    )
    eval_step = parallel.compile_step(
        functools.partial(steps.eval_step, method=method), config.parallelism, donate_state=False
    )
    _, metric_shapes = jax.eval_shape(train_step, initial, place(example))
    run = {"state": initial, "window": metrics.empty_window(metric_shapes)}
    empty_window = parallel.replicate(run["window"], config.parallelism)

    with contextlib.ExitStack() as to_the_end:
        # --- Begin, or go on ---------------------------------------------------------------------
        with hosts.all_or_none():
            if first:
                workdir.mkdir(parents=True, exist_ok=True)
                to_the_end.enter_context(workdir_lib.lock(workdir))
                workdir_lib.check(workdir, config)  # again: another run may have been here since
                workdir_lib.check_split(workdir, partition.record)
                checkpoints = to_the_end.enter_context(
                    checkpoint.open_manager(workdir, config.checkpoints_kept)
                )
                run = checkpoint.restore_latest(checkpoints, workdir, run) or run
                workdir_lib.write_config(workdir, config)
                splits.write_split(partition.record, workdir / workdir_lib.SPLIT)
        run = parallel.replicate(hosts.from_first(run), config.parallelism)
        current, window = run["state"], run["window"]
        start = int(current.step)
        log = metrics.Log(
            workdir if first else None,
            start,
            config.train_steps,
            images_per_step=config.batch_size * (1 + 2 * sampler.unlabeled_ratio),
            tensorboard=config.tensorboard,
        )
        to_the_end.callback(log.close)
        if first:
            introduce(config, partition, current, workdir)

        # --- The loop ----------------------------------------------------------------------------
        batches = pipeline.train_batches(
            partition,
            sampler,
            padding=config.dataset.padding,
            steps=range(start, config.train_steps),
            rows=rows,
            prefetch=config.input.prefetch,
        )
        pending = collections.deque()  # full windows that the device may still be working on
        previous, vote = window, False
        try:
            for step, batch in enumerate(batches, start + 1):
                current, step_metrics = train_step(current, place(batch))
                window = metrics.accumulate(window, step_metrics, step)
                # Wait for the step before this one: the device is never idle, nor far behind. All
                # processes learn at the same step that one of them was told to stop.
                jax.block_until_ready(previous)
                stop, vote = bool(vote), hosts.vote(told_to_stop() is not None)
                previous = window

                last = step == config.train_steps
                evaluate_now = last or step % config.eval_every == 0
                save_now = last or stop or step % config.checkpoint_every == 0
                if last or step % config.log_every == 0:
                    pending.append((step, window))
                    window = empty_window
                while pending and (pending[0][0] < step or evaluate_now or save_now):
                    log.train(*pending.popleft())
                if evaluate_now:
                    scores = evaluate.evaluate(eval_step, current, partition.evaluation, config)
                    log.evaluation(step, config.dataset.evaluate_on, scores)
                if save_now:  # before the next batch is taken: the state and the step agree
                    metrics.check_finite(window, current)
                    if first:
                        checkpoint.save(checkpoints, step, {"state": current, "window": window})
                    hosts.from_first(step)  # nobody goes on, or leaves, before it is written
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
        measured = metrics.result(metrics.read(workdir), config.dataset.evaluate_on)
        return workdir_lib.write_result(workdir, config, partition.record, measured)


def introduce(
    config: ml_collections.ConfigDict, partition: splits.Partition, current, workdir: epath.Path
) -> None:
    """Says what is about to be trained, on what, and from which step."""
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
        file=sys.stderr,
    )

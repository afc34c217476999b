"""A run from beginning to end. Read it from top to bottom: it is the protocol."""

import collections
import functools
import sys

import jax
import ml_collections
from clu import parameter_overview
from etils import epath

from layermatch_jax import checkpoint, evaluate, metrics, parallel, state, steps
from layermatch_jax import config as config_lib
from layermatch_jax import workdir as workdir_lib
from layermatch_jax.data import pipeline, sources, splits
from layermatch_jax.errors import NonFiniteLossError


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict:
    """Trains, evaluates and writes everything down; goes on where an earlier start left off.

    Args:
      config: the whole config.
      workdir: folder of the run (local or gs://), made if it is not there.

    Returns:
      What result.json holds.

    Raises:
      InputError: the config, the data or the workdir cannot be used; nothing was written.
      NonFiniteLossError: training diverged; the last good checkpoint is kept.
    """
    # --- Can this run be made? Until all of it is known, nothing is written ----------------------
    workdir = epath.Path(workdir)
    config_lib.validate(config, jax.device_count())
    workdir_lib.check(workdir, config)
    if result := workdir_lib.read_result(workdir):
        print(f"{workdir} holds this run, and it is finished: nothing to do.\n", file=sys.stderr)
        return result

    # --- Data: source -> split -> the draws of every step ----------------------------------------
    source = sources.load(config.dataset)
    partition = splits.partition(source, config.dataset)
    sampler = pipeline.create_sampler(config, partition)
    rows = parallel.host_rows(config.batch_size)
    example, _ = pipeline.weak_views(partition, sampler, config.dataset.padding, 0, rows)
    place = functools.partial(parallel.place_batch, parallelism=config.parallelism)
    workdir_lib.check_split(workdir, partition.record)

    # --- State and steps -------------------------------------------------------------------------
    initial = state.create(
        config,
        num_classes=len(partition.class_names),
        num_unlabeled=len(partition.unlabeled.labels),
        axis_name=parallel.axis_name(config.parallelism),
    )
    method = steps.create_method(config, initial.params, sources.channel_statistics(source.train))
    train_step = parallel.compile_step(
        functools.partial(steps.train_step, method=method), config.parallelism
    )
    eval_step = parallel.compile_step(
        functools.partial(steps.eval_step, method=method), config.parallelism, donate_state=False
    )
    _, metric_shapes = jax.eval_shape(train_step, initial, place(example))
    empty_window = parallel.replicate(metrics.empty_window(metric_shapes))

    # --- Begin, or go on -------------------------------------------------------------------------
    workdir.mkdir(parents=True, exist_ok=True)
    workdir_lib.write_config(workdir, config)
    splits.write_split(partition.record, workdir / workdir_lib.SPLIT)
    checkpoints = checkpoint.open_manager(workdir, config.checkpoints_kept)
    run = {"state": initial, "window": empty_window}
    run = parallel.replicate(checkpoint.restore_latest(checkpoints, run) or run)
    current, window = run["state"], run["window"]
    start = int(current.step)
    images_per_step = config.batch_size * (1 + 2 * sampler.unlabeled_ratio)
    log = metrics.Log(workdir, start, config.train_steps, images_per_step, config.tensorboard)
    introduce(config, partition, current, workdir)

    # --- The loop --------------------------------------------------------------------------------
    batches = pipeline.train_batches(
        partition,
        sampler,
        padding=config.dataset.padding,
        steps=range(start, config.train_steps),
        rows=rows,
        prefetch=config.input.prefetch,
    )
    pending = collections.deque()  # full windows that the device may still be working on
    previous = window
    try:
        for step, batch in enumerate(batches, start + 1):
            last = step == config.train_steps
            evaluate_now = last or step % config.eval_every == 0
            save_now = last or step % config.checkpoint_every == 0

            current, step_metrics = train_step(current, place(batch))
            window = metrics.accumulate(window, step_metrics, step)
            # Wait for the step before this one: the device is never idle, nor far behind.
            jax.block_until_ready(previous)
            previous = window

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
                checkpoint.save(checkpoints, step, {"state": current, "window": window})
    except NonFiniteLossError as error:
        kept = checkpoints.latest_step()
        kept = f"The checkpoint of step {kept} is kept" if kept else "No checkpoint was written yet"
        raise NonFiniteLossError(f"{error}. {kept} in {workdir}") from None
    finally:
        checkpoints.close()
        log.close()

    # --- The end ---------------------------------------------------------------------------------
    measured = metrics.result(metrics.read(workdir), config.dataset.evaluate_on)
    return workdir_lib.write_result(workdir, config, partition.record, measured)


def introduce(
    config: ml_collections.ConfigDict, partition: splits.Partition, current, workdir: epath.Path
) -> None:
    """Says what is about to be trained, on what, and from which step."""
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    size = parameter_overview.count_parameters(current.params)
    print(
        f"{config.method} on {config.dataset.name}: {len(partition.labeled.labels)} labelled, "
        f"{len(partition.unlabeled.labels)} unlabelled, {len(partition.evaluation.labels)} "
        f"{config.dataset.evaluate_on} images of {len(partition.class_names)} classes\n"
        f"{config.model.name}, {size:,} parameters, on {devices} ({config.parallelism}); "
        f"{workdir}, step {int(current.step)} of {config.train_steps}",
        file=sys.stderr,
    )

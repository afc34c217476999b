"""Builds the parts of a run from its config: data, initial state and programs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections

from layermatch_jax import initial_weights
from layermatch_jax.after.layer_report import measuring
from layermatch_jax.data import description, pipeline, sources, splits
from layermatch_jax.data import feed as feed_lib
from layermatch_jax.data.sampler import Sampler
from layermatch_jax.errors import InputError
from layermatch_jax.frozen import cached_views
from layermatch_jax.method import assembly, policies, program, state, steps, windows
from layermatch_jax.models.pretrained import Weights
from layermatch_jax.runtime import hosts, parallel


class Data(NamedTuple):
    """The data of a run on the host, and the weights that it starts from."""

    # (means, deviations) from sources.channel_statistics, or as the pretrained weights expect
    statistics: tuple
    weights: Weights | None  # None = random weights, or a run that is resumed
    partition: splits.Partition
    feed: feed_lib.Feed
    images_per_step: int  # views through the backbone
    notes: tuple[str, ...]  # of the source; printed when the run starts
    description: dict  # from description.describe


class Prepared(NamedTuple):
    """All that a run needs before its first step: data, initial state and programs."""

    data: Data
    resident: Any  # what the feed keeps on the devices; shapes if that depends on the state
    method: assembly.Method
    initial: state.TrainState
    train_program: Callable  # (state, resident, placed chunk) -> (state, window of its steps)
    eval_step: Callable  # (state, placed EvalBatch) -> metrics
    layer_gradients: Callable  # from measuring.compile_gradients
    empty_window: dict
    notes: tuple[str, ...]  # on the initial state; printed when the run starts


def load(config: ml_collections.ConfigDict, statistics: tuple | None = None) -> Data:
    """Loads the data set, splits it, and builds the sampler and the feed of the train steps.

    Args:
      config: the whole config, resolved (automatic.resolve) and validated.
      statistics: (means, deviations) that the run saved; then config.model.pretrained is not read.
        None = those of config.model.pretrained, or of the training images if there is none.

    Raises:
      InputError: the data or the weights cannot be used.
    """
    source = None
    with hosts.all_or_none():
        weights = None if statistics else initial_weights.read(config)
    with hosts.all_or_none():
        if hosts.is_first():
            source = sources.load(config.dataset)
    with hosts.all_or_none():
        # The first process loads first, because it may download the set to a shared folder.
        source = source or sources.load(config.dataset)
    with hosts.all_or_none():
        mine = sources.digest(source)
        if (hosts.from_first(mine) != mine).any():
            raise InputError(
                "the images or classes of this process differ from those of the first one. Give "
                "all processes the same files, which all of them can read"
            )
        partition = splits.partition(source, config.dataset)
        if weights:
            statistics = weights.normalization.mean, weights.normalization.std
        statistics = statistics or sources.channel_statistics(source.train)
        return Data(
            statistics=statistics,
            weights=weights,
            partition=partition,
            **_feed(config, partition),
            notes=source.notes,
            description=description.describe(source, config.dataset, statistics),
        )


def with_feed_of(config: ml_collections.ConfigDict, data: Data) -> Data:
    """Replaces the feed by that of another config, with its views and its policy's draws."""
    return data._replace(**_feed(config, data.partition))


def _feed(config: ml_collections.ConfigDict, partition: splits.Partition) -> dict[str, Any]:
    sampler = create_sampler(config, partition)
    layout = assembly.create_layout(config, policies.create(config))
    rows = parallel.host_rows(config.batch_size)
    feed = feed_lib.create(config, partition, sampler, rows)
    if config.input.cache_views:
        feed = cached_views.create(config, partition, sampler, rows, feed)
    return {
        "feed": feed,
        "images_per_step": config.batch_size * layout.size,
    }


def create_sampler(config: ml_collections.ConfigDict, partition: splits.Partition) -> Sampler:
    """Creates the sampler of a run: draws for the policy's views, and the policy's own draws."""
    policy = policies.create(config)
    layout = assembly.create_layout(config, policy)
    return pipeline.create_sampler(config, partition, layout.drawn, policy.draws)


def prepare(config: ml_collections.ConfigDict, data: Data, resident: Any = None) -> Prepared:
    """Makes the initial state and the programs of a run, and places its resident images.

    Args:
      config: the whole config, resolved (automatic.resolve) and validated.
      data: from `load`.
      resident: that of another run with the same data on the same devices; None = placed here.

    Raises:
      InputError: the images do not fit into the devices' memory or cannot be read, or an entry of
        the gradient mask fits no parameter.
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
        if data.weights:
            count = len(partition.unlabeled.labels)
            initial = initial_weights.begin(initial, config, data.weights, count)
        method = assembly.create_method(
            config, initial.params, data.statistics, parallel.axis_name(config.parallelism)
        )
        if feed.from_state:
            resident = feed.from_state(initial, data.statistics, only_shapes=True)
        elif resident is None:
            parallel.check_room(feed.resident_bytes)
            resident = feed.resident(config.parallelism)
    notes = ()
    if data.weights:
        initial, notes = initial_weights.first_classifier(initial, config, data.weights, partition)
    train_program = parallel.compile_step(
        functools.partial(program.train_steps, batch=feed.batch, method=method),
        config.parallelism,
        resident=True,
    )
    eval_step = parallel.compile_step(
        functools.partial(steps.eval_step, method=method), config.parallelism, donate_state=False
    )
    layer_gradients = measuring.compile_gradients(config, feed, method)
    example = parallel.place_batch(feed.example, config.parallelism)
    _, window = jax.eval_shape(train_program, initial, resident, example)
    empty_window = windows.empty_window(window)
    return Prepared(
        data=data,
        resident=resident,
        method=method,
        initial=initial,
        train_program=train_program,
        eval_step=eval_step,
        layer_gradients=layer_gradients,
        empty_window=empty_window,
        notes=notes,
    )

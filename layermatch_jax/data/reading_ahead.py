"""Applies a function to batches of images; overlaps reading and computing."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")
_AHEAD = 2  # batches that are read ahead


def batch_size(asked: int, images: int | None = None) -> int:
    """Returns the rows of a batch: min(asked, images), rounded up to a multiple of the devices."""
    devices = jax.local_device_count()
    wanted = max(1, asked if images is None else min(asked, images))
    return -(-wanted // devices) * devices


def in_batches(
    forward: Callable[[np.ndarray], Any],
    read: Callable[[range], tuple[np.ndarray, T]],
    positions: range,
    size: int,
) -> Iterator[tuple[range, T, Any]]:
    """Reads images and applies a function, batch by batch.

    A thread reads batches ahead. A batch is computed while the caller handles the result of the
    batch before it.

    Args:
      forward: uint8 [size, S, S, 3] -> tree of arrays [size, …] on devices.
      read: n positions -> (uint8 [n, S, S, 3], any other value).
      positions: positions of the images.
      size: rows of every batch; the last batch is padded.

    Yields:
      (positions of a batch, the other value, tree of NumPy arrays [n, …]), in order.
    """

    def filled(part: range) -> tuple[range, np.ndarray, T]:
        pixels, other = read(part)
        if len(pixels) < size:  # padding does not change the other rows
            more = np.zeros((size - len(pixels), *pixels.shape[1:]), pixels.dtype)
            pixels = np.concatenate([pixels, more])
        return part, pixels, other

    def fetched(part: range, other: T, answer: Any) -> tuple[range, T, Any]:
        return part, other, jax.tree.map(lambda x: x[: len(part)], jax.device_get(answer))

    under_way = None
    parts = (positions[i : i + size] for i in range(0, len(positions), size))
    for part, pixels, other in _ahead(filled, parts):
        answer = forward(pixels)
        if under_way:
            yield fetched(*under_way)
        under_way = part, other, answer
    if under_way:
        yield fetched(*under_way)


def _ahead(function: Callable[[Any], T], items: Iterable) -> Iterator[T]:
    """Yields function(item) for each item, computed some items ahead in a thread."""
    waiting = collections.deque()
    thread = concurrent.futures.ThreadPoolExecutor(1, "read ahead")
    try:
        for item in items:
            waiting.append(thread.submit(function, item))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(wait=False, cancel_futures=True)

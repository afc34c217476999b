"""Compiles steps for all devices, and places batches and states on them.

A step is written once, as a pure function of (state, rows of the batch, axis_name). Under pmap each
device runs it on its own rows and `axis_name` names the axis to reduce over. Under jit the step
sees the global batch, `axis_name` is None, and the compiler divides the work among the devices.
Both give the same numbers. All other modules are independent of the number of devices.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from layermatch_jax.errors import InputError

AXIS = "batch"


def axis_name(parallelism: str) -> str | None:
    """Returns the name of the axis that a step reduces over; None under jit."""
    return AXIS if parallelism == "pmap" else None


@functools.cache
def mesh() -> Mesh:
    """Returns a one-dimensional mesh of all devices, ordered by process as pmap orders them.

    jax.make_mesh may order devices by their interconnect; then the rows of a process would not be
    consecutive in a batch.
    """
    devices = [d for process in range(jax.process_count()) for d in jax.local_devices(process)]
    # Auto: the Explicit default breaks optax's and our own sharding-agnostic code (jax >= 0.12).
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def by_rows(parallelism: str) -> NamedSharding:
    """Returns the sharding of the first axis over this process's devices (pmap) or all (jit)."""
    return NamedSharding(_mesh_of(parallelism), PartitionSpec(AXIS))


def replicated(parallelism: str) -> NamedSharding:
    """Returns the sharding with a full copy on this process's devices (pmap) or on all (jit)."""
    return NamedSharding(_mesh_of(parallelism), PartitionSpec())


def _mesh_of(parallelism: str) -> Mesh:
    # Inputs and outputs of a pmapped function lie on this process's devices.
    return mesh().local_mesh if parallelism == "pmap" else mesh()


def use_all_cores() -> None:
    """Makes XLA use all CPU cores for a convolution; call it before JAX is used.

    By default XLA:CPU passes most convolutions to YNNPACK, which computes them on one thread. XLA's
    own convolutions use all cores. If XLA_FLAGS sets the flag of YNNPACK already, it is kept.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    # A flag that XLA does not know ends the process. So the flag is set only for versions of JAX
    # that were tested, and not where libtpu reads XLA_FLAGS, too.
    tried = jax.__version_info__ < (0, 13) and not importlib.util.find_spec("libtpu")
    if "ynn_fusion_type" not in flags and tried:
        ours = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
        os.environ["XLA_FLAGS"] = f"{flags} {ours}".lstrip()


def keep_compiled(folder: str) -> None:
    """Caches compiled programs in a folder (local or gs://), for later starts on like machines."""
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def compile_step(
    step: Callable, parallelism: str, *, resident: bool = False, donate_state: bool = True
) -> Callable:
    """Compiles `step(state, rows, *, axis_name) -> outputs` for all devices.

    Args:
      step: pure; its outputs, any tree, must be the same on every device (summed or gathered).
      parallelism: 'pmap' or 'jit'.
      resident: whether the step has a second argument, `step(state, resident, rows, *, axis_name)`:
        data that are the same on every device and stay there.
      donate_state: whether the outputs may reuse the buffers of the state.

    Returns:
      A function of the same positional arguments: rows placed by `place_batch`, the others by
      `replicate`. State, resident data and outputs have no device axis.
    """
    whole = 2 if resident else 1  # number of arguments that each device has a full copy of
    donate = (0,) if donate_state else ()
    if parallelism == "pmap":
        return jax.pmap(
            functools.partial(step, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=(*[None] * whole, 0),
            out_axes=None,
            donate_argnums=donate,
        )
    return jax.jit(
        functools.partial(step, axis_name=None),
        in_shardings=(*[replicated("jit")] * whole, by_rows("jit")),
        out_shardings=replicated("jit"),
        donate_argnums=donate,
    )


def place_batch(batch, parallelism: str):
    """Puts this host's rows of a batch on its devices.

    Args:
      batch: tree of NumPy arrays [rows, ...], rows divisible by the number of local devices.
      parallelism: 'pmap' or 'jit'.

    Returns:
      The tree on the devices: [devices, rows / devices, ...] for pmap, [rows, ...] for jit.
    """
    local = jax.local_device_count()

    def place(x):
        x = np.asarray(x)
        if parallelism == "pmap":
            x = x.reshape(local, len(x) // local, *x.shape[1:])
        return jax.make_array_from_process_local_data(by_rows(parallelism), x)

    return jax.tree.map(place, batch)


def replicate(tree, parallelism: str):
    """Copies the same values to every device; donating the copies does not affect the argument.

    Args:
      tree: arrays, equal in all processes.
      parallelism: 'pmap' or 'jit'.

    Returns:
      The tree with the sharding of `replicated`.
    """
    sharding = replicated(parallelism)

    def place(x):
        x = np.array(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def fill(shape: tuple[int, ...], parts: Iterable[np.ndarray], parallelism: str) -> jax.Array:
    """Copies the same large array to every device part by part, without a second full copy.

    Args:
      shape: shape of the whole array.
      parts: uint8 arrays that make up the whole, in order along the first axis; equal in all
        processes.
      parallelism: 'pmap' or 'jit'.

    Returns:
      The array, uint8, with the sharding of `replicated`.
    """
    sharding, start = replicated(parallelism), 0
    copies = [jnp.zeros(shape, jnp.uint8, device=d) for d in sharding.addressable_devices]
    for part in parts:
        copies = [_put(copy, part, start) for copy in copies]
        jax.block_until_ready(copies)  # so that only one part is held at a time
        start += len(part)
    return jax.make_array_from_single_device_arrays(shape, sharding, copies)


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, part: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)


def check_room(
    size: int,
    what: str = "input.backend=device",
    smaller: str = "--config.input.backend=tf_data or a smaller --config.dataset.stored_size",
) -> None:
    """Refuses resident images that do not fit into the free memory of each device.

    `fill` needs this memory and that of one part. The memory that training needs is not included,
    because it is not known here.

    Args:
      size: bytes on each device.
      what: the setting that keeps them there, for the message.
      smaller: what needs less memory.

    Raises:
      InputError: the message says how much memory is free, and how to mend it.
    """
    devices = jax.local_devices()
    for device in devices:
        memory = device.memory_stats() or {}
        if "bytes_limit" in memory:
            need, free, where = size, memory["bytes_limit"] - memory["bytes_in_use"], str(device)
        else:  # CPU devices share the memory of the host
            need, free, where = len(devices) * size, _free_memory_of_host(), "this machine"
        if need > free:
            copies = f", {len(devices)} copies" if need > size else ""
            raise InputError(
                f"--config.{what} keeps all images on each device: {need / 1e9:.1f} "
                f"GB{copies}, and {where} has {free / 1e9:.1f} GB free. Use " + smaller
            )


def _free_memory_of_host() -> float:
    """Returns the bytes that can be allocated without swapping; infinite if not known."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):  # not Linux
        return float("inf")


def host_rows(batch_size: int) -> slice:
    """The rows of a global batch that this process loads."""
    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)

"""The one place that knows about devices: how a step is compiled, placed, gathered and summed.

A step is written once, as a pure function of (state, rows of the batch, axis_name). Under pmap each
device runs it on its own rows and `axis_name` names the axis to reduce over; under jit the step
sees the global batch, `axis_name` is None, and the compiler cuts it up. Both give the same numbers.
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
    """The axis that a step reduces over: the name pmap gives it, or None under jit."""
    return AXIS if parallelism == "pmap" else None


@functools.cache
def mesh() -> Mesh:
    """All devices of all processes in a row, those of a process side by side.

    The order of pmap. (jax.make_mesh may follow the wiring instead; a process's rows of a batch
    would then not be consecutive.)
    """
    devices = [d for process in range(jax.process_count()) for d in jax.local_devices(process)]
    # Auto: the Explicit default breaks optax's and our own sharding-agnostic code (jax >= 0.12).
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def by_rows(parallelism: str) -> NamedSharding:
    """Each device has its share of the first axis: of this process's for pmap, of all for jit."""
    return NamedSharding(_mesh_of(parallelism), PartitionSpec(AXIS))


def replicated(parallelism: str) -> NamedSharding:
    """Each device has everything: this process's devices for pmap, all of them for jit."""
    return NamedSharding(_mesh_of(parallelism), PartitionSpec())


def _mesh_of(parallelism: str) -> Mesh:
    # What a pmapped function takes and gives back belongs to the process.
    return mesh().local_mesh if parallelism == "pmap" else mesh()


def use_all_cores() -> None:
    """Lets XLA divide a convolution among a CPU's cores; to be called before JAX is used.

    By default XLA:CPU gives most convolutions to YNNPACK, which computes them on one thread; its
    own use all. What XLA_FLAGS says of YNNPACK already stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    # A flag that XLA does not know ends the process: none for a JAX that was not tried, nor where
    # a TPU's library reads it, too.
    tried = jax.__version_info__ < (0, 13) and not importlib.util.find_spec("libtpu")
    if "ynn_fusion_type" not in flags and tried:
        ours = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
        os.environ["XLA_FLAGS"] = f"{flags} {ours}".lstrip()


def keep_compiled(folder: str) -> None:
    """Keeps compiled programs in a folder (local or gs://), for later starts on such a machine."""
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def compile_step(
    step: Callable, parallelism: str, *, resident: bool = False, donate_state: bool = True
) -> Callable:
    """Compiles `step(state, rows, *, axis_name) -> outputs` for all devices.

    Args:
      step: pure; its outputs, any tree, must be the same on every device (summed or gathered).
      parallelism: 'pmap' or 'jit'.
      resident: whether there is a second argument, `step(state, resident, rows, *, axis_name)`,
        which is the same on every device and stays there.
      donate_state: whether the state's buffers may be reused, as for the state after it.

    Returns:
      A function of the same positional arguments, with rows placed by `place_batch` and the others
      placed by `replicate`; none grows a device axis.
    """
    whole = 2 if resident else 1  # arguments that every device has all of
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
    """Puts the same values on every device (a copy: donating it leaves the argument alone).

    Args:
      tree: of arrays, alike in all processes.
      parallelism: 'pmap' or 'jit'.

    Returns:
      The tree on the devices of `replicated`.
    """
    sharding = replicated(parallelism)

    def place(x):
        x = np.array(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def fill(shape: tuple[int, ...], parts: Iterable[np.ndarray], parallelism: str) -> jax.Array:
    """Puts the same large array on every device, part by part: no second copy of it is held.

    Args:
      shape: of the whole array.
      parts: uint8, what the whole is made of, in order along the first axis; alike in all
        processes.
      parallelism: 'pmap' or 'jit'.

    Returns:
      The array, uint8, on the devices of `replicated`.
    """
    sharding, start = replicated(parallelism), 0
    copies = [jnp.zeros(shape, jnp.uint8, device=d) for d in sharding.addressable_devices]
    for part in parts:
        copies = [_put(copy, part, start) for copy in copies]
        jax.block_until_ready(copies)  # or more parts would be held than the one under way
        start += len(part)
    return jax.make_array_from_single_device_arrays(shape, sharding, copies)


@functools.partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, part: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)


def check_room(size: int) -> None:
    """Refuses what each device is to keep if it has no memory for that.

    `fill` holds no more than this and the part under way. What training needs beside it is not
    known here.

    Args:
      size: bytes on each device.

    Raises:
      InputError: says how much there is, and what to do.
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
                f"--config.input.backend=device keeps all images on each device: {need / 1e9:.1f} "
                f"GB{copies}, and {where} has {free / 1e9:.1f} GB free. Take "
                "--config.input.backend=tf_data, or images of a smaller "
                "--config.dataset.stored_size"
            )


def _free_memory_of_host() -> float:
    """Bytes that programs can still take without swapping; infinite where that is not known."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):  # no Linux
        return float("inf")


def host_rows(batch_size: int) -> slice:
    """The rows of a global batch that this process loads."""
    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)

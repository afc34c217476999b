import os

# Before JAX starts: eight devices on one CPU, for the tests of what several devices do.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Tests compile much and compute little. Processes that tests start inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
# With more devices than cores, programs that were dispatched ahead wait for each other's threads.
# (The speed tests run with XLA_FLAGS= : one device, and dispatch as a user has it.)
jax.config.update("jax_cpu_enable_async_dispatch", not os.environ["XLA_FLAGS"])

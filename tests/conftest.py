import os

# Before JAX starts: eight devices on one CPU, for the tests of several devices.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Tests compile much and compute little. Processes that tests start inherit this setting.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jaxtyping

# Calls of these are checked against their annotations, shapes included. Before they are imported.
jaxtyping.install_import_hook(
    [f"layermatch_jax.{room}" for room in ("method", "models", "data", "views")],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",  # an int is a float
)

import jax
import pytest
from absl import flags, logging

from layermatch_jax import main

# In these helper modules, failed assertions show values, too.
pytest.register_assert_rewrite(
    "command_line", "objectives", "oracles", "report_pages", "runs_of_tests"
)

jax.config.update("jax_numpy_rank_promotion", "raise")
# With more devices than cores, programs that were dispatched ahead wait for each other's threads.
# (The speed tests run with XLA_FLAGS= : one device, and asynchronous dispatch as for users.)
jax.config.update("jax_cpu_enable_async_dispatch", not os.environ["XLA_FLAGS"])


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Compiles programs that several tests of a worker use only once (if it takes a second)."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))


@pytest.fixture(scope="session", autouse=True)
def cached_for_the_tests_alone(tmp_path_factory):
    """Keeps decoded images out of the user's cache folder; Matplotlib's list of fonts stays."""
    fonts = os.path.expanduser("~/.cache/matplotlib")
    os.environ.setdefault("MPLCONFIGDIR", fonts)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def call(capfd):
    """Calls the command line in this process, where JAX is loaded: (status, stdout, stderr)."""
    verbosity = logging.get_verbosity()

    def run(*args):
        values = flags.FlagValues()
        capfd.readouterr()
        try:
            status = main.main(main.parse_flags(["main", *args], values), values)
        except SystemExit as end:
            status = end.code
        return status, *capfd.readouterr()

    yield run
    logging.set_verbosity(verbosity)

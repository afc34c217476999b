"""The console command `layermatch`."""

import runpy


def run() -> None:
    """Runs `python -m layermatch_jax.main` in this process, with the same arguments.

    Running it as a module, and not calling its functions, makes --help the same: absl lists the
    flags that the main module defines.
    """
    runpy.run_module("layermatch_jax.main", run_name="__main__", alter_sys=True)

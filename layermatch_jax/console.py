"""The console command `layermatch`."""

import runpy


def run() -> None:
    """Runs `python -m layermatch_jax.main` in this process, with the same arguments.

    absl's --help lists the flags of the module that runs as __main__. So the module is run, not its
    functions called: then `layermatch --help` prints the same text.
    """
    runpy.run_module("layermatch_jax.main", run_name="__main__", alter_sys=True)

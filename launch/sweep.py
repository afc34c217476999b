"""Starts layermatch_jax/sweep/command.py from a checkout; --help explains it.

python launch/sweep.py --help
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the checkout's package

from layermatch_jax.runtime import terminal
from layermatch_jax.sweep import command

if __name__ == "__main__":
    terminal.allow_any_text()
    sys.exit(command.main(sys.argv[1:]))

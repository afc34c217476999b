"""The command line: layermatch --config=cifar100.

python -m layermatch_jax.main is the same program.
"""

import errno
import os
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from layermatch_jax import config as config_lib
from layermatch_jax import modes
from layermatch_jax.errors import EarlyEnd, InputError, refusal, unknown


def main(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> int:
    """Returns the exit status: 0 done or stopped, 1 failed, 2 asked for what cannot be done."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax and clu tell of every file at INFO
    try:
        config = flag_values.config
        if argv[1:]:
            raise InputError(f"unexpected argument {argv[1]!r}: flags are written --name=value")
        if flag_values.mode not in modes.MODES:
            raise unknown("--mode", flag_values.mode, modes.MODES)
        from layermatch_jax import hosts, parallel, workdir  # JAX: not for a wrong flag

        parallel.use_all_cores()
        hosts.connect(flag_values.coordinator, flag_values.num_processes, flag_values.process_id)
        folder = os.path.expanduser(flag_values.workdir or workdir.default(config))
        if said := modes.MODES[flag_values.mode](config, folder):
            print(said)
    except EarlyEnd as end:
        print(f"{type(end).__name__}: {end}", file=sys.stderr)
        return end.status
    except OSError as error:  # of the small files; checkpoint.py tells of the large ones
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"StorageError: {error}. Make room; the same command goes on", file=sys.stderr)
        return 1
    except Exception as error:
        said = refusal(error)
        if not said:
            raise
        print(f"StorageError: {said}. Mend it; the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: what is done since the last checkpoint is lost", file=sys.stderr)
        return 130
    return 0


def parse_flags(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Defines and parses the flags; returns what is left of `argv`.

    Raises:
      SystemExit: 2 after a line that says what is wrong, where absl and ml_collections would end
        with a traceback or status 1; 0 after --help.
    """
    try:
        argv = _checked(argv)
        config_flags.DEFINE_config_file(  # here, not above: it reads the file and the fields given
            "config",
            str(config_lib.FOLDER / "digits.py"),
            "Settings, as NAME:labels=250,method=fixmatch. NAME is a shipped config or the path of "
            "a file. --config.FIELD=VALUE changes one.",
            flag_values=flag_values,
            sys_argv=argv,
        )
        for name, default, text in (
            (
                "workdir",
                None,
                "Folder of the run; default runs/DATASET-LABELS-METHOD-lSEED-sSEED. "
                "For --mode=report also several, comma-separated, or a folder of such folders.",
            ),
            ("mode", "train", f"What to do: {', '.join(modes.MODES)}."),
            ("coordinator", None, "HOST:PORT of the first process, for several processes."),
        ):
            flags.DEFINE_string(name, default, text, flag_values=flag_values)
        for name, text in (
            ("num_processes", "Of how many processes the run is made."),
            ("process_id", "Which of them this is, from 0."),
        ):
            flags.DEFINE_integer(name, None, text, flag_values=flag_values)
        return flag_values(argv)
    except (InputError, flags.Error) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit:  # of --help, which absl ends with status 1
        sys.exit(0)


def _checked(argv: list[str]) -> list[str]:
    """The same arguments, with --config=NAME of a shipped config as the path of its file."""
    argv = list(argv)
    for i, arg in enumerate(argv):
        if override := re.match(r"--?(?:no)?config\.([^=]*)", arg):
            config_lib.check_field(override[1])
        elif given := re.fullmatch(r"(--?config=)(.*)", arg):
            argv[i] = given[1] + _with_file(given[2])
        elif re.fullmatch(r"--?config", arg):
            argv[i + 1 : i + 2] = [_with_file("".join(argv[i + 1 : i + 2]))]
    return argv


def _with_file(config: str) -> str:
    name, colon, arg = config.partition(":")
    return f"{config_lib.find_file(name)}{colon}{arg}"


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)

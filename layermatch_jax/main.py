"""The command line: python -m layermatch_jax.main --config=configs/cifar100.py."""

import errno
import os
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from layermatch_jax import config as config_lib
from layermatch_jax import modes, terminal
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
        given = config_flags.get_override_values(flag_values["config"])
        if said := modes.MODES[flag_values.mode](config, folder, given):
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
        _check(argv)
        config_flags.DEFINE_config_file(  # here, not above: it reads the file and the fields given
            "config",
            str(config_lib.FOLDER / "digits.py"),
            "Settings, as FILE:labels=250,method=fixmatch; --config.FIELD=VALUE changes one.",
            flag_values=flag_values,
            sys_argv=argv,
        )
        for name, default, text in (
            (
                "workdir",
                None,
                "Folder of the run; default runs/DATASET-LABELS-METHOD-lSEED-sSEED. "
                "For --mode=report also several, comma-separated, or a folder of such folders; a "
                "comma in the name of an existing folder does not separate.",
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


def _check(argv: list[str]) -> None:
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        if override := re.match(r"--?(?:no)?config\.([^=]*)", arg):
            config_lib.check_field(override[1])
        elif given := re.fullmatch(r"--?config(?:=(.*))?", arg):
            config_lib.check_file((following if given[1] is None else given[1]).split(":")[0])


if __name__ == "__main__":
    terminal.allow_any_text()
    app.run(main, flags_parser=parse_flags)

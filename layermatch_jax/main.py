"""The command line: python -m layermatch_jax.main --config=configs/cifar100.py."""

import itertools
import os
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from layermatch_jax import config as config_lib
from layermatch_jax import modes
from layermatch_jax.errors import EarlyEnd, InputError, explained, unknown


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
    except Exception as error:
        said = explained(error)
        if not said:  # a mistake of ours: its traceback is needed
            raise
        print(said, file=sys.stderr)
        logging.debug("Its traceback:", exc_info=True)  # --verbosity=1
        return 1
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130
    return 0


def parse_flags(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Defines and parses the flags; returns what is left of `argv`.

    Raises:
      SystemExit: 2 after a line that says what is wrong, where absl and ml_collections would end
        with a traceback or status 1; 0 after --help.
    """
    try:
        argv, unset = _take_out_none(argv)
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
        rest = flag_values(argv)
        flag_values.config.update_from_flattened_dict(dict.fromkeys(unset))
        return rest
    except (InputError, flags.Error) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit:  # of --help, which absl ends with status 1
        sys.exit(0)


def _take_out_none(argv: list[str]) -> tuple[list[str], list[str]]:
    """Without the flags --config.FIELD=None; and these fields, of those that may be None.

    ml_collections would refuse it for a number, and read it as the text 'None' for a path.
    """
    may_be = {name for name, value in config_lib.fields(config_lib.base()).items() if value is None}
    kept, unset, rest = [], [], iter(argv)
    for arg in rest:
        given = re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", arg, re.DOTALL)
        if not (given and given[1] in may_be):
            kept.append(arg)
            continue
        value = [arg] if given[2] is not None else [arg, *itertools.islice(rest, 1)]
        if (given[2] or value[-1]) == "None":
            unset.append(given[1])
        else:
            kept += value
    return kept, unset


def _check(argv: list[str]) -> None:
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        if override := re.match(r"--?(?:no)?config\.([^=]*)", arg):
            config_lib.check_field(override[1])
        elif given := re.fullmatch(r"--?config(?:=(.*))?", arg):
            config_lib.check_file((following if given[1] is None else given[1]).split(":")[0])


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)

"""The command line: layermatch --config=cifar100.

python -m layermatch_jax.main is the same program.
"""

import os
import re
import sys

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from layermatch_jax import automatic, config_file, modes
from layermatch_jax import config as config_lib
from layermatch_jax.errors import EarlyEnd, InputError, explained, unknown
from layermatch_jax.runtime import terminal

# Data sets for which the default config (the digits' demo) is wrong, and the configs to use.
CONFIGS_FOR = {
    "cifar10": "--config=cifar10",
    "cifar100": "--config=cifar100",
    "stl10": "--config=stl10",
    "folder": "--config=imagenet100 for photographs (ResNet-50 on 224 pixels), "
    "--config=stl10 for images of about 96 pixels, --config=cifar10 for 32 pixels",
    "npz": "--config=cifar10 for images of 32 pixels, --config=stl10 for 96, "
    "--config=imagenet100 for larger ones",
}


def main(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> int:
    """Runs the mode; returns the exit status.

    0: done, or told to stop. 1: failed. 2: the settings, flags or data cannot be used. 3: done, but
    some images are broken. 130: interrupted.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax and clu tell of every file at INFO
    try:
        for line in automatic.ignored(flag_values.config):
            print(line, file=sys.stderr)
        config = automatic.resolve(flag_values.config)
        if argv[1:]:
            raise InputError(f"unexpected argument {argv[1]!r}: flags are written --name=value")
        if flag_values.mode not in modes.MODES:
            raise unknown("--mode", flag_values.mode, modes.MODES)
        present = [name for name in flag_values if flag_values[name].present]
        own = {name: flag_values[name].value for name in modes.own_flags(flag_values.mode, present)}
        from layermatch_jax.runtime import hosts, parallel, workdir  # after the flags: JAX is slow

        parallel.use_all_cores()
        hosts.connect(flag_values.coordinator, flag_values.num_processes, flag_values.process_id)
        folder = os.path.expanduser(flag_values.workdir or workdir.default(config))
        if "://" in folder and not folder.startswith("gs://"):
            raise InputError(f"--workdir={folder}: give a local folder, or gs://BUCKET/PATH")
        given = config_flags.get_override_values(flag_values["config"])
        if said := modes.MODES[flag_values.mode](config, folder, given, **own):
            print(said)
    except EarlyEnd as end:
        print(f"{type(end).__name__}: {end}", file=sys.stderr)
        return end.status
    except Exception as error:
        said = explained(error, flag_values.mode in modes.RESUMING)
        if not said:  # a bug: its traceback is needed
            raise
        print(said, file=sys.stderr)
        logging.debug("Its traceback:", exc_info=True)  # --verbosity=1
        return 1
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130
    return 0


def parse_flags(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Defines and parses the flags; returns the remaining arguments of `argv`.

    Raises:
      SystemExit: status 2 after a line that says what is wrong (absl and ml_collections would print
        a traceback or exit with status 1); status 0 after --help.
    """
    for kind, parser in ((float, flags.FloatParser()), (str, flags.ArgumentParser())):
        config_flags.register_flag_parser_for_type(kind, _OrNone(parser))
    try:
        _check(argv)
        config_flags.DEFINE_config_file(  # not at import, because it runs the config file
            "config",
            str(config_file.FOLDER / "digits.py"),
            "Settings, for example cifar10:labels=250,method=fixmatch. Before the colon stands the "
            "name of a shipped config or the path of a config file. --config.FIELD=VALUE changes "
            "one setting.",
            flag_values=flag_values,
            sys_argv=argv,
        )
        flag_values["config"].parser = _ConfigFile()  # says what is wrong with a file, and where
        for name, default, text in (
            (
                "workdir",
                None,
                "Folder of the run (default: runs/DATASET-LABELS-METHOD-lSEED-sSEED). predict and "
                "export: a folder or a bundle. report: one or several folders, comma-separated, or "
                "a folder of such folders; a comma in the name of an existing folder is no "
                "separator.",
            ),
            ("mode", "train", f"What to do: {', '.join(modes.MODES)}."),
            (
                "images",
                None,
                "predict: a folder, a file with a list of paths (.txt), or FILE,FILE,…",
            ),
            (
                "out",
                None,
                "predict: the table to write, .csv or .jsonl. export: the file to write.",
            ),
            ("features", None, "predict: the file to write the features to, .npy (default: none)."),
            (
                "format",
                None,
                "export: bundle (a file that can be given as --workdir), stablehlo or onnx (files "
                "that run without this package).",
            ),
            ("coordinator", None, "HOST:PORT of the first process, if there are several."),
        ):
            flags.DEFINE_string(name, default, text, flag_values=flag_values)
        for name, text in (
            ("top", "predict: number of classes in the table for each image (default: 1)."),
            ("num_processes", "Number of processes of the run."),
            ("process_id", "Number of this process, from 0."),
        ):
            flags.DEFINE_integer(name, None, text, flag_values=flag_values)
        left = flag_values(argv)
        _check_default(flag_values)
        return left
    except (InputError, flags.Error) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit:  # of --help, which absl ends with status 1
        sys.exit(0)


class _ConfigFile(flags.ArgumentParser):
    def parse(self, argument: str) -> ml_collections.ConfigDict:
        return config_file.load(argument)


class _OrNone(flags.ArgumentParser):
    """Parses 'None' as the value None (automatic), and all else with the field's own parser."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser

    def parse(self, argument: str):
        return None if argument == "None" else self._parser.parse(argument)

    def flag_type(self) -> str:
        return self._parser.flag_type()


def _check(argv: list[str]) -> None:
    for arg in argv:
        if override := re.match(r"--?(?:no)?config\.([^=]*)", arg):
            config_lib.check_field(override[1])


def _check_default(flag_values: flags.FlagValues) -> None:
    """Refuses to train on another data set with the default config, the digits' demo."""
    name = flag_values.config.dataset.name
    own_config = flag_values["config"].present or flag_values.mode not in ("train", "benchmark")
    if not own_config and name in CONFIGS_FOR:
        raise InputError(
            f"--config.dataset.name={name} without --config would train with the settings of the "
            f"digits' demo (16 pixels, a small network). Give a config, too: {CONFIGS_FOR[name]}. "
            "To use the demo's settings on purpose, write --config=digits"
        )


if __name__ == "__main__":
    terminal.allow_any_text()
    app.run(main, flags_parser=parse_flags)

"""The command line: python -m layermatch_jax.main --config=configs/cifar100.py."""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from layermatch_jax import config as config_lib
from layermatch_jax.errors import InputError, NonFiniteLossError, unknown

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
MODES = ("train",)

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    str(CONFIGS / "digits.py"),
    "File with the settings, as FILE:labels=250,method=fixmatch; --config.FIELD=VALUE changes one.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default runs/DATASET-LABELS-METHOD-lLABELSEED-sSEED."
)
_MODE = flags.DEFINE_string("mode", "train", f"What to do: {', '.join(MODES)}.")


def main(argv: list[str]) -> int:
    """Returns the exit status: 0 done, 1 diverged, 2 asked for something that cannot be done."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax and clu tell of every file at INFO
    try:
        config = _CONFIG.value
        if argv[1:]:
            raise InputError(f"unexpected argument {argv[1]!r}: flags are written --name=value")
        if _MODE.value not in MODES:
            raise unknown("mode", _MODE.value, MODES)
        from layermatch_jax import train, workdir  # JAX starts here, not for a wrong flag

        folder = _WORKDIR.value or workdir.default(config)
        print(workdir.summary(train.train_and_evaluate(config, folder), folder))
    except (InputError, NonFiniteLossError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags, refusing what absl and ml_collections would meet with a traceback."""
    try:
        for arg in argv[1:]:
            name, _, value = arg.removeprefix("-").removeprefix("-").partition("=")
            if name.startswith("config."):
                config_lib.check_field(name.removeprefix("config."))
            if name == "config" and not pathlib.Path(file := value.split(":")[0]).is_file():
                known = ", ".join(sorted(path.name for path in CONFIGS.glob("*.py")))
                raise InputError(f"no config file {file!r}; in {CONFIGS} there are: {known}")
        return flags.FLAGS(argv)
    except (InputError, flags.Error) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)

"""Finds and runs the config file that --config=NAME:ARGUMENT names."""

import importlib.util
import pathlib
import traceback
from types import ModuleType

import ml_collections

from layermatch_jax import config as config_lib
from layermatch_jax.errors import InputError

# The shipped configs lie inside an installed package, and beside it in a checkout.
FOLDER = pathlib.Path(__file__).parent / "configs"
if not FOLDER.is_dir():
    FOLDER = FOLDER.parent.parent / "configs"
_LONG = 300  # characters; a longer text in a message is cut


def load(written: str) -> ml_collections.ConfigDict:
    """Runs a config file.

    Args:
      written: NAME or NAME:ARGUMENT. `find` explains NAME; the file's `get_config` gets ARGUMENT.

    Returns:
      The config, locked.

    Raises:
      InputError: there is no such file, it fails (the message names the line), it calls sys.exit,
        or it does not return a config with the fields of config.base().
    """
    name, *arg = written.split(":", 1)
    path = find(name)
    try:
        module = _module(path)
        if not hasattr(module, "get_config"):
            raise InputError(f"{path} has no function get_config(arg); see {FOLDER}/cifar10.py")
        config = module.get_config(*arg)
    except InputError:
        raise
    except SystemExit as end:
        said = "" if end.code is None else f": {end.code}"
        raise InputError(f"{_place(end, path)} ended the program by sys.exit{said}") from end
    except Exception as error:
        said = f"{type(error).__name__}: {error}".split(" Other fields present")[0]  # ConfigDict's
        raise InputError(f"{_place(error, path)}: {_shortened(said)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(
            f"{path}: get_config returned {config!r}, which is not a config. It must end with "
            "`return presets.apply_arg(config, arg)`"
        )
    known, own = config_lib.fields(config_lib.base()), config_lib.fields(config)
    if wrong := known.keys() ^ own.keys():
        raise InputError(
            f"{path}: get_config must return a config that was made by config_lib.base(). These "
            f"fields are missing or unknown: {_shortened(', '.join(sorted(wrong)))}"
        )
    return config.lock()


def find(name: str) -> pathlib.Path:
    """Returns the path of the config file that --config=NAME means.

    Args:
      name: the name of a shipped config (`digits`), or the path of a Python file.

    Raises:
      InputError: there is no such file; the message lists the shipped configs.
    """
    shipped = sorted(path.stem for path in FOLDER.glob("*.py"))
    path = pathlib.Path(name)
    if name in shipped:
        return FOLDER / f"{name}.py"
    if name.endswith(".py") and path.is_file():
        return path
    hint = f" Did you mean the shipped one, --config={path.stem}?" if path.stem in shipped else ""
    raise InputError(
        f"--config={name}: no such config file in {pathlib.Path.cwd()}.{hint} Give the path of a "
        f"Python file, or the name of a shipped config: {', '.join(shipped)}"
    )


def _module(path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_file", path)
    assert spec is not None
    assert spec.loader is not None  # as the file ends with .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _shortened(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]}…"


def _place(error: BaseException, path: pathlib.Path) -> str:
    """Returns 'FILE, line 12': the line of the config file in which the error arose.

    That line failed itself, or called the code that failed.
    """
    frames = traceback.extract_tb(error.__traceback__)
    places = [(frame.filename, frame.lineno) for frame in frames]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    file = path.resolve()
    lines = [line for name, line in places if pathlib.Path(name).resolve() == file]
    return f"{path}, line {lines[-1]}" if lines else str(path)

"""Small files, written atomically: a crash or a power cut leaves the old file or the new one.

An incomplete file has the name FILE.part, and nothing reads it.
"""

import json
import os
from collections.abc import Callable
from typing import Any

from etils import epath

from layermatch_jax.errors import InputError


def write_text(path: epath.Path, text: str) -> epath.Path:
    """Writes a text file (UTF-8) as `write_bytes` does, and returns its path."""
    return write_bytes(path, text.encode())


def write_bytes(path: epath.Path, content: bytes) -> epath.Path:
    """Writes a file atomically, and returns its path.

    On a local disk the content is flushed to the disk before the file gets its name. A bucket
    (gs://) writes objects atomically by itself.

    Args:
      path: local or gs://; its folder exists.
      content: the content of the file.
    """
    path = epath.Path(path)
    if "://" in str(path):
        path.write_bytes(content)
        return path
    part = path.parent / f"{path.name}.part"
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync_folder(path.parent)
    return path


def write_json(path: epath.Path, content: Any) -> epath.Path:
    """Writes a JSON file as `write_text` does, and returns its path."""
    return write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: epath.Path, mend: str, kind: type = dict) -> Any:
    """Reads a JSON file.

    Args:
      path: local or gs://.
      mend: how the user can mend a damaged file, in whole sentences.
      kind: the type of the content, dict or list.

    Raises:
      InputError: the file is empty, cut off, not JSON or of another type; the message contains
        `mend`.
    """
    try:
        content = json.loads(epath.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{path} is damaged: it is not complete JSON ({error}). {mend}") from None
    if not isinstance(content, kind):
        said = f"it should hold a {kind.__name__}, not {content!r:.40}"
        raise InputError(f"{path} is damaged: {said}. {mend}")
    return content


def check_place(path: str, flag: str) -> None:
    """Refuses a path at which no local file can be written.

    Args:
      path: path of the file.
      flag: what the user wrote, such as '--out=predictions.csv'; the message begins with it.

    Raises:
      InputError: the message names the obstacle.
    """
    folder = os.path.dirname(path) or "."
    if "://" in path:
        raise InputError(f"{flag}: give a local path, and copy the file to the bucket afterwards")
    if os.path.isdir(path):
        raise InputError(f"{flag} is a folder. Give the name of a file")
    if not os.path.isdir(folder):
        raise InputError(f"{flag}: there is no folder {folder}. Make it, or choose another path")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise InputError(f"{flag} cannot be written: {folder} is read-only. Choose another path")


def separate(names: str, there: Callable[[str], bool]) -> list[str]:
    """Splits a comma-separated list of names in which existing names may contain commas.

    If `names` exists as a whole, it is not split. A piece that does not exist is joined with the
    following pieces until the result exists; if none exists, the piece stands alone. Empty pieces
    are left out.

    Args:
      names: names of files or folders, comma-separated.
      there: whether a file or folder with this name exists.
    """
    if "," in names and there(names):
        return [names]
    found, pieces = [], names.split(",")
    while pieces:
        joined = (",".join(pieces[:n]) for n in range(1, len(pieces) + 1))
        name = next((name for name in joined if name and there(name)), pieces[0])
        pieces = pieces[name.count(",") + 1 :]
        found += [name] if name else []
    return found


def _sync_folder(folder: epath.Path) -> None:
    # Otherwise a power cut may undo the renaming. Windows cannot open folders.
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(descriptor)

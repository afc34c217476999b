"""Small files, written atomically: a crash or a power cut leaves the old file or the new one.

An incomplete file has the name FILE.part, and nothing reads it.
"""

import json
import os
from typing import Any

from etils import epath

from layermatch_jax.errors import InputError


def write_text(path: epath.Path, text: str) -> epath.Path:
    """Writes a text file (UTF-8) whole or not at all, and returns its path.

    On a local disk the text has reached the disk before the file takes its name. An object in a
    bucket (gs://) is whole or not there by itself.

    Args:
      path: local or gs://; its folder exists.
      text: what the file is to hold.
    """
    path = epath.Path(path)
    if "://" in str(path):
        path.write_text(text)
        return path
    part = path.parent / f"{path.name}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
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

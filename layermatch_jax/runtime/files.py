"""Small files, written so that a crash or a power cut leaves the old file or the new one.

A file that is half-written has the name FILE.part, and nothing reads it.
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
    """What a JSON file holds.

    Args:
      path: local or gs://.
      mend: what the user can do if the file is damaged: one or more whole sentences.
      kind: of what the file holds, dict or list.

    Raises:
      InputError: the file is empty, cut off, no JSON or of another kind; names it and says `mend`.
    """
    try:
        content = json.loads(epath.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{path} is damaged: it is no whole JSON file ({error}). {mend}") from None
    if not isinstance(content, kind):
        said = f"it holds no {kind.__name__} but {content!r:.40}"
        raise InputError(f"{path} is damaged: {said}. {mend}")
    return content


def _sync_folder(folder: epath.Path) -> None:
    # Without it, a power cut may undo the renaming. Windows opens no folders.
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(descriptor)

"""All images of a data set decoded once, before anything is trained on them."""

import collections
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import PIL

from layermatch_jax.data.sources import decoding, names
from layermatch_jax.runtime import files as small_files

_CHUNK = 256  # images given to the threads at a time: Ctrl-C waits for no more than these
_QUIET = 3.0  # seconds that pass without a word; a check that took longer is recorded
_LINES = 100  # of an error message


class Findings(NamedTuple):
    """What is wrong with the images of a data set, and what is unusual about them."""

    broken: dict[str, str]  # path -> why it cannot be decoded
    remarks: tuple[str, ...]  # sentences for the user


def check(files: Sequence[str], side: int, alpha: str) -> Findings:
    """Decodes images as `decoding.decode` would, in parallel, and tells how far it is.

    A check of some seconds that found all images whole is recorded in the user's cache folder
    ($XDG_CACHE_HOME, by default ~/.cache). It is not repeated while the same files have the same
    sizes and times of modification.

    Args:
      files: their paths.
      side: of the decoded images, pixels.
      alpha: of `decoding.decode`.
    """
    record = _record(files, side, alpha)
    with contextlib.suppress(OSError, ValueError):  # none, or a damaged one: check again
        earlier = json.loads(record.read_text(encoding="utf-8"))
        return Findings({}, (*earlier, "all images were found whole at an earlier start"))

    broken, remarks = {}, collections.defaultdict(list)
    started = said = time.monotonic()
    for start in range(0, len(files), _CHUNK):
        part = files[start : start + _CHUNK]
        examined = decoding.pool().map(lambda path: decoding.examine(path, side, alpha), part)
        for path, (reason, of_image) in zip(part, examined, strict=True):
            if reason:
                broken[path] = reason
            for remark in of_image:
                remarks[remark].append(path)
        now, done = time.monotonic(), start + len(part)
        if now - said >= _QUIET or (said > started and done == len(files)):
            said, left = now, (now - started) / done * (len(files) - done)
            print(
                f"checking images: {done:,} of {len(files):,} decoded, {left:.0f} s left",
                file=sys.stderr,
            )
    sentences = [
        f"{remark} in {len(paths):,} of {len(files):,} images (first: {names.text(paths[0])})"
        for remark, paths in sorted(remarks.items())
    ]
    if not broken and time.monotonic() - started > _QUIET:
        with contextlib.suppress(OSError):  # no room, no right: the next start checks again
            record.parent.mkdir(parents=True, exist_ok=True)
            small_files.write_json(record, sentences)
    return Findings(broken, tuple(sentences))


def as_lines(broken: dict[str, str]) -> str:
    """The broken images, one a line, each with its reason."""
    lines = [f"  {names.text(path)} ({reason})" for path, reason in broken.items()]
    if len(lines) > _LINES:
        lines[_LINES:] = [f"  and {len(lines) - _LINES:,} more"]
    return "\n".join(lines)


def _record(files: Sequence[str], side: int, alpha: str) -> Path:
    """Where a check of these files, as they are now, is recorded."""

    def state_of(path):
        try:
            found = os.stat(path)
        except OSError:
            return path, None, None
        return path, found.st_size, found.st_mtime_ns

    key = hashlib.sha256(repr((PIL.__version__, side, alpha)).encode())
    for of_file in decoding.pool().map(state_of, files):
        key.update(repr(of_file).encode("utf-8", "surrogateescape"))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "layermatch_jax", "checked_images", f"{key.hexdigest()}.json")

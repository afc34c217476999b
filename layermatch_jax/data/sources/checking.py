"""Decodes all images of a data set once before training, to find broken ones."""

import collections
import contextlib
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import PIL

from layermatch_jax.data.sources import decoding, names
from layermatch_jax.runtime import files as small_files

T = TypeVar("T")
_QUIET = 3.0  # seconds between messages; a check that took longer is recorded
_LINES = 100  # images in an error message


class Findings(NamedTuple):
    """Broken images of a data set, and remarks on unusual ones."""

    broken: dict[str, str]  # path -> why it cannot be decoded
    remarks: tuple[str, ...]  # sentences for the user


def check(files: Sequence[str], side: int, alpha: str) -> Findings:
    """Decodes image files in parallel, as `decoding.decode` does, and prints its progress.

    A check that took more than three seconds and found no broken image is recorded in the user's
    cache folder ($XDG_CACHE_HOME, by default ~/.cache). The check is skipped as long as the files'
    paths, sizes and modification times stay the same.

    Args:
      files: the paths of the images.
      side: side of the decoded images, pixels.
      alpha: see `decoding.decode`.
    """
    record = _record(files, side, alpha)
    with contextlib.suppress(OSError, ValueError):  # no record, or a damaged one: check
        earlier = json.loads(record.read_text(encoding="utf-8"))
        return Findings({}, (*earlier, "an earlier start found no broken image"))

    started = time.monotonic()
    examine = functools.partial(decoding.examine, side=side, alpha=alpha)
    results = decoding.ahead(examine, files, side)
    findings = tally(files, shown(results, len(files), "checking images"))
    if not findings.broken and time.monotonic() - started > _QUIET:
        with contextlib.suppress(OSError):  # the next start checks again
            record.parent.mkdir(parents=True, exist_ok=True)
            small_files.write_json(record, findings.remarks)
    return findings


def tally(files: Sequence[str], results: Iterable[tuple[str | None, Sequence[str]]]) -> Findings:
    """Makes the Findings of all files from (reason why it is broken, or None; remarks) of each."""
    broken, remarks = {}, collections.defaultdict(list)
    for path, (reason, of_image) in zip(files, results, strict=True):
        if reason:
            broken[path] = reason
        for remark in of_image:
            remarks[remark].append(path)
    sentences = [
        f"{remark} in {len(paths):,} of {len(files):,} images (first: {names.text(paths[0])})"
        for remark, paths in sorted(remarks.items())
    ]
    return Findings(broken, tuple(sentences))


def shown(results: Iterable[T], total: int, doing: str) -> Iterator[T]:
    """Yields what it gets, and prints every few seconds how many have come and the time left.

    Args:
      results: the results for images, computed while they are asked for.
      total: their number.
      doing: what is done, such as 'checking images'.
    """
    started = said = time.monotonic()
    for done, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - said >= _QUIET or (said > started and done == total):
            said, left = now, (now - started) / done * (total - done)
            print(
                f"{doing}: {done:,} of {total:,} decoded, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def as_lines(broken: dict[str, str]) -> str:
    """Lists the broken images, one on each line, with the reasons."""
    lines = [f"  {names.text(path)} ({reason})" for path, reason in broken.items()]
    if len(lines) > _LINES:
        lines[_LINES:] = [f"  and {len(lines) - _LINES:,} more"]
    return "\n".join(lines)


def _record(files: Sequence[str], side: int, alpha: str) -> Path:
    """Returns the path of the record for these files in their present state."""

    def state_of(path):
        try:
            found = os.stat(path)
        except OSError:
            return path, None, None
        return path, found.st_size, found.st_mtime_ns

    key = hashlib.sha256(repr((PIL.__version__, side, alpha)).encode())
    for of_file in decoding.of_each(state_of, files):
        key.update(repr(of_file).encode("utf-8", "surrogateescape"))
    return user_cache() / "checked_images" / f"{key.hexdigest()}.json"


def user_cache() -> Path:
    """Returns the folder of this program in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "layermatch_jax")

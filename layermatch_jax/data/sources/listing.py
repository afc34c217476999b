"""Lists the images below a folder, and tallies everything else by kind."""

import collections
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from layermatch_jax.data.sources import names

# Endings of the formats that `decoding` opens; case does not matter.
EXTENSIONS = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
# Kinds of entries. Every other kind is passed over and named: see `passed_over`.
FOLDER, IMAGE = "folders", "images"
HIDDEN, SYSTEM = "hidden", "of the system (thumbnails, trash)"
# SYSTEM: names that file servers and operating systems create: thumbnails, metadata, trash.
_SYSTEM = {
    *(
        "@eadir",
        "@recently-snapshot",
        "@recycle",
        "@__thumb",
        "@tmp",
        "__macosx",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "recycler",
        "~snapshot",
    ),
    *("lost+found", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),
}
_KINDS_NAMED = 30


class Found(NamedTuple):
    """The result of `find`."""

    files: list[str]  # paths of the images, sorted by the text of their part below the folder
    passed_over: dict[str, list[str]]  # kind -> paths


def find(folder: str | os.PathLike) -> Found:
    """Finds the images below a folder, at any depth.

    Links to files and folders are followed. Each folder counts once, and the folders above `folder`
    do not count, so circular links end.
    """
    folder = os.fspath(folder)
    real = os.path.realpath(folder)
    seen = {real[:i] or os.sep for i, character in enumerate(real) if character == os.sep}
    files, passed_over = [], collections.defaultdict(list)
    todo = collections.deque([folder])
    while todo:
        where = todo.popleft()
        real = os.path.realpath(where)
        if real in seen:
            passed_over["circular or repeated link"].append(where)
            continue
        seen.add(real)
        try:
            inside = entries(where)
        except OSError:
            passed_over["unreadable"].append(where)
            continue
        for kind, found in inside.items():
            paths = [os.path.join(where, name) for name in found]
            if kind == IMAGE:
                files += paths
            elif kind != FOLDER:
                passed_over[kind] += paths
            else:  # links last, so that a linked folder counts at its own place
                todo.extend(path for path in paths if os.path.islink(path))
                todo.extendleft(path for path in paths if not os.path.islink(path))
    start = len(os.path.join(folder, ""))
    below = names.in_order(path[start:].replace(os.sep, "/") for path in files)
    return Found([os.path.join(folder, path) for path in below], dict(passed_over))


def entries(folder: str | os.PathLike) -> dict[str, list[str]]:
    """Returns the sorted names of a folder's entries by kind.

    Kinds are FOLDER, IMAGE and, for entries that are passed over, the extension or the reason.

    Raises:
      OSError: the folder cannot be read.
    """
    kinds = collections.defaultdict(list)
    with os.scandir(folder) as found:
        for entry in found:
            kinds[_kind(entry)].append(entry.name)
    return {kind: names.in_order(found) for kind, found in sorted(kinds.items())}


def merge(tallies: Iterable[Mapping[str, list[str]]]) -> dict[str, list[str]]:
    """Merges tallies: for each kind, the paths of all of them."""
    merged = collections.defaultdict(list)
    for tally in tallies:
        for kind, paths in tally.items():
            merged[kind] += paths
    return dict(merged)


def passed_over(tally: Mapping[str, list[str]], root: str | os.PathLike) -> str:
    """Formats a tally: 'passed over: 12 .heic (first: cat/1.heic), 3 hidden (…)'; '' if empty."""
    if not tally:
        return ""
    kinds = sorted(tally, key=lambda kind: (-len(tally[kind]), kind))
    said = [
        f"{len(tally[kind]):,} {names.text(kind)} (first: {relative(tally[kind][0], root)})"
        for kind in kinds[:_KINDS_NAMED]
    ]
    if rest := kinds[_KINDS_NAMED:]:
        said.append(f"{sum(len(tally[kind]) for kind in rest):,} of other kinds")
    return f"passed over: {', '.join(said)}"


def relative(path: str | os.PathLike, root: str | os.PathLike) -> str:
    """Returns a path relative to `root` as text."""
    return names.text(os.path.relpath(path, root))


def _kind(entry: os.DirEntry) -> str:
    if entry.name.lower() in _SYSTEM:
        return SYSTEM
    if entry.name.startswith("."):
        return HIDDEN
    try:
        if entry.is_dir():
            return FOLDER
        if not entry.is_file():  # reading a pipe would block
            return "broken link" if entry.is_symlink() else "not a regular file"
    except OSError:  # a link to itself, or a folder without permission
        return "unreadable"
    extension = os.path.splitext(entry.name)[1].lower()
    return IMAGE if extension in EXTENSIONS else extension or "without an extension"

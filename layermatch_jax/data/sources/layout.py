"""Finds the folders of a data set: training, test and unlabeled images, and the classes."""

import os
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from layermatch_jax.data.images import wants_test_images
from layermatch_jax.data.sources import listing, names
from layermatch_jax.errors import InputError

EXPECTED = (
    "Expected: ROOT/train/CLASS/*.jpg, at any depth below CLASS, and optionally"
    " ROOT/test/CLASS/*.jpg (or ROOT/val/...) and ROOT/unlabeled/*.jpg; image files end in "
    + ", ".join(listing.EXTENSIONS)
    + ". Set --config.dataset.data_dir to ROOT."
)
# Name of a folder in the root, in lower case -> its part of the data set.
_PARTS = {name: name for name in ("train", "test", "val", "unlabeled")} | {
    "unlabelled": "unlabeled"
}


class Layout(NamedTuple):
    """The folders of a data set."""

    root: Path
    class_names: tuple[str, ...]  # as text, in the order of their labels
    train: tuple[str, ...]  # the folder of each class
    test: tuple[str | None, ...]  # the same, or None; () if no test images are needed
    unlabeled: str | None
    passed_over: dict[str, list[str]]  # outside the class folders, kind -> paths: see `listing`
    notes: tuple[str, ...]  # sentences for the user on what is not used


class _ClassFolders(NamedTuple):
    path: Path  # such as train/
    by_name: dict[str, str]  # name as text -> path on the disk, sorted by name
    passed_over: dict[str, list[str]]


def read(dataset: ConfigDict) -> Layout:
    """Finds the parts below the root and the folders of the classes; see `folder.load`.

    Case does not matter in the names of the parts. Test folders are read only if test images are
    needed.

    Raises:
      InputError: a part is missing, occurs twice or has no class folders; training and test classes
        do not match; or there are fewer than two classes.
    """
    root = Path(dataset.data_dir).expanduser()
    if not dataset.data_dir or not root.is_dir():
        raise InputError(
            f"Data set 'folder': --config.dataset.data_dir={dataset.data_dir!r} is not a folder."
            f" {EXPECTED}"
        )
    there = _entries(root)
    parts = _parts(root, there.get(listing.FOLDER, []))
    if "train" not in parts:
        raise _missing(root / "train", there)
    train = _class_folders(parts["train"])
    if not train.by_name:
        raise InputError(f"{train.path} has no class folders. {EXPECTED}")
    class_names, notes = list(train.by_name), []
    if no_classes := [
        name
        for kind in (listing.HIDDEN, listing.SYSTEM)
        for path in train.passed_over.get(kind, [])
        if os.path.isdir(path) and (name := os.path.basename(path))
    ]:
        notes.append(f"folders that do not count as classes: {names.some(no_classes)}")
    if dataset.class_list:
        class_names = names.read_class_list(dataset.class_list)
        _require_folders(class_names, train, dataset.class_list)
        if unlisted := [name for name in train.by_name if name not in class_names]:
            notes.append(f"not used, because not in the class list: {names.some(unlisted)}")
            if any(name.startswith("#") for name in unlisted):
                notes.append("lines of the class list that begin with # are comments")
    if len(class_names) < 2:
        raise _too_few(train, dataset.class_list)

    test = None
    if wants_test_images(dataset) or dataset.drop_test_duplicates:
        candidates = [parts[part] for part in ("test", "val") if part in parts]
        if not candidates:
            without = (
                " Without test images, set --config.dataset.evaluate_on=cross_validation and"
                " --config.dataset.drop_test_duplicates=False."
            )
            raise _missing(root / "test", there, without)
        test = _with_classes(candidates, class_names)
        if test.path != candidates[0]:
            flat = candidates[0].name
            notes.append(f"the test images are in {test.path.name}/: {flat}/ has no class folders")
        if not dataset.class_list:
            _require_folders(list(test.by_name), train, test.path)

        elif unlisted := [n for n in test.by_name if n not in {*class_names, *train.by_name}]:
            notes.append(
                f"folders in {test.path.name}/ that are not in the class list:"
                f" {names.some(unlisted)}"
            )

    used = {train.path, test and test.path, parts.get("unlabeled")}
    unused = [
        f"{name}/" if kind == listing.FOLDER else name
        for kind, found in there.items()
        if kind not in (listing.HIDDEN, listing.SYSTEM)
        for name in found
        if root / name not in used
    ]
    if unused:
        notes.append(f"not used, in {names.text(str(root))}: {names.some(unused)}")
    return Layout(
        root=root,
        class_names=tuple(class_names),
        train=tuple(train.by_name[name] for name in class_names),
        test=tuple(map(test.by_name.get, class_names)) if test else (),
        unlabeled=str(parts["unlabeled"]) if "unlabeled" in parts else None,
        passed_over=listing.merge(
            [
                {
                    kind: [os.path.join(root, name) for name in there[kind]]
                    for kind in (listing.HIDDEN, listing.SYSTEM)
                    if kind in there
                },
                *(part.passed_over for part in (train, test) if part),
            ]
        ),
        notes=tuple(notes),
    )


def _parts(root: Path, folders: list[str]) -> dict[str, Path]:
    parts = {}
    for name in folders:
        part = _PARTS.get(name.lower())
        if part in parts:
            raise InputError(
                f"{root} has two folders of {part} images, {parts[part].name} and {name}. Keep one"
                " of them."
            )
        if part:
            parts[part] = root / name
    return parts


def _with_classes(candidates: list[Path], class_names: list[str]) -> _ClassFolders:
    """Returns the first candidate with a class folder; test/ may be flat, without labels."""
    found = [_class_folders(folder) for folder in candidates]
    for folders in found:
        if folders.by_name.keys() & class_names:
            return folders
    has = names.some([f"{name}/" for name in found[0].by_name]) or "none"
    up = ""
    for name, path in found[0].by_name.items():
        if _class_folders(path).by_name.keys() & class_names:
            up = f" The class folders seem to be inside {name}/: move them up."
    raise InputError(
        f"{candidates[0]} has no folder with the name of a training class; its folders: {has}.{up}"
        f" {EXPECTED}"
    )


def _class_folders(folder: str | os.PathLike) -> _ClassFolders:
    there = _entries(folder)
    by_name = {}
    for name in there.pop(listing.FOLDER, []):
        if names.text(name) in by_name:
            raise InputError(
                f"{names.text(str(folder))} has two folders with the name {names.text(name)}, in"
                " different bytes. Merge or rename them (`ls -b` shows the bytes)."
            )
        by_name[names.text(name)] = os.path.join(folder, name)
    if listing.IMAGE in there:
        there["outside the class folders"] = there.pop(listing.IMAGE)
    passed_over = {
        kind: [os.path.join(folder, name) for name in found] for kind, found in there.items()
    }
    return _ClassFolders(Path(folder), by_name, passed_over)


def _require_folders(wanted: list[str], train: _ClassFolders, source: str | os.PathLike) -> None:
    missing = [name for name in wanted if name not in train.by_name]
    if missing:
        raise InputError(
            f"{len(missing)} of the classes in {source} have no folder in {train.path}:"
            f" {names.some(missing)}. Every class needs training images: add them, or remove the"
            f" class from {source}."
        )


def _too_few(train: _ClassFolders, class_list: str) -> InputError:
    """Makes the error for a data set of one class; says whether the classes lie one level lower."""
    if class_list:
        return InputError(
            f"The class list {class_list} names only one class. It needs two or more."
        )
    ((name, path),) = train.by_name.items()
    folder, inside = train.path, list(_class_folders(path).by_name)
    if len(inside) > 1:
        return InputError(
            f"{folder} has one folder, {name}, and the class folders seem to be inside it:"
            f" {names.some(inside)}. Move them up, to {folder / inside[0]} and so on, and do the"
            f" same in the test folder. {EXPECTED}"
        )
    return InputError(
        f"{folder} has only one class folder, {name}. At least two are needed. {EXPECTED}"
    )


def _missing(folder: Path, there: dict[str, list[str]], mend: str = "") -> InputError:
    has = names.some([name for found in there.values() for name in found]) or "nothing"
    return InputError(f"{folder} is missing; {folder.parent} contains: {has}. {EXPECTED}{mend}")


def _entries(folder: str | os.PathLike) -> dict[str, list[str]]:
    try:
        return listing.entries(folder)
    except OSError as error:
        raise InputError(
            f"The folder {names.text(str(folder))} cannot be read ({error.strerror}). {EXPECTED}"
        ) from error

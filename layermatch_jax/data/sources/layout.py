"""Which folders below the root of an image folder hold what."""

import os
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from layermatch_jax.data.sources import listing, names
from layermatch_jax.errors import InputError

EXPECTED = (
    "Expected: ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg (or ROOT/val/...; neither is"
    " needed with --config.dataset.evaluate_on=validation), at any depth below CLASS, and if you"
    " like ROOT/unlabeled/*.jpg; image files end in "
    + ", ".join(listing.EXTENSIONS)
    + ". Set --config.dataset.data_dir to ROOT."
)
# Name of a folder in the root, in small letters -> the part of the data set that it holds.
_PARTS = {name: name for name in ("train", "test", "val", "unlabeled")} | {
    "unlabelled": "unlabeled"
}


class Layout(NamedTuple):
    """The folders of a data set."""

    root: Path
    class_names: tuple[str, ...]  # as text, in the order of their labels
    train: tuple[str, ...]  # the folder of each class
    test: tuple[str | None, ...]  # likewise, None for a class without one; () if nothing is needed
    unlabeled: str | None
    passed_over: dict[str, list[str]]  # beside the class folders, kind -> paths: see `listing`
    notes: tuple[str, ...]  # sentences for the user: what is there and not used


class _ClassFolders(NamedTuple):
    path: Path  # train/, say
    by_name: dict[str, str]  # name as text -> path on the disk, sorted by name
    passed_over: dict[str, list[str]]


def read(dataset: ConfigDict) -> Layout:
    """Finds the parts below the root and the folders of the classes; see `folder.load`.

    Capital and small letters are one in the names of the parts. Test folders are left alone if
    nothing needs test images.

    Raises:
      InputError: a part is missing, is there twice, or has no class folders; the classes do not fit
        together or are fewer than two.
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
        notes.append(f"folders that are no classes, by their names: {names.some(no_classes)}")
    if dataset.class_list:
        class_names = names.read_class_list(dataset.class_list)
        _require_folders(class_names, train, dataset.class_list)
        if unlisted := [name for name in train.by_name if name not in class_names]:
            notes.append(f"not used, for the class list does not name them: {names.some(unlisted)}")
            if any(name.startswith("#") for name in unlisted):
                notes.append("lines of the class list that begin with # are comments")
    if len(class_names) < 2:
        raise _too_few(train, dataset.class_list)

    test = None
    if dataset.evaluate_on == "test" or dataset.drop_test_duplicates:
        candidates = [parts[part] for part in ("test", "val") if part in parts]
        if not candidates:
            raise _missing(root / "test", there)
        test = _with_classes(candidates, class_names)
        if test.path != candidates[0]:
            flat = candidates[0].name
            notes.append(
                f"test images are those of {test.path.name}/: {flat}/ has no class folders"
            )
        if not dataset.class_list:
            _require_folders(list(test.by_name), train, test.path)

        elif unlisted := [n for n in test.by_name if n not in {*class_names, *train.by_name}]:
            notes.append(f"no classes of the list, in {test.path.name}/: {names.some(unlisted)}")

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
                f"{root} has two folders for its {part} images, {parts[part].name} and {name}:"
                " keep one of them."
            )
        if part:
            parts[part] = root / name
    return parts


def _with_classes(candidates: list[Path], class_names: list[str]) -> _ClassFolders:
    """The first that has a folder of a class: test/ may be flat, without labels, and val/ not."""
    found = [_class_folders(folder) for folder in candidates]
    for folders in found:
        if folders.by_name.keys() & class_names:
            return folders
    has = names.some([f"{name}/" for name in found[0].by_name]) or "no folders"
    up = ""
    for name, path in found[0].by_name.items():
        if _class_folders(path).by_name.keys() & class_names:
            up = f" The class folders seem to be inside {name}/: move them up."
    raise InputError(
        f"{candidates[0]} has no folder of a class of the training images; it has {has}.{up}"
        f" {EXPECTED}"
    )


def _class_folders(folder: str | os.PathLike) -> _ClassFolders:
    there = _entries(folder)
    by_name = {}
    for name in there.pop(listing.FOLDER, []):
        if names.text(name) in by_name:
            raise InputError(
                f"{names.text(str(folder))} has two folders whose names are one text in different"
                f" bytes, {names.text(name)}: merge or rename them (`ls -b` shows the bytes)."
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
            f" {names.some(missing)}. Every class needs training images: add them, or take the"
            f" class out of {source}."
        )


def _too_few(train: _ClassFolders, class_list: str) -> InputError:
    """The error for a data set of one class; says what its one folder may be."""
    if class_list:
        return InputError(f"The class list {class_list} names one class; it takes two or more.")
    ((name, path),) = train.by_name.items()
    folder, inside = train.path, list(_class_folders(path).by_name)
    if len(inside) > 1:
        return InputError(
            f"{folder} has one folder, {name}, and the class folders seem to be inside it:"
            f" {names.some(inside)}. Move them up, to {folder / inside[0]} and so on; likewise in"
            f" the test folder. {EXPECTED}"
        )
    return InputError(f"{folder} has one class folder, {name}; it takes two or more. {EXPECTED}")


def _missing(folder: Path, there: dict[str, list[str]]) -> InputError:
    has = names.some([name for found in there.values() for name in found]) or "nothing"
    return InputError(f"{folder} is missing; {folder.parent} has {has}. {EXPECTED}")


def _entries(folder: str | os.PathLike) -> dict[str, list[str]]:
    try:
        return listing.entries(folder)
    except OSError as error:
        raise InputError(
            f"The folder {names.text(str(folder))} cannot be read ({error.strerror}). {EXPECTED}"
        ) from error

"""Which files below a folder count as images."""

import os

import pytest

from layermatch_jax.data.sources import listing


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def below(found, root):
    return [os.path.relpath(path, root) for path in found.files]


def passed_over(found, root):
    return {
        kind: [os.path.relpath(path, root) for path in paths]
        for kind, paths in found.passed_over.items()
    }


def test_ordinary_folders_have_the_order_that_they_always_had(tmp_path):
    # Sorted by code points of the path below the folder: B < a < b, "." < "/" < digits.
    order = ["B.PNG", "a-1.jpg", "a.jpg", "a/x.jpg", "a/y/z.jpeg", "a0.jpg", "b.gif", "c.webp"]
    touch(tmp_path, *reversed(order))
    found = listing.find(tmp_path)
    assert below(found, tmp_path) == order
    assert found.passed_over == {}


@pytest.mark.parametrize(
    "ending", ["tif", "TIFF", "jfif", "jpe", "ppm", "pgm", "pbm", "PNM", "Jpeg", "jp2", "avif"]
)
def test_endings(tmp_path, ending):
    touch(tmp_path, f"x.{ending}")
    assert below(listing.find(tmp_path), tmp_path) == [f"x.{ending}"]


def test_what_is_passed_over_is_named(tmp_path):
    touch(
        tmp_path,
        *("1.jpg", "2.heic", "3.HEIC", "4.jpg.part", "noext", "b.txt", "sub/._1.jpg"),
        *("@eaDir/1.jpg", "__MACOSX/x/1.jpg", "sub/Thumbs.db", ".thumbnails/1.jpg"),
    )
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    os.mkfifo(tmp_path / "pipe.jpg")
    found = listing.find(tmp_path)
    assert below(found, tmp_path) == ["1.jpg"]
    assert passed_over(found, tmp_path) == {
        ".heic": ["2.heic", "3.HEIC"],
        ".part": ["4.jpg.part"],
        ".txt": ["b.txt"],
        "without an extension": ["noext"],
        "hidden": [".thumbnails", "sub/._1.jpg"],
        "of the system (thumbnails, trash)": ["@eaDir", "__MACOSX", "sub/Thumbs.db"],
        "broken link": ["gone", "gone.jpg"],
        "unreadable": ["itself"],
        "not a regular file": ["pipe.jpg"],
    }


def test_links_are_followed(tmp_path):
    touch(tmp_path, "elsewhere/deep/1.jpg", "elsewhere/2.jpg", "files/3.jpg", "cat/4.jpg")
    (tmp_path / "cat/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "cat/5.jpg").symlink_to(tmp_path / "files/3.jpg")
    (tmp_path / "dog").symlink_to(tmp_path / "cat")
    order = ["4.jpg", "5.jpg", "link/2.jpg", "link/deep/1.jpg"]
    for name in ("cat", "dog"):
        assert below(listing.find(tmp_path / name), tmp_path / name) == order


def test_links_in_a_circle_end(tmp_path):
    touch(tmp_path, "cat/1.jpg", "cat/in/2.jpg", "dog/3.jpg")
    (tmp_path / "cat/in/again").symlink_to(tmp_path / "cat")
    (tmp_path / "cat/all").symlink_to(tmp_path)  # holds cat, and dog, which is no cat
    (tmp_path / "cat/a").symlink_to(tmp_path / "cat/in")  # sorted before the folder itself
    found = listing.find(tmp_path / "cat")
    assert below(found, tmp_path) == ["cat/1.jpg", "cat/in/2.jpg"]
    assert passed_over(found, tmp_path) == {
        "circular or repeated link": ["cat/a", "cat/all", "cat/in/again"]
    }


def test_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    touch(tmp_path, "1.jpg", "secret/2.jpg")
    scandir = os.scandir

    def refuse(path):  # tests that run as root have all permissions
        if os.path.basename(path) == "secret":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = listing.find(tmp_path)
    assert below(found, tmp_path) == ["1.jpg"]
    assert passed_over(found, tmp_path) == {"unreadable": ["secret"]}


def test_names_of_any_bytes(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    touch(tmp_path, name, "caf\u00e9.jpg")
    found = listing.find(tmp_path)
    assert found.files == [str(tmp_path / name), str(tmp_path / "caf\u00e9.jpg")]


@pytest.mark.parametrize(
    "name", ["@eaDir", "@Recycle", "@Recently-Snapshot", "~snapshot", "#recycle", "__MACOSX"]
)
def test_folders_of_file_servers_do_not_count(name, tmp_path):
    touch(tmp_path, "1.jpg")
    (tmp_path / name).mkdir()
    touch(tmp_path / name, "1.jpg")
    found = listing.find(tmp_path)
    assert below(found, tmp_path) == ["1.jpg"]
    assert passed_over(found, tmp_path) == {"of the system (thumbnails, trash)": [name]}


def test_the_sentence():
    tally = {".heic": ["/r/a/1.heic", "/r/a/2.heic"], "hidden": ["/r/.x"]}
    assert listing.passed_over(tally, "/r") == (
        "passed over: 2 .heic (first: a/1.heic), 1 hidden (first: .x)"
    )
    assert listing.passed_over({}, "/r") == ""
    many = {f".{number}": [f"/r/{number}"] for number in range(10, 42)}
    assert listing.passed_over(many, "/r").endswith("1 .39 (first: 39), 2 of other kinds")
    assert listing.merge([{"a": ["1"]}, {}, {"b": ["2"], "a": ["3"]}]) == {
        "a": ["1", "3"],
        "b": ["2"],
    }

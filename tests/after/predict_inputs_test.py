"""The images that --images names, and their lines in the table."""

import csv
import json

import pytest
from predict_runs import make_images

from layermatch_jax.after.predict import inputs, lines
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files


def shown(found):
    return [found.shown(n) for n in range(len(found.paths))]


def test_a_folder(tmp_path):
    for name in ("b/2.JPG", "b/10.png", "a.webp", "b/.hidden.png", "notes.md", "b/deep/x.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = inputs.find(str(tmp_path))
    assert shown(found) == ["a.webp", "b/10.png", "b/2.JPG", "b/deep/x.tiff"]
    assert found.path(1) == str(tmp_path / "b" / "10.png")
    assert found.note == ("passed over: 1 .md (first: notes.md), 1 hidden (first: b/.hidden.png)")
    (tmp_path / "a.webp").rename(tmp_path / "c.webp")
    assert inputs.find(str(tmp_path)).sha256() != found.sha256()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list(tmp_path, encoding, monkeypatch):
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "list.TXT"
    path.write_bytes("1.png\r\n\r\n../ü, b.png\n/abs/x.png".encode(encoding))
    monkeypatch.chdir(tmp_path)
    for name in (str(path), "sub/list.TXT"):
        found = inputs.find(name)
        assert shown(found) == ["1.png", "../ü, b.png", "/abs/x.png"]
        assert found.path(1) == f"{name[: -len('list.TXT')]}../ü, b.png"
        assert found.path(2) == "/abs/x.png"
        assert found.note == "passed over: empty lines (1)"


def test_a_list_ends_with_a_line_end(tmp_path):
    (tmp_path / "list.txt").write_text("a.png\n")
    assert inputs.find(str(tmp_path / "list.txt")) == inputs.Inputs(str(tmp_path), ["a.png"], "")


def test_names_of_any_bytes(tmp_path):
    """A line break, Latin-1, decomposed Unicode, a quote: one line each, found by its path."""
    odd = ["a\nb.png", "caf\udce9.png", "u\u0308.png", 'say "x".png', "\u2028.png"]
    for name in odd:
        (tmp_path / name).touch()
    found = inputs.find(str(tmp_path))
    assert sorted(found.paths) == sorted(odd)
    assert sorted(shown(found)) == sorted(
        [r"a\nb.png", r"caf\xe9.png", "u\u0308.png", 'say "x".png', r"\u2028.png"]
    )
    for form in lines.FORMS.values():
        for name in shown(found):
            row = lines.Row(name, ("a, b",), (0.5,), 0.25)
            assert form.line(row, 1).count("\n") == 1
            assert form.row(form.line(row, 1)).path == name
            assert form.row(form.line(row, 1)).classes == ("a, b",)
            broken = lines.Row(name, error="it, too, is 'broken'")
            assert form.row(form.line(broken, 3)) == broken


def test_files(tmp_path, monkeypatch):
    make_images(tmp_path, 2)
    (tmp_path / "000.png").rename(tmp_path / "a, b.png")
    monkeypatch.chdir(tmp_path)
    assert inputs.find("001.png,a, b.png").paths == ["001.png", "a, b.png"]
    assert inputs.find("a, b.png").paths == ["a, b.png"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert inputs.find("~/001.png").paths == [str(tmp_path / "001.png")]


def test_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \r\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.heic").touch()
    (tmp_path / "a.png").touch()
    for images, told in (
        ("", "--images is needed"),
        ("none", "none does not exist. Use a folder, a text file"),
        ("a.png,b.png", "b.png does not exist"),
        ("a.png,folder", "folder cannot be combined"),
        ("folder,a.png", "folder cannot be combined"),
        ("empty.txt,a.png", "empty.txt cannot be combined"),
        ("empty.txt", "--images=empty.txt is empty"),
        (
            "folder",
            r"the folder has no images. passed over: 1 .heic \(first: x.heic\). Files count",
        ),
    ):
        with pytest.raises(InputError, match=told):
            inputs.find(images)


def test_lines_of_csv():
    form = lines.FORMS[".csv"]
    row = lines.Row("a, b.png", ("dog", "cat"), (0.75, 1e-9), 0.5623351446188083)
    content = form.header(2) + form.line(row, 2) + form.line(lines.Row("x", error="empty"), 2)
    assert content == (
        "path,class,probability,class_2,probability_2,entropy,error\n"
        '"a, b.png",dog,0.75,cat,1e-09,0.562335,\n'
        "x,,,,,,empty\n"
    )
    assert next(csv.DictReader(content.splitlines()))["path"] == "a, b.png"


def test_lines_of_json():
    form = lines.FORMS[".jsonl"]
    assert form.header(2) == ""
    row = lines.Row("ü.png", ("dog", "cat"), (0.75, 0.25), 0.5623351446188083)
    told = {"path": "ü.png", "class": "dog", "probability": 0.75, "entropy": 0.562335}
    pairs = [{"class": "dog", "probability": 0.75}, {"class": "cat", "probability": 0.25}]
    assert json.loads(form.line(row, 2)) == told | {"top": pairs}
    row = row._replace(classes=("dog",), probabilities=(0.75,))
    assert json.loads(form.line(row, 1)) == told


@pytest.mark.parametrize(
    ("names", "pieces"),
    [
        ("a,b", ["a", "b"]),
        ("x,y", ["x,y"]),
        ("a,x,y,b,,c,", ["a", "x,y", "b", "c"]),
        ("", []),
    ],
)
def test_commas_separate_but_within_names(names, pieces):
    assert files.separate(names, lambda name: name in ("x,y", "a")) == pieces

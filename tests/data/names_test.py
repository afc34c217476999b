"""Names as the disk has them, and as text."""

import os

import pytest

from layermatch_jax.data.sources import names
from layermatch_jax.errors import InputError


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("owl 2.jpg", "owl 2.jpg"),
        ("A\u0308pfel", "\u00c4pfel"),
        ("\u00c4pfel", "\u00c4pfel"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        (os.fsdecode(b"\xc4pfel/\xff"), r"\xc4pfel/\xff"),
        ("two\nlines\ttab", r"two\nlines\ttab"),
        ("\u732b", "\u732b"),
    ],
)
def test_text(name, text):
    assert names.text(name) == text
    text.encode("utf-8")  # valid: can be written into any file


def test_in_order_is_the_same_for_both_unicode_forms():
    composed = ["Z", "\u00c4", "a", "e\u00e9", "ef"]
    decomposed = ["Z", "A\u0308", "a", "ee\u0301", "ef"]
    order = ["Z", "a", "ef", "e\u00e9", "\u00c4"]  # by code point: Z 5a, a 61, f 66, é e9
    assert names.in_order(composed) == order
    assert [names.text(name) for name in names.in_order(decomposed)] == order


def test_some():
    assert names.some(["a", "b"]) == "a, b"
    assert names.some([*"abcde"]) == "a, b, c, d, e"
    assert names.some([*"abcdefg"]) == "a, b, c, d, e, and 2 more"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfcat\n# comment\n\n  A\xcc\x88pfel \n",  # byte-order mark, NFD
        "cat\r\nÄpfel\r\n".encode("utf-8-sig"),
        "cat\nÄpfel\n".encode("utf-16"),
    ],
)
def test_class_list(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    assert names.read_class_list(str(tmp_path / "list.txt")) == ["cat", "\u00c4pfel"]


def test_class_list_in_latin_1_fits_folders_in_latin_1(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"caf\xe9\n")
    assert names.read_class_list(str(tmp_path / "list.txt")) == [
        names.text(os.fsdecode(b"caf\xe9"))
    ]


def test_class_list_that_names_a_class_in_both_unicode_forms(tmp_path):
    (tmp_path / "list.txt").write_text("\u00c4\nA\u0308\n", encoding="utf-8")
    with pytest.raises(InputError, match="repeats \u00c4"):
        names.read_class_list(str(tmp_path / "list.txt"))

"""Image folders with odd layouts, names and files. Nothing is left out without a note."""

import json
import os

import numpy as np
import pytest
from image_builders import all_of, noise, settings, write
from PIL import Image

from layermatch_jax.data import sources, splits
from layermatch_jax.data.sources import checking
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files

LATIN_1 = os.fsdecode(b"caf\xe9")


@pytest.fixture
def root(tmp_path):
    """Two classes with two training and one test image each, 8 px, lossless."""
    for name in ("owl", "cat"):
        for file in ("train/{}/1.png", "train/{}/0.png", "test/{}/0.png"):
            write(tmp_path / file.format(name), noise(8, 8, 3))
    return tmp_path


def load(root, **changed):
    return sources.load(settings("folder", root, **changed))


def refusal(root, **changed):
    with pytest.raises(InputError) as caught:
        load(root, **changed)
    return str(caught.value)


def test_nothing_to_say_of_an_ordinary_folder(root):
    assert load(root).notes == ()


def test_what_is_passed_over_is_in_the_notes(root):
    for path in ("train/cat/2.heic", "train/9.png", "test/owl/notes.txt", "unlabeled/@eaDir/1.png"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    write(root / "unlabeled/1.png", noise(8, 8, 3))
    (root / "train/fox").symlink_to(root / "nowhere")  # a class on a disk that is not mounted
    (note,) = load(root).notes
    assert note == (
        "passed over: 1 .heic (first: train/cat/2.heic), 1 .txt (first: test/owl/notes.txt), "
        "1 broken link (first: train/fox), "
        "1 of the system (thumbnails, trash) (first: unlabeled/@eaDir), "
        "1 outside the class folders (first: train/9.png)"
    )


def test_where_nothing_is_found_it_says_what_was_passed_over(root):
    for name in ("0", "1"):
        (root / f"train/cat/{name}.png").rename(root / f"train/cat/{name}.heic")
    said = refusal(root)
    assert f"{root} has no training images of: cat. passed over: 2 .heic" in said


@pytest.mark.parametrize("name", ["unlabeled", "unlabelled", "Unlabeled", "UNLABELLED"])
def test_spellings_of_unlabeled(root, name):
    extra = write(root / name / "x.png", noise(8, 8, 3))
    made = load(root)
    np.testing.assert_array_equal(all_of(made.unlabeled), [extra])
    assert made.notes == ()


def test_capital_letters_in_the_names_of_the_parts(root):
    made = load(root)
    before = all_of(made.train), all_of(made.test)
    (root / "train").rename(root / "Train")
    (root / "test").rename(root / "VAL")
    made = load(root)
    np.testing.assert_array_equal(all_of(made.train), before[0])
    np.testing.assert_array_equal(all_of(made.test), before[1])


def test_two_folders_for_one_part(root):
    (root / "unlabeled").mkdir()
    (root / "unlabelled").mkdir()
    assert "two folders of unlabeled images, unlabeled and unlabelled" in refusal(root)


def test_what_else_is_in_the_root_is_named(root):
    write(root / "val/cat/0.png", noise(8, 8, 3))
    write(root / "unlabeled_images/0.png", noise(8, 8, 3))
    (root / "labels.csv").touch()
    (root / ".git").mkdir()
    assert load(root).notes == (
        f"not used, in {root}: labels.csv, unlabeled_images/, val/",
        "passed over: 1 hidden (first: .git)",
    )


def test_an_image_of_two_classes_or_twice_in_one(root):
    (root / "train/cat/others").symlink_to(root / "train/owl")
    (root / "train/cat/again.png").symlink_to(root / "train/cat/0.png")
    owls = len(list((root / "train/owl").iterdir()))
    notes = load(root).notes
    assert notes[0].startswith(
        f"training images in more than one class, by links: {owls} (first: train/cat/others/"
    )
    assert notes[1].startswith(
        f"training or unlabeled images that count again, by links: {owls + 1} (first: train/"
    )


def test_a_class_inside_another_counts_as_the_outer_one(root):
    write(root / "train/cat/owl/0.png", noise(8, 8, 3))
    assert load(root).notes == (
        "images in a folder that lies inside one class and has the name of another; they count as"
        " the outer class: 1 (first: train/cat/owl/0.png counts as cat)",
    )


def test_folders_that_are_no_classes_are_named(root):
    for name in (".night", "@Recycle", "lost+found"):
        write(root / "train" / name / "0.png", noise(8, 8, 3))
    notes = load(root).notes
    assert notes[0] == "folders that do not count as classes: .night, @Recycle, lost+found"


def test_test_classes_too_deep_are_explained(root):
    (root / "test").rename(root / "images")
    (root / "test").mkdir()
    (root / "images").rename(root / "test/images")
    assert "The class folders seem to be inside images/: move them up." in refusal(root)


def test_comments_and_test_folders_beside_the_class_list(root, tmp_path_factory):
    write(root / "train/#a/0.png", noise(8, 8, 3))
    write(root / "test/zzz/0.png", noise(8, 8, 3))
    listed = tmp_path_factory.mktemp("list") / "list.txt"
    listed.write_text("#a\nowl\ncat\n")
    assert load(root, class_list=str(listed)).notes == (
        "not used, because not in the class list: #a",
        "lines of the class list that begin with # are comments",
        "folders in test/ that are not in the class list: zzz",
    )


@pytest.mark.parametrize("flat", ["0.png", "images/0.png"])
def test_a_flat_test_folder_beside_a_good_val(root, flat):
    (root / "test").rename(root / "val")
    write(root / "test" / flat, noise(8, 8, 3))
    made = load(root)
    assert made.test.labels.tolist() == [0, 1]
    assert made.notes[0] == "the test images are in val/: test/ has no class folders"


def test_test_images_in_no_class_folder(root):
    (root / "test").rename(root / "elsewhere")
    write(root / "test/images/0.png", noise(8, 8, 3))
    write(root / "test/1.png", noise(8, 8, 3))
    said = refusal(root)
    assert "test has no folder with the name of a training class; its folders: images/. " in said


def test_without_a_test_folder_validation_images_serve(root):
    for name in ("0.png", "cat", "owl"):
        path = root / "test" / name
        if path.is_dir():
            (path / "0.png").unlink()
            path.rmdir()
    (root / "test").rmdir()
    assert "test is missing; " in refusal(root)
    for i in range(2, 9):
        write(root / f"train/cat/{i}.png", noise(8, 8, 3))
    dataset = settings(
        "folder", root, evaluate_on="validation", num_labels=2, label_fraction=0.0,
        label_seed=0, split_file="", labeled_in_unlabeled=True,
    )  # fmt: skip
    made = sources.load(dataset)
    assert len(made.test.labels) == 0
    assert made.test.read(np.zeros(0, int)).shape == (0, 8, 8, 3)
    # 11 training images, 2 of them labeled; a fifth of the other 9, rounded.
    assert len(splits.partition(made, dataset).evaluation.labels) == 2


def test_one_class_is_refused(root, tmp_path):
    (root / "train/owl").rename(root / "owl")
    (root / "test/owl").rename(root / "owl2")
    assert "train has only one class folder, cat. At least two are needed" in refusal(root)
    (root / "list.txt").write_text("cat")
    assert "names only one class" in refusal(root, class_list=str(root / "list.txt"))


def test_class_folders_a_level_too_deep_are_explained(root):
    for part in ("train", "test"):
        (root / part).rename(root / "images")
        (root / part).mkdir()
        (root / "images").rename(root / part / "images")
    said = refusal(root)
    assert (
        "train has one folder, images, and the class folders seem to be inside it: cat, owl" in said
    )
    assert f"Move them up, to {root}/train/cat and so on" in said


def test_class_folders_that_the_list_leaves_out_are_named(root):
    write(root / "train/fox/0.png", noise(8, 8, 3))
    (root / "list.txt").write_text("owl\ncat\n")
    notes = load(root, class_list=str(root / "list.txt")).notes
    assert notes[0] == "not used, because not in the class list: fox"


def test_the_two_unicode_forms_of_a_class_are_one(root):
    (root / "train/owl").rename(root / "train/A\u0308pfel")  # as a Mac writes it
    (root / "test/owl").rename(root / "test/\u00c4pfel")
    made = load(root)
    assert made.class_names == ("cat", "\u00c4pfel")
    assert made.test.labels.tolist() == [0, 1]
    assert "A\u0308pfel" in made.train.files[2]  # as the disk has it
    (root / "list.txt").write_text("\ufeff\u00c4pfel\ncat\n", encoding="utf-8")
    listed = load(root, class_list=str(root / "list.txt"))
    assert listed.class_names == ("\u00c4pfel", "cat")
    (root / "train/\u00c4pfel").mkdir()
    assert "two folders with the name \u00c4pfel, in different bytes" in refusal(root)


def test_names_that_are_no_utf_8(root):
    for part in ("train", "test"):
        (root / part / "owl").rename(root / part / LATIN_1)
    odd = root / "train" / LATIN_1 / f"{LATIN_1}.png"
    pixels = write(odd, noise(8, 8, 3))
    made = load(root)
    assert made.class_names == (r"caf\xe9", "cat")
    assert made.train.labels.tolist() == [0, 0, 0, 1, 1]
    np.testing.assert_array_equal(made.train.read(np.array([2]))[0], pixels)
    files.write_json(root / "x.json", made.class_names)
    assert json.loads((root / "x.json").read_text()) == [r"caf\xe9", "cat"]
    uncached = load(root, cache_dir="none")
    odd.write_bytes(b"")
    said = refusal(root)
    assert r"train/caf\xe9/caf\xe9.png (" in said
    said.encode("utf-8")
    with pytest.raises(InputError, match=r"caf\\xe9\.png"):
        uncached.train.read(np.array([2]))


def test_test_images_that_are_trained_on_are_named(root):
    os.link(root / "test/owl/0.png", root / "train/owl/2.png")
    (root / "unlabeled").mkdir()
    (root / "unlabeled/0.png").symlink_to(root / "test/cat/0.png")
    assert load(root).notes == (
        "test images that are also training or unlabeled images: 2 (first: test/cat/0.png)",
    )


def broken_images(root):
    """Four broken images in all parts; the paths."""
    paths = ["train/cat/0.png", "train/owl/1.png", "test/cat/1.png", "unlabeled/1.png"]
    write(root / "unlabeled/0.png", noise(8, 8, 3))
    whole = (root / "train/cat/0.png").read_bytes()
    contents = (b"", b"\x89PNG\r\n\x1a\n", whole[:-60], b"<html>")
    for path, content in zip(paths, contents, strict=True):
        (root / path).write_bytes(content)
    return paths


def test_all_broken_images_are_named_at_once(root):
    paths = broken_images(root)
    first, *lines, last = refusal(root).split("\n")
    assert first == "4 of 9 images cannot be decoded:"
    assert [line.split(" (")[0] for line in lines] == [f"  {root / path}" for path in paths]
    assert all(line.endswith(")") for line in lines)
    assert "truncated" in lines[2]
    assert "--config.dataset.on_broken=skip" in last


def test_broken_images_can_be_left_out(root):
    paths = broken_images(root)
    made = load(root, on_broken="skip")
    assert [os.path.relpath(path, root) for path in made.train.files] == [
        "train/cat/1.png",
        "train/owl/0.png",
    ]
    assert made.train.labels.tolist() == [0, 1]
    assert made.test.labels.tolist() == [0, 1]
    assert len(made.unlabeled.labels) == 1
    first, *lines = made.notes[-1].split("\n")
    assert first == "left out: 4 of 9 images cannot be decoded:"
    assert [line.split(" (")[0] for line in lines] == [f"  {root / path}" for path in paths]
    assert all_of(made.train).shape == (2, 8, 8, 3)


def test_a_class_whose_images_are_all_broken_is_no_class(root):
    for name in ("0", "1"):
        (root / f"train/cat/{name}.png").write_bytes(b"")
    said = refusal(root, on_broken="skip")
    assert f"{root} has no training images of: cat. left out: 2 of 6 images" in said


def test_an_image_that_breaks_later_is_named(root):
    made = load(root, cache_dir="none")
    (root / "train/cat/0.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"train/cat/0\.png.*Restore the original file"):
        made.train.read(np.array([1, 0]))
    assert made.train.read(np.array([1, 2])).shape == (2, 8, 8, 3)


def test_many_broken_images_are_counted():
    lines = checking.as_lines({f"{i}.png": "why" for i in range(103)}).split("\n")
    assert lines[0] == "  0.png (why)"
    assert lines[99:] == ["  99.png (why)", "  and 3 more"]


def test_alpha_is_as_set_and_said(root):
    pixels = np.zeros((8, 8, 4), np.uint8)
    write(root / "train/cat/0.png", pixels)
    for alpha, color, said in (("white", 255, "become white"), ("drop", 0, "become opaque")):
        made = load(root, alpha=alpha)
        assert np.unique(made.train.read(np.array([0]))).tolist() == [color]
        assert made.notes == (
            f"transparent pixels {said} (dataset.alpha={alpha}) in 1 of 6 images "
            f"(first: {root}/train/cat/0.png)",
        )


def test_a_long_check_tells_how_far_it_is_and_is_not_repeated(
    root, tmp_path_factory, monkeypatch, capsys
):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(checking, "_QUIET", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    examined = []
    examine = checking.decoding.examine

    def count(path, side, alpha):
        examined.append(path)
        return examine(path, side, alpha)

    monkeypatch.setattr(checking.decoding, "examine", count)
    write(root / "train/cat/0.png", np.zeros((8, 8, 4), np.uint8))
    first = load(root, cache_dir="none").notes
    assert len(examined) == 6
    err = capsys.readouterr().err
    assert "checking images: 4 of 6 decoded" in err
    assert "checking images: 6 of 6 decoded, 0 s left\n" in err

    assert load(root, cache_dir="none").notes == (*first, "an earlier start found no broken image")
    assert len(examined) == 6
    load(root, alpha="drop", cache_dir="none")  # other settings need another check
    assert len(examined) == 12
    time = os.stat(root / "test/owl/0.png").st_mtime
    os.utime(root / "test/owl/0.png", (time + 1, time + 1))
    load(root, cache_dir="none")
    assert len(examined) == 18
    for path in cache.rglob("*.json"):
        path.write_text("[")  # cut off
    load(root, cache_dir="none")
    assert len(examined) == 24
    # A check that found broken images is not recorded, because they may be repaired.
    (root / "test/owl/0.png").write_bytes(b"")
    for _ in range(2):
        refusal(root, cache_dir="none")
    assert len(examined) == 36


def test_a_decompression_bomb_is_broken_not_fatal(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert "DecompressionBombError" in refusal(root)

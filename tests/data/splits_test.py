import hashlib
import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from layermatch_jax.data import splits
from layermatch_jax.data.images import Source, from_array
from layermatch_jax.errors import InputError


def settings(**changed):
    return ConfigDict(
        {
            "name": "toy",
            "num_labels": 7,
            "label_fraction": 0.0,
            "label_seed": 0,
            "split_file": "",
            "labeled_in_unlabeled": True,
            "evaluate_on": "test",
            **changed,
        }
    )


def numbered(labels, offset=0):
    """Makes images that store their position in red and green of the first pixel."""
    pixels = np.zeros((len(labels), 2, 2, 3), np.uint8)
    number = np.arange(len(labels)) + offset
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = number // 256, number % 256
    return from_array(pixels, labels)


def numbers(images):
    pixels = images.read(np.arange(len(images.labels)))[:, 0, 0].astype(int)
    return pixels[:, 0] * 256 + pixels[:, 1]


def source(train=30, classes=3, extra=0):
    return Source(
        class_names=tuple("abcdefghijklmnop"[:classes]),
        train=numbered(np.arange(train) % classes),
        unlabeled=from_array(np.full((extra, 2, 2, 3), 99, np.uint8), None) if extra else None,
        test=numbered(np.arange(6) % classes, offset=1000),
    )


# Worked out with a Philox4x64-10 and a SeedSequence written in plain Python, without NumPy.
# A change here means that published splits can no longer be made again.
@pytest.mark.parametrize(
    ("seed", "indices", "sha256", "validation"),
    [
        (
            0,
            [5, 7, 19, 21, 23, 24, 28],
            "194d0c9cada50639f250aec6055c67be84b0d090fc734801d87af6f90259ada3",
            [8, 14, 15, 20, 25],
        ),
        (
            1,
            [4, 11, 12, 13, 14, 18, 23],
            "a8f9c7e7db6bc369d6b3df6e628cd90759686c37e789d7b33362b931dd15d08c",
            [0, 1, 17, 25, 27],
        ),
    ],
)
def test_split_is_literally_this(seed, indices, sha256, validation):
    made = splits.partition(source(), settings(label_seed=seed, evaluate_on="validation"))
    assert made.record["indices"] == indices
    assert made.record["sha256"] == sha256
    assert numbers(made.labeled).tolist() == indices
    assert numbers(made.evaluation).tolist() == validation


def test_sha256_is_of_the_ascending_json_list():
    assert splits.indices_sha256([9, 2]) == hashlib.sha256(b"[2,9]").hexdigest()
    assert splits.indices_sha256(np.array([2, 9])) == hashlib.sha256(b"[2,9]").hexdigest()


@pytest.mark.parametrize("number", [10, 11, 19, 40, 57, 100])
def test_classes_share_the_labels_equally(number):
    for seed in range(3):
        data = source(train=400, classes=10)
        made = splits.partition(data, settings(num_labels=number, label_seed=seed))
        counts = np.bincount(made.labeled.labels, minlength=10)
        assert counts.sum() == number == made.record["num_labels"]
        assert counts.max() - counts.min() == (number % 10 > 0)
        assert made.record["class_counts"] == counts.tolist()
        np.testing.assert_array_equal(made.labeled.labels, numbers(made.labeled) % 10)


def test_remainder_goes_to_classes_drawn_by_the_seed():
    data = source(train=400, classes=10)
    extra = np.zeros(10)
    for seed in range(200):
        made = splits.partition(data, settings(num_labels=13, label_seed=seed))
        extra += np.array(made.record["class_counts"]) - 1
    # 3 of 10 classes get one more: 60 of 200 times each, with a standard deviation of 6.5.
    assert extra.sum() == 600
    assert np.abs(extra - 60).max() < 26


def test_every_image_is_drawn_equally_often():
    data = source(train=40, classes=2)
    times = np.zeros(40)
    for seed in range(300):
        times[
            splits.partition(data, settings(num_labels=8, label_seed=seed)).record["indices"]
        ] += 1
    # 4 of 20: 60 of 300 times, with a standard deviation of 6.9.
    assert np.abs(times - 60).max() < 28


def test_split_depends_on_data_set_number_and_seed_alone():
    def indices(**changed):
        return splits.partition(source(train=300), settings(**changed)).record["indices"]

    same = indices()
    assert same == indices(evaluate_on="validation", labeled_in_unlabeled=False)
    assert same != indices(label_seed=1)
    assert same != indices(name="other")
    data = source(train=300)._replace(test=numbered(np.zeros(50)))
    assert splits.partition(data, settings()).record["indices"] == same


def test_fewer_labels_are_part_of_more():
    data = source(train=300)
    made = [set(splits.partition(data, settings(num_labels=n)).record["indices"]) for n in (7, 20)]
    assert made[0] < made[1]


def test_unlabeled_order_and_membership():
    data = source(extra=4)
    made = splits.partition(data, settings())
    assert numbers(made.unlabeled)[:30].tolist() == list(range(30))
    # True classes are hidden for labeled images, and unknown for images without labels.
    expected = [-1 if i in made.record["indices"] else i % 3 for i in range(30)]
    assert made.unlabeled.labels.tolist() == [*expected, -1, -1, -1, -1]
    assert expected.count(-1) == 7
    np.testing.assert_array_equal(data.train.labels, np.arange(30) % 3)  # the source did not change
    assert (made.unlabeled.read(np.array([29, 30, 33]))[1:] == 99).all()
    assert made.record["num_unlabeled"] == 34
    np.testing.assert_array_equal(numbers(made.evaluation), 1000 + np.arange(6))
    assert made.record["num_evaluation"] == 6
    assert made.class_names == ("a", "b", "c")

    without = splits.partition(data, settings(labeled_in_unlabeled=False))
    labeled = set(made.record["indices"])
    assert numbers(without.unlabeled)[:-4].tolist() == [i for i in range(30) if i not in labeled]
    assert without.record["num_unlabeled"] == 27


@pytest.mark.parametrize("labeled_in_unlabeled", [True, False])
def test_validation_images_are_used_for_nothing_else(labeled_in_unlabeled):
    data = source(train=300, extra=5)
    made = splits.partition(
        data, settings(evaluate_on="validation", labeled_in_unlabeled=labeled_in_unlabeled)
    )
    labeled, evaluation = set(numbers(made.labeled)), set(numbers(made.evaluation))
    unlabeled = numbers(made.unlabeled)[:-5].tolist()
    assert len(evaluation) == 59 == made.record["num_evaluation"]  # 0.2 · (300 - 7) = 58.6
    assert not evaluation & (labeled | set(unlabeled))
    assert unlabeled == sorted(unlabeled)
    assert set(unlabeled) == set(range(300)) - evaluation - (
        set() if labeled_in_unlabeled else labeled
    )
    np.testing.assert_array_equal(made.evaluation.labels, numbers(made.evaluation) % 3)


def test_label_fraction_is_of_each_class():
    labels = np.repeat([0, 1, 2], [200, 130, 15])
    data = source()._replace(train=numbered(labels))
    made = splits.partition(data, settings(label_fraction=0.1, num_labels=-5))
    assert made.record["class_counts"] == [20, 13, 2]  # 1.5 is rounded up
    made = splits.partition(data, settings(label_fraction=0.01))
    assert made.record["class_counts"] == [2, 1, 1]  # at least one
    made = splits.partition(data, settings(label_fraction=1.0))
    assert made.record["class_counts"] == [200, 130, 15]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_labels": 0}, r"num_labels=0.*Allowed are 3\.\.30"),
        ({"num_labels": 2}, r"num_labels=2.*all 3 classes.*Allowed are 3\.\.30"),
        ({"num_labels": 31}, r"num_labels=31.*Allowed are 3\.\.30"),
        ({"label_fraction": -0.1}, r"label_fraction=-0\.1.*0 < label_fraction <= 1"),
        ({"label_fraction": 10.0}, r"label_fraction=10\.0.*0\.01 is 1 %"),
        ({"label_seed": -1}, r"label_seed=-1.*allowed are 0, 1"),
        ({"evaluate_on": "valid"}, r"'valid'.*'test' and 'validation'"),
        ({"num_labels": 30, "labeled_in_unlabeled": False}, "30 of the 30.*labeled_in_unlabeled"),
        (
            {"num_labels": 29, "evaluate_on": "validation"},
            "only 1 of 30 .*not labeled, too few.*20%",
        ),
    ],
)
def test_settings_that_cannot_be(changed, message):
    with pytest.raises(InputError, match=message):
        splits.partition(source(), settings(**changed))


def test_class_with_too_few_images():
    data = source()._replace(train=numbered(np.repeat([0, 1, 2], [20, 2, 20])))
    message = (
        r"class 'b' has 2 training images, but .*Allowed are 3\.\.6 .*42 \(all.*label_fraction"
    )
    for number in (9, 41):
        with pytest.raises(InputError, match=message):
            splits.partition(data, settings(num_labels=number))
    with pytest.raises(InputError, match=r"num_labels=43.*Allowed are 3\.\.6 .*and 42 \(all"):
        splits.partition(data, settings(num_labels=43))
    for seed in range(5):  # what the message allows can be drawn, whatever the seed
        for number in range(3, 7):
            record = splits.partition(data, settings(num_labels=number, label_seed=seed)).record
            assert sum(record["class_counts"]) == number


def test_all_images_of_uneven_classes_may_be_labeled():
    data = source()._replace(train=numbered(np.repeat([0, 1, 2], [3, 17, 5])))
    record = splits.partition(data, settings(num_labels=25)).record
    assert record["class_counts"] == [3, 17, 5]
    assert record["indices"] == list(range(25))


def test_split_file_round_trip(tmp_path):
    path = tmp_path / "labeled_split.json"
    made = splits.partition(source(), settings(evaluate_on="validation"))
    splits.write_split(made.record, str(path))
    assert json.loads(path.read_text()) == made.record

    again = splits.partition(
        source(), settings(evaluate_on="validation", split_file=str(path))
    ).record
    assert again == made.record


def test_split_file_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = splits.partition(source(), settings())
    splits.write_split(made.record, str(tmp_path / "split.json"))
    again = splits.partition(source(), settings(split_file="~/split.json"))
    assert again.record == made.record


def test_split_of_ones_own(tmp_path):
    # A split that would not be drawn, unsorted, with only the required fields.
    indices = [29, 0, 1, 2, 3, 4, 5]
    path = tmp_path / "own.json"
    sha256 = hashlib.sha256(b"[0,1,2,3,4,5,29]").hexdigest()
    path.write_text(json.dumps({"data_set": "toy", "sha256": sha256, "indices": indices}))
    made = splits.partition(source(), settings(split_file=str(path)))
    assert numbers(made.labeled).tolist() == sorted(indices) == made.record["indices"]
    assert made.record["sha256"] == sha256
    assert made.record["class_counts"] == [2, 2, 3]


def _with_hash(record, **changed):
    record = {**record, **changed}
    text = json.dumps(sorted(record["indices"]), separators=(",", ":"))
    return {**record, "sha256": hashlib.sha256(text.encode()).hexdigest()}


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda r: {**r, "indices": [6, *r["indices"][1:]]}, "sha256 194d.*was altered"),
        (lambda r: {**r, "indices": r["indices"][1:]}, "sha256 194d.*cut off"),
        (lambda r: {**r, "sha256": "0" * 64}, "sha256 0000.*194d"),
        (lambda r: {k: v for k, v in r.items() if k != "sha256"}, "lacks sha256"),
        (lambda r: [1, 2], "lacks data_set, sha256, indices"),
        (lambda r: {**r, "indices": "all"}, "not a list of whole numbers"),
        (lambda r: {**r, "indices": [1.5]}, "not a list of whole numbers"),
        (lambda r: _with_hash(r, indices=[5, 5, 19, 21, 23, 24, 28]), r"twice.*0\.\.29"),
        (lambda r: _with_hash(r, indices=[5, 7, 19, 21, 23, 24, 30]), r"index 30.*0\.\.29"),
        (lambda r: _with_hash(r, indices=[-1, 7, 19, 21, 23, 24, 28]), r"index -1.*0\.\.29"),
        (lambda r: _with_hash(r, indices=[5, 7, 19]), "3 labels, but.*ask for 7.*num_labels=3"),
        (lambda r: _with_hash(r, indices=[0, 1, 2, 3, 4, 5, 6]), r"\[2, 3, 2\].*\[3, 2, 2\]"),
        (
            lambda r: _with_hash(r, indices=[0, 1, 3, 4, 6, 7, 9], class_counts=None),
            "no label of class 'c'",
        ),
        (lambda r: {**r, "data_set": "cifar10"}, "data_set 'cifar10', but this run has 'toy'"),
        (lambda r: {**r, "num_train": 50_000}, "num_train 50000, but this run has 30"),
        (lambda r: {**r, "label_seed": 3}, "label_seed 3, but this run has 0.*set --config"),
    ],
)
def test_split_file_that_does_not_fit(tmp_path, alter, message):
    path = tmp_path / "labeled_split.json"
    record = alter(splits.partition(source(), settings()).record)
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=message) as error:
        splits.partition(source(), settings(split_file=str(path)))
    assert str(path) in str(error.value)


def test_split_file_that_cannot_be_read(tmp_path):
    for content in (None, "{", b"\xff\xfe"):
        path = tmp_path / "labeled_split.json"
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match=r"cannot be read.*labeled_split\.json"):
            splits.partition(source(), settings(split_file=str(path)))


def test_a_class_without_images_gets_no_labels():
    labels = np.array([0, 0, 0, 2, 2, 2])  # none of class 1
    pixels = np.zeros((6, 4, 4, 3), np.uint8)
    source = Source(("a", "b", "c"), from_array(pixels, labels), None, from_array(pixels, labels))
    record = splits.partition(source, settings(num_labels=4)).record
    assert record["class_counts"] == [2, 0, 2]
    with pytest.raises(InputError, match="all 2 classes"):
        splits.partition(source, settings(num_labels=1))

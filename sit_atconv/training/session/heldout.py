"""Held-out data: a part of the run's data that training does not see, or other data."""

from sit_atconv.config import Config, EvaluationConfig
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.latents import LatentDataset
from sit_atconv.data.part import hold_out
from sit_atconv.errors import InputError
from sit_atconv.models import SiT
from sit_atconv.sampling.draw import latent_shape
from sit_atconv.sampling.encoded import require_same_data
from sit_atconv.training.run.measures import HELDOUT, lower_is_better


def require_measure(config: Config) -> None:
    """Raise `InputError` for an evaluation that measures nothing, or less than its metrics, goals and loss ask for."""
    evaluation = config.evaluation
    if evaluation is not None and not evaluation.loss and evaluation.reference is None:
        raise InputError(
            "evaluation measures nothing: set evaluation.reference to what samples are compared with, evaluation.loss "
            "to true for the loss of held-out data, or evaluation to null."
        )
    if evaluation is not None and evaluation.loss and config.data.heldout is None:
        raise InputError(
            "evaluation.loss is the loss of held-out data, and there are none: set data.heldout to a share of the "
            "data, such as 0.05, or to the path of other prepared data."
        )
    if evaluation is not None and (evaluation.metrics or evaluation.goals):
        _require_measured(evaluation)


def _require_measured(evaluation: EvaluationConfig) -> None:
    """Raise `InputError` for metrics or goals of what is not measured, and when nothing tells the best checkpoint."""
    if HELDOUT in (evaluation.goals or ()) and not evaluation.loss:
        raise InputError(
            f"evaluation.goals names {HELDOUT}, which is not measured: set evaluation.loss to true, and data.heldout."
        )
    of_samples = [name for name in (*(evaluation.metrics or ()), *(evaluation.goals or ())) if name != HELDOUT]
    if of_samples and evaluation.reference is None:
        raise InputError(
            f"{of_samples[0]} is measured of samples, and none are drawn: set evaluation.reference to what they are "
            "compared with."
        )
    if evaluation.metrics and not evaluation.loss and not any(map(lower_is_better, evaluation.metrics)):
        raise InputError(
            f"Nothing tells which checkpoint is the best: evaluation.metrics holds only {', '.join(evaluation.metrics)}"
            ", for which higher is better. Add a distance, such as fid (fd_pixels with the features pixels), or "
            "evaluation.loss."
        )


def split_data(config: Config, dataset: LatentDataset) -> tuple[LatentDataset, LatentDataset | None]:
    """The data to train on, and those held out or None, from the data at data.path.

    Raises `InputError` when a share leaves nothing, or when other data cannot be opened or are those to train on.
    """
    heldout = config.data.heldout
    if heldout is None:
        return dataset, None
    if isinstance(heldout, float):
        return hold_out(dataset, heldout)
    other = open_dataset(heldout)
    if other.fingerprint() == dataset.fingerprint():
        raise InputError(
            f"data.heldout {heldout} are the data of data.path, which are trained on: give other data, or a share such "
            "as 0.05 to hold out that part of them."
        )
    return dataset, other


def require_measurable(model: SiT, heldout: LatentDataset, what: str, classes: int | None = None) -> None:
    """Raise `InputError` unless the model's loss can be computed on held-out data, called `what`.

    `classes`: how many classes the data have that the model is trained on, where that is known.
    """
    require_same_data(model, heldout, what, "the model")
    size, theirs = latent_shape(model)[1:], heldout.latent_shape[1:]
    if size != theirs:
        raise InputError(
            f"{what} has latents of {theirs[0]}x{theirs[1]}, the model is trained on {size[0]}x{size[1]}: prepare the "
            "held-out data at the same resolution."
        )
    if not model.num_classes:
        return
    if model.classes.names and heldout.classes.names:
        numbers = heldout.classes.numbers_in(model.classes)
        unknown = [number for number in heldout.classes.learned if numbers[number] is None]
        if unknown:
            raise InputError(f"{what} has classes that the model does not have: {heldout.classes.titles(unknown)}.")
    elif classes is not None and heldout.num_classes != classes:
        raise InputError(
            f"{what} has {heldout.num_classes} classes, the data to train on {classes}, and not both name them: "
            "prepare the held-out data with the same classes."
        )

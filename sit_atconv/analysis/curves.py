"""Numbers of every layer: contrast and rank of its output, and the weights of ACmix's paths."""

import math
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor, nn

from sit_atconv.analysis.figures import draw_curves
from sit_atconv.analysis.layers import layers, operators, without_inhibition
from sit_atconv.analysis.measures import centre_surround_contrast, channel_effective_rank
from sit_atconv.analysis.subjects import Subject, open_model, open_subjects
from sit_atconv.errors import InputError
from sit_atconv.models.mixers import ACmix, ATConv
from sit_atconv.runtime.whole_files import write_json
from sit_atconv.zoo.reduced import ReducedACmix
from sit_atconv.zoo.san import ACmixPatchwise

_MEASURES = {
    "contrast": ("centre-surround contrast", centre_surround_contrast),
    "rank": ("effective rank / channels", channel_effective_rank),
}


def contrast_and_rank(options: Namespace) -> None:
    """Measure every layer's output with inhibition, and without it: λ = 0, or another model."""
    title, measure = _MEASURES[options.what]
    opened = (options.images, options.count, options.times)
    subjects = open_subjects(options.model, *opened, options.weights, options.seed)
    others = [None] * len(subjects)
    if options.without is not None:
        others = open_subjects(options.without, *opened, options.without_weights, options.seed)
    curves, names = {}, list(operators(subjects[0].model))
    for subject, other in zip(subjects, others, strict=True):
        label = f"{subject.title} " if subject.title else ""
        curves[f"{label}as trained".strip()] = _measured(subject, measure)
        if other is not None:
            curves[f"{label}{options.without}"] = _measured(other, measure)
        elif _inhibited(subject.model):
            curves[f"{label}λ = 0"] = _measured(subject, measure, switched_off=True)
    _write(options, title, names, curves)


def paths(options: Namespace) -> None:
    """The absolute weights of attention and convolution in every ACmix, and the logarithm of their ratio."""
    model = open_model(options.model, options.weights, options.seed)
    found = {
        name: (abs(module.alpha.item()), abs(module.beta.item()))
        for name, module in operators(model).items()
        if isinstance(module, ACmix | ReducedACmix | ACmixPatchwise) and module.beta is not None
    }
    if not found:
        raise InputError(f"{options.model} has no ACmix with two learnt weights.")
    alphas, betas = ([pair[i] for pair in found.values()] for i in (0, 1))
    ratios = [math.log(a / b) if a and b else math.nan for a, b in found.values()]
    _write(options, "weights of the paths", list(found), {"|α|": alphas, "|β|": betas, "log|α/β|": ratios})


def _measured(subject: Subject, measure: Callable, switched_off: bool = False) -> list[float]:
    with without_inhibition(subject.model) if switched_off else nullcontext():
        return [_number(measure, layer.output()) for layer in layers(subject.model, subject.run)]


def _number(measure: Callable, maps: Tensor) -> float:
    try:
        return measure(maps)
    except InputError:  # a map that is too small
        return math.nan


def _inhibited(model: nn.Module) -> bool:
    return any(isinstance(each, ATConv) and each.inhibited_by == "dkm" for each in model.modules())


def _write(options: Namespace, what: str, names: list[str], curves: dict[str, list[float]]) -> None:
    folder = Path(options.out)
    draw_curves(curves, names, what, folder / f"{options.what}.png")
    numbers = {name: [None if math.isnan(value) else value for value in values] for name, values in curves.items()}
    write_json(folder / f"{options.what}.json", {"model": options.model, "layers": names, **numbers})

"""What can be found out before anything runs: every configuration, model, option, source and the room on the disk."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from sit_atconv.config import Config, ImageConfig, Settings, load_config
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.latents import LatentDataset
from sit_atconv.errors import InputError
from sit_atconv.evaluation import create_features
from sit_atconv.models import SiT
from sit_atconv.models.mixers import import_plugins
from sit_atconv.models.mixers.pattern import expand_pattern
from sit_atconv.runtime.reading import understand
from sit_atconv.study.commands import ROOT, caches_features, key_words, length
from sit_atconv.study.options import check_agreement, check_sampling, check_scores, require_source
from sit_atconv.study.plan import CellName, Plan, absolute
from sit_atconv.study.room import FEATURE_BYTES, Needed, bytes_of_cell, kept_checkpoints
from sit_atconv.training.session.build import build_model, require_trackers
from sit_atconv.training.session.heldout import require_measurable, require_measure, split_data
from sit_atconv.training.watch.evaluation import require_metrics
from sit_atconv.zoo.train.session import open_data, options_of
from sit_atconv.zoo.validate.loading import create_network

PROGRAMS = ("train.py", "sample.py", "evaluate_fid.py")
_COPIES = 4  # in a checkpoint of an image network: weights, Adam's two moments, the average


def load_base(plan: Plan) -> Settings:
    """The base configuration, in which paths that exist are absolute. Raises `InputError` as `load_config` does."""
    return understand(absolute(asdict(load_config(plan.config, kind=plan.kind))), plan.kind, plan.config)


def check_plan(plan: Plan) -> Needed:
    """Build every row's configuration and model, and parse every program's options, without running anything.

    Returns the bytes that each cell will need. Raises `InputError` for the first thing that would fail: the programs
    are not there, a configuration, data, options of a program or a source of pictures that cannot be used, two rows
    that are equal in effect, or agreement without labels.
    """
    if missing := [name for name in PROGRAMS if not (ROOT / name).is_file()]:
        raise InputError(
            f"There is no {missing[0]} in {ROOT}: a study starts the programs of the checkout, so run it there (cd "
            "CHECKOUT; python -m sit_atconv.study …), or install the package with pip install -e CHECKOUT."
        )
    if plan.network == "image":
        return _check_image_rows({row: _config(plan, row) for row in plan.rows})
    needed, seen = {}, {}
    for row in plan.rows:
        config = _config(plan, row)
        dataset, model = _built(config, row)
        same = seen.setdefault(_effect(config, model), row)
        if same != row:
            raise InputError(f"The rows {same} and {row} are equal in effect: change one of them, or leave it out.")
        samples = check_sampling(plan, model)
        height, width = (side * dataset.latents.downscale for side in dataset.latent_shape[1:])
        for number, options in enumerate(plan.scores):
            check_scores(options, f"scores[{number}]", (height, width))
        agreement = () if plan.agreement is None else (plan.agreement,)
        for options in agreement:
            check_agreement(options, model, (height, width))
        for budget in plan.budgets.given():
            steps = plan.budgets.steps if budget == "steps" else 0
            each = height * width * 3 + FEATURE_BYTES * any(map(caches_features, (*plan.scores, *agreement)))
            needed[row, budget] = bytes_of_cell(config, model, steps, samples * each)
    return needed


def _config(plan: Plan, row: str) -> Settings:
    keys = dict(plan.keys(row))
    for budget in plan.budgets.given():
        keys |= length(plan, CellName(row, budget, 0))
    try:
        return load_config(plan.config, key_words({**keys, "training.seed": max(plan.seeds)}), plan.kind)
    except InputError as error:
        raise InputError(f"The configuration of the row {row}: {error}") from error


def _built(config: Config, row: str) -> tuple[LatentDataset, SiT]:
    """The data and the model of a row, the latter without memory."""
    try:
        require_trackers(config.log.trackers)
        require_measure(config)
        teachers = config.alignment.teachers if config.alignment else ()
        dataset = open_dataset(config.data.path, images=any(teacher.live for teacher in teachers))
        dataset, heldout = split_data(config, dataset)
        if config.model.init_from is not None and not Path(config.model.init_from).is_dir():
            raise InputError(f"model.init_from {config.model.init_from} is not a folder.")
        if config.evaluation is not None and config.evaluation.reference is not None:
            require_source(config.evaluation.reference)
            if config.evaluation.features == "pixels":  # others may be large, or downloaded
                require_metrics(config.evaluation, create_features("pixels"))
        with torch.device("meta"):
            model = build_model(config, dataset)
        if heldout is not None:
            require_measurable(model, heldout, f"data.heldout {config.data.heldout}", dataset.num_classes)
        return dataset, model
    except InputError as error:
        raise InputError(f"The row {row}: {error}") from error


def _effect(config: Config, model: SiT) -> str:
    """Equal for configurations that train the same model in the same way, however its mixers are written down."""
    pattern = [str(entry) for entry in expand_pattern(model.config.mixer_pattern, len(model.blocks))]
    built = {**model.config, "mixer_pattern": pattern, "_use_default_values": None}
    return repr((sorted(built.items()), config.model.init_from, {**vars(config), "model": None}))


def _check_image_rows(configs: Mapping[str, ImageConfig]) -> Needed:
    """Open every row's pictures and build its network; returns the bytes that each cell will need.

    Raises `InputError` naming the row for what would fail, and for two rows that are equal.
    """
    needed, seen = {}, {}
    for row, config in configs.items():
        same = seen.setdefault(repr(replace(config, log=None, validation=None)), row)
        if same != row:
            raise InputError(f"The rows {same} and {row} are equal in effect: change one of them, or leave it out.")
        try:
            require_trackers(config.log.trackers)
            pictures, _ = open_data(config)
            import_plugins(config.model.plugins)
            network = create_network(config.model.name, pictures.num_classes, options_of(config.model))
        except InputError as error:
            raise InputError(f"The row {row}: {error}") from error
        weights = 4 * sum(parameter.numel() for parameter in network.parameters())
        needed[row, "steps"] = kept_checkpoints(config.log, config.training.steps) * _COPIES * weights
    return needed

"""A study's folder: the plan it was begun with, and what a later plan may add to it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from sit_atconv.config import Settings, config_differences, load_config
from sit_atconv.errors import InputError
from sit_atconv.runtime.lock import LOCK, lock_folder
from sit_atconv.runtime.whole_files import leftovers, remove_leftovers, write_text
from sit_atconv.study.commands import CONFIG
from sit_atconv.study.plan import Plan, read_plan

STUDY = "study.yaml"  # the resolved plan; its base configuration is beside it


def require_same_study(plan: Plan, base: Settings, folder: Path) -> None:
    """Raise `InputError` unless `folder` is new, empty, or holds a study that this plan is or extends."""
    path, holds_none = folder / STUDY, InputError(f"{folder} exists and holds no study: choose another --out.")
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - {folder / LOCK, *leftovers(folder)}):
            raise holds_none
        return
    begun = read_plan(path)
    if Path(begun.config) != folder / CONFIG:  # somebody's own file of that name
        raise holds_none
    if begun.network != plan.network:
        raise InputError(f"{folder} holds a study of other networks ({begun.network}): choose another --out.")
    differences = config_differences(*(each.to_dict() for each in (load_config(begun.config, kind=plan.kind), base)))
    if differences := [*(f"config: {line}" for line in differences), *_differences(begun, plan)]:
        raise InputError(
            f"{folder} holds another study ({'; '.join(differences)}). Nothing was changed: choose another --out, or "
            "give what it was begun with. Seeds, rows, a budget, samples and scores may be added."
        )


def begin_folder(plan: Plan, base: Settings, folder: Path) -> None:
    """Write the plan and its base configuration into the study's folder, from which the study can be repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder, "written", "--out", wait=True):
        remove_leftovers(folder)
        if not (folder / CONFIG).exists():
            write_text(folder / CONFIG, base.to_yaml())
        plan = replace(plan, config=str(folder / CONFIG))
        if not (folder / STUDY).exists() or read_plan(folder / STUDY) != plan:
            write_text(folder / STUDY, _resolved(plan))


def _resolved(plan: Plan) -> str:
    values = {**asdict(plan), "config": CONFIG, "budgets": plan.budgets.given()}
    given = {key: value for key, value in values.items() if value is not None}
    return yaml.safe_dump({"title": given.pop("title"), **given}, sort_keys=False, allow_unicode=True)


def _differences(begun: Plan, plan: Plan) -> list[str]:
    """What a plan changes or leaves out of the one that a study was begun with, as lines "seeds: 0 -> None"."""
    old, new = (
        {
            "rows": each.rows,
            "seeds": {str(seed): seed for seed in each.seeds},
            "budgets": each.budgets.given(),
            "scores": {str(number): options for number, options in enumerate(each.scores)},
        }
        for each in (begun, plan)
    )
    lines = [line for key in old for line in config_differences({key: old[key]}, {key: _of(new[key], old[key])})]
    lines += config_differences({"set": begun.set}, {"set": plan.set})
    for key in ("sampling", "agreement"):
        if (was := getattr(begun, key)) is not None:
            lines += config_differences({key: was}, {key: getattr(plan, key)})
    first, now = next(iter(begun.rows)), next(iter(plan.rows))
    return lines + ([f"the first row, with which the others are compared: {first} -> {now}"] if first != now else [])


def _of(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: values.get(key) for key in keys}

"""The plan of a study: what STUDY.yaml says, and the cells that follow from it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from msgspec import Meta

from sit_atconv.config import Config, ImageConfig, Settings
from sit_atconv.config.ranges import PositiveFloat, Steps
from sit_atconv.config.strict_yaml import load_strict_yaml
from sit_atconv.data.digits import is_digits
from sit_atconv.errors import InputError
from sit_atconv.randomness import MAX_SEED
from sit_atconv.runtime.reading import Text, require_known_keys, understand

Budget = Literal["steps", "seconds"]
Options = dict[str, Any]  # of a program, without the dashes

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")  # of a row: also a folder, a part of a shell's word and a label
_OURS = ("training.seed", "training.steps", "training.max_seconds")  # keys that the study sets
# Keys of the configuration, and options, whose values may be paths; sample.py's --weights is the name of an average.
PATHS = ("path", "heldout", "init_from", "reference", "weights", "statistics")
_SAMPLING_PATHS = ("vae", "weak-checkpoint")


@dataclass(frozen=True)
class Budgets:
    """How long each cell trains; one or both.

    Args:
        steps: optimizer steps, the same for all rows.
        seconds: seconds of training, the same for all rows; evaluations, previews and checkpoints are excluded.
    """

    steps: Steps | None = None
    seconds: PositiveFloat | None = None

    def given(self) -> dict[Budget, float]:
        """The budgets that are there, equal steps first."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


@dataclass(frozen=True)
class Plan:
    """A study's file.

    Args:
        config: the base configuration; its path is relative to the study's file.
        rows: what is compared, by name: the keys of the configuration that make each row. The others are compared with
            the first.
        seeds: of the runs of each row.
        budgets: how long each run trains.
        title: of the report.
        set: keys of the configuration for all rows.
        sampling: options of sample.py; null draws no samples.
        scores: options of evaluate_fid.py, one program for each entry.
        agreement: options of sit_atconv.evaluation.agreement; null for none.
        network: what is trained: "sit" by train.py, or "image", an image network, by sit_atconv.zoo.train.
    """

    config: Text
    rows: Annotated[dict[str, dict[str, Any]], Meta(min_length=1)]
    seeds: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]
    budgets: Budgets
    title: Text = "Study"
    set: dict[str, Any] = field(default_factory=dict)
    sampling: Options | None = None
    scores: list[Options] = field(default_factory=list)
    agreement: Options | None = None
    network: Literal["sit", "image"] = "sit"

    @property
    def kind(self) -> type[Settings]:
        """The schema of the configurations."""
        return ImageConfig if self.network == "image" else Config

    def keys(self, row: str) -> dict[str, Any]:
        """The keys of the configuration that the study sets for all cells of a row."""
        return {**self.set, **self.rows[row]}

    def cells(self) -> "Iterator[CellName]":
        """All cells in the order in which they run: one seed of everything first, so that rows can soon be compared."""
        for seed in self.seeds:
            for budget in self.budgets.given():
                for row in self.rows:
                    yield CellName(row, budget, seed)


@dataclass(frozen=True)
class CellName:
    """Which cell of a study: ROW/BUDGET-SEED."""

    row: str
    budget: Budget
    seed: int

    def __str__(self) -> str:
        return f"{self.row}/{self.budget}-{self.seed}"


def read_plan(path: Path) -> Plan:
    """Read a study's file; `config` and other paths in it that exist become absolute.

    Paths but for `config` are relative to the working directory, as in the programs' own options.

    Raises `InputError` for a file that cannot be read, an unknown key, a value of the wrong type or out of range, rows
    that cannot be folders, keys that the study itself sets, seeds that are given twice, and scores without samples.
    """
    try:
        values = load_strict_yaml(path.read_text())
    except OSError as error:
        raise InputError(f"Cannot read the study {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The study {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise InputError(f"The study {path} holds no keys: expected config, rows, seeds and budgets (docs/study.md).")
    require_known_keys(values, Plan, str(path))
    if isinstance(values.get("budgets"), dict):
        require_known_keys(values["budgets"], Budgets, f"{path}: budgets")
    if isinstance(values.get("rows"), dict):  # a row without keys is the base configuration
        values = {**values, "rows": {str(name): keys or {} for name, keys in values["rows"].items()}}
    plan = understand(values, Plan, str(path), "docs/study.md describes the file.")
    _require_sensible(plan, path)
    return replace(
        plan,
        config=str(path.parent.resolve() / plan.config),
        sampling=absolute(plan.sampling, _SAMPLING_PATHS),
        **{name: absolute(getattr(plan, name)) for name in ("rows", "set", "scores", "agreement")},
    )


def _require_sensible(plan: Plan, path: Path) -> None:
    """Raise `InputError` for what the types do not say."""
    if unfit := [name for name in plan.rows if not _NAME.fullmatch(name)]:
        raise InputError(
            f"{path}: '{unfit[0]}' cannot be the name of a row, which is a folder too: use up to 64 letters, digits, "
            "'.', '_', '+' and '-', and begin with a letter or a digit."
        )
    folders = [name.casefold() for name in plan.rows]
    if twice := [name for name in plan.rows if folders.count(name.casefold()) > 1]:
        raise InputError(f"{path}: the rows {' and '.join(twice)} would be one folder on some systems: rename one.")
    if twice := sorted({seed for seed in plan.seeds if plan.seeds.count(seed) > 1}):
        raise InputError(
            f"{path}: the seed {twice[0]} is given twice: each seed is one run of every row, so give others."
        )
    if (largest := max(plan.seeds)) > MAX_SEED:
        raise InputError(f"{path}: the seed {largest} is too large: at most {MAX_SEED}.")
    if not plan.budgets.given():
        raise InputError(f"{path}: budgets is empty: give steps, seconds, or both, such as {{steps: 2400}}.")
    for where, keys in {"set": plan.set, **{f"rows: {row}": keys for row, keys in plan.rows.items()}}.items():
        if ours := [key for key in keys if key in _OURS]:
            raise InputError(f"{path}: {where} has {ours[0]}, which the study sets itself: it has seeds and budgets.")
    if plan.network == "image" and (plan.sampling is not None or plan.scores or plan.agreement is not None):
        raise InputError(f"{path}: an image network has no samples: leave out sampling, scores and agreement.")
    if plan.network == "image" and plan.budgets.seconds is not None:
        raise InputError(f"{path}: the schedule of an image network follows its steps: give budgets.steps alone.")
    if plan.sampling is None and (plan.scores or plan.agreement is not None):
        raise InputError(f"{path}: scores and agreement need samples: add sampling, the options of sample.py.")


def absolute(value: Any, paths: Sequence[str] = PATHS, key: str = "") -> Any:
    """The value of a key, recursively, with absolute paths where a key of `paths` names a file or folder."""
    if isinstance(value, Mapping):
        return {name: absolute(inner, paths, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [absolute(inner, paths, key) for inner in value]
    if not isinstance(value, str) or key.rpartition(".")[2] not in paths or is_digits(value):
        return value
    name, equals, file = value.partition("=")  # of one of several features
    if equals and Path(file).exists():
        return f"{name}={Path(file).resolve()}"
    place, colon, part = value.rpartition(":")  # a folder of a zip, for example
    if Path(value).exists():
        return str(Path(value).resolve())
    return f"{Path(place).resolve()}:{part}" if colon and Path(place).exists() else value

"""The commands of a cell: command lines of our own programs, which can be run by hand from any working directory."""

import contextlib
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sit_atconv.errors import InputError
from sit_atconv.models.mixers.plugins import VARIABLE
from sit_atconv.runtime.reading import read_json
from sit_atconv.runtime.whole_files import followed
from sit_atconv.study.plan import CellName, Options, Plan

ROOT = Path(__file__).resolve().parents[2]  # the checkout, with the programs
CONFIG = "config.yaml"  # the base configuration, in the study's folder
FEATURES = "features"  # the cache of features of all cells, in the study's folder
ENDLESS = 10**9  # steps of a run that ends by its seconds


@dataclass(frozen=True)
class Position:
    """The part of a checkpoint's position.json that says how far training is."""

    step: int
    out_of_time: bool = False


@dataclass(frozen=True)
class Command:
    """A program of a cell: the words of its command line, and what says that its result is complete.

    `module` is whether it is started with -m, for which the working directory must be the checkout. `variables` are
    those of its environment that it needs.
    """

    name: str
    words: tuple[str, ...]
    results: tuple[Path, ...] = ()
    module: bool = False
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def complete(self) -> bool:
        """Whether its results are there. Programs write them whole or not at all."""
        return all(path.exists() for path in self.results)

    @property
    def line(self) -> str:
        """For a shell."""
        there = f"cd {shlex.quote(str(ROOT))} && " if self.module else ""
        return (
            there + "".join(f"{name}={shlex.quote(value)} " for name, value in self.variables) + shlex.join(self.words)
        )


@dataclass(frozen=True)
class Training(Command):
    """train.py, or sit_atconv.zoo.train for image networks.

    Complete when the newest checkpoint is that of the last step, or of the step that used up the time.
    """

    run: Path = Path()
    steps: int = 0

    @property
    def complete(self) -> bool:
        with contextlib.suppress(InputError):  # there is none, or train.py will say what is wrong with it
            at = read_json(followed(self.run / "checkpoints" / "latest") / "position.json", Position)
            return at.step >= self.steps or at.out_of_time
        return False


def cell_folder(folder: Path, cell: CellName) -> Path:
    """The folder of a cell within the study's."""
    return folder / "cells" / cell.row / f"{cell.budget}-{cell.seed}"


def cell_commands(plan: Plan, folder: Path, cell: CellName) -> list[Command]:
    """The commands of a cell in the order in which they run; `folder` is the study's, an absolute path."""
    at = cell_folder(folder, cell)
    run, samples = at / "run", at / "samples"
    keys = {**plan.keys(cell.row), **length(plan, cell), "training.seed": cell.seed}
    given = ("--config", folder / CONFIG, "--run", run, *key_words(keys))
    module = plan.network == "image"
    train = _module("sit_atconv.zoo.train", *given) if module else _program("train.py", *given)
    commands: list[Command] = [Training("training", train, module=module, run=run, steps=keys["training.steps"])]
    if plan.sampling is not None:
        options = {"seed": cell.seed, **plan.sampling}  # the same noise for all rows, other noise for other seeds
        checkpoint = run / "checkpoints" / "latest" / "model"
        words = _program("sample.py", "--checkpoint", checkpoint, "--out", samples, *option_words(options))
        results = (samples / "samples.npz", samples / "grid.png")
        plugins = ",".join(plan.keys(cell.row).get("model.plugins") or ())  # which train.py has as a key
        commands.append(Command("sampling", words, results, variables=((VARIABLE, plugins),) if plugins else ()))
    for number, options in enumerate(plan.scores):
        out = at / f"scores-{number}.json"
        given = ("--samples", samples / "samples.npz", "--json", out, *_scoring_words(options, folder))
        commands.append(Command(out.stem, _program("evaluate_fid.py", *given), (out,)))
    if plan.agreement is not None:
        out = at / "agreement.json"
        given = (samples / "samples.npz", "--json", out, *_scoring_words(plan.agreement, folder))
        commands.append(Command(out.stem, _module("sit_atconv.evaluation.agreement", *given), (out,), module=True))
    return commands


def length(plan: Plan, cell: CellName) -> dict[str, float]:
    """The keys that say how long a cell trains."""
    if cell.budget == "steps":
        return {"training.steps": plan.budgets.steps}
    return {"training.steps": ENDLESS, "training.max_seconds": plan.budgets.seconds}


def key_words(keys: Mapping[str, Any]) -> list[str]:
    """Words of train.py's command line: {"data.flip": True} -> ["--data.flip", "true"]."""
    return [word for key, value in keys.items() for word in (f"--{key}", _value(value))]


def option_words(options: Options) -> list[str]:
    """Words of the other programs: {"interval": [0, 0.7], "kid": True} -> ["--interval", "0", "0.7", "--kid"].

    True stands for an option without a value; one that is false or null is left out.
    """
    words = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(_value, values)]
    return words


def caches_features(options: Options) -> bool:
    """Whether a program that scores keeps features in the study's folder: those of the reference serve all cells."""
    return "cache" not in options and options.get("features") != "pixels"  # pixels are as large as the pictures


def _scoring_words(options: Options, folder: Path) -> list[str]:
    return option_words({**options, "cache": str(folder / FEATURES)} if caches_features(options) else options)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _program(name: str, *words: object) -> tuple[str, ...]:
    return sys.executable, str(ROOT / name), *map(str, words)


def _module(name: str, *words: object) -> tuple[str, ...]:
    return sys.executable, "-m", name, *map(str, words)

"""RUN/config.yaml: the configuration a run was begun with, and the refusal to continue it with another."""

from pathlib import Path

import yaml

from sit_atconv.config import Config, config_differences
from sit_atconv.errors import InputError

_UNFINISHED = "config.yaml.unfinished"


def check_run_directory(run: Path, config: Config) -> None:
    """Raise `InputError` unless `run` is new, empty, or was begun with this configuration. Reads only."""
    path = run / "config.yaml"
    if path.exists():
        changed = config_differences(yaml.safe_load(path.read_text()) or {}, yaml.safe_load(config.to_yaml()))
        if changed:
            raise InputError(
                f"{run} was begun with another configuration ({'; '.join(changed)}). Nothing was changed: "
                "give the configuration it was begun with to continue it, or choose another --run."
            )
    elif run.exists() and (not run.is_dir() or any(p.name != _UNFINISHED for p in run.iterdir())):
        raise InputError(f"{run} exists and is not a training run: choose another --run.")


def begin_run_directory(run: Path, config: Config) -> None:
    """Make the directory and its config.yaml, unless they are there."""
    path = run / "config.yaml"
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        unfinished = run / _UNFINISHED
        unfinished.write_text(config.to_yaml())
        unfinished.replace(path)

"""The points of a sweep: every combination of the values given for some of the sampler's settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, NamedTuple, get_args, get_origin

import msgspec

from sit_atconv.errors import InputError, nearest
from sit_atconv.sampling.settings import NoEffectError, SamplerSettings

_ENDS = ("low", "high")  # of a pair, such as interval.low
_OF_SPEED = {"compile"}  # changes no sample


class Key(NamedTuple):
    """What a key of --sweep sets: a setting, or one end (0 or 1) of a setting that is a pair."""

    setting: str
    end: int | None
    kind: Any


@dataclass(frozen=True)
class Point:
    """A combination of values. `values` are those that have an effect in it, by their keys."""

    values: dict[str, Any]
    settings: SamplerSettings

    @property
    def name(self) -> str:
        """Such as "guidance=1.25,interval.high=0.7", also the name of its folder."""
        return ",".join(f"{key}={value}" for key, value in self.values.items())


def sweep_keys() -> dict[str, Key]:
    """What can be swept: the sampler's settings by name, and those that are pairs by their ends."""
    keys = {}
    for field in fields(SamplerSettings):
        if field.name in _OF_SPEED:
            continue
        if get_origin(field.type) is tuple:
            pairs = zip(_ENDS, get_args(field.type), strict=True)
            keys |= {f"{field.name}.{end}": Key(field.name, i, kind) for i, (end, kind) in enumerate(pairs)}
        else:
            keys[field.name] = Key(field.name, None, field.type)
    return keys


def parse_sweep(words: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each key, from words KEY=VALUE,VALUE,….

    Raises `InputError` for an unknown key, a value that is none of its kind, and a key or value that is given twice.
    """
    keys, swept = sweep_keys(), {}
    for word in words:
        name, equals, listed = word.partition("=")
        if not equals:
            raise InputError(f"--sweep {word}: expected KEY=VALUE,VALUE,…, such as guidance=1,1.25,1.5.")
        if name not in keys:
            raise InputError(f"--sweep {word}: the sampler has no setting '{name}': {nearest(name, keys)}")
        if name in swept:
            raise InputError(f"--sweep: {name} is given twice; put all of its values into one {name}=VALUE,VALUE,….")
        values = [_value(word, each, keys[name].kind) for each in listed.split(",")]
        for i, value in enumerate(values):
            if value in values[:i]:
                raise InputError(f"--sweep {word}: {value} is given twice: leave one out.")
        swept[name] = values
    return swept


def _value(word: str, text: str, kind: Any) -> Any:
    try:
        return msgspec.convert(text.strip(), kind, strict=False)
    except msgspec.ValidationError as error:
        raise InputError(f"--sweep {word}: '{text}' is no value of it. {error}.") from error


def points(swept: Mapping[str, Sequence[Any]], given: Mapping[str, Any]) -> list[Point]:
    """All combinations of the values, beside the settings `given`; equal ones once.

    Where a setting has no effect, as the interval without guidance, it is left out of the combination. Raises
    `InputError` for a setting that has no effect in any of them, that is both given and swept, or that the sampler
    refuses.
    """
    for name in swept:
        key = sweep_keys()[name]
        if key.end is None and key.setting in given:
            raise InputError(f"--sweep {name}=… and --{name.replace('_', '-')} set the same: leave one out.")
    found: dict[SamplerSettings, dict[str, Any]] = {}
    idle: list[dict[str, NoEffectError]] = []
    for values in product(*swept.values()):
        settings, values, without = _combined(dict(zip(swept, values, strict=True)), given)
        idle.append(without)
        known = found.get(settings, values)
        found[settings] = {name: value for name, value in known.items() if values.get(name) == value}
    for setting in idle[0]:
        if all(setting in without for without in idle):
            raise InputError(f"{idle[0][setting]} This holds for all points of the sweep.")
    return [Point(values, settings) for settings, values in found.items()]


def _combined(
    values: dict[str, Any], given: Mapping[str, Any]
) -> tuple[SamplerSettings, dict[str, Any], dict[str, NoEffectError]]:
    """The settings of one combination, its values that have an effect, and the settings that have none, with why."""
    keys, settings, idle = sweep_keys(), dict(given), {}
    defaults = SamplerSettings()
    for name, value in values.items():
        setting, end, _ = keys[name]
        if end is None:
            settings[setting] = value
        else:
            pair = list(settings.get(setting, getattr(defaults, setting)))
            pair[end] = value
            settings[setting] = tuple(pair)
    while True:
        try:
            chosen = SamplerSettings(**settings)
        except NoEffectError as error:
            for setting in error.names:
                idle[setting] = error
                del settings[setting]
        except InputError as error:
            raise InputError(f"--sweep {Point(values, defaults).name}: {error}") from error
        else:
            return chosen, {name: value for name, value in values.items() if keys[name].setting not in idle}, idle

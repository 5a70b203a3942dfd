"""Parses a configuration file and command-line overrides into a `Config`, or into another kind of settings."""

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_loader

from sit_atconv.config.schema import OPTIONAL_SECTIONS, Config, Settings, config_keys
from sit_atconv.config.strict_yaml import TooLarge, load_strict_yaml
from sit_atconv.errors import InputError, nearest
from sit_atconv.runtime.arguments import refuse
from sit_atconv.runtime.reading import understand

Kind = TypeVar("Kind", bound=Settings)


def load_config(path: str | Path, overrides: Sequence[str] = (), kind: type[Kind] = Config) -> Kind:
    """Read a configuration file; `overrides` are command-line words such as ``["--training.steps", "10"]``.

    Raises `InputError` that names the file and the nearest key for a misspelt key, a wrong type, or no such file.
    """
    return parse_command_line(["--config", str(path), *overrides], f"{path}: ", kind)[0]


def parse_command_line(
    argv: Sequence[str] | None = None, source: str = "", kind: type[Kind] = Config, program: str = "train.py"
) -> tuple[Kind, Path | None, str | None]:
    """The configuration, the run directory and the checkpoint given on the command line of `program` (or in `argv`).

    `source` goes before the text of an error; `kind` is the schema. Raises `InputError` as `load_config` does.
    """
    try:
        return _parse(sys.argv[1:] if argv is None else argv, source, kind, program)
    except _Mistake as mistake:
        raise InputError(mistake.paragraph) from None


def training_command(
    argv: Sequence[str] | None = None, kind: type[Kind] = Config, program: str = "train.py"
) -> tuple[Kind, Path, str | None]:
    """As `parse_command_line`, for a program that trains: mistakes, and no run directory, end it with code 2."""
    try:
        config, run, resume = parse_command_line(argv, kind=kind, program=program)
    except InputError as error:
        refuse(str(error))
    if run is None:
        refuse("Say where the run shall live: --run runs/NAME. The same --run again continues it.")
    return config, run, resume


def _parse(argv: Sequence[str], source: str, kind: type[Kind], program: str) -> tuple[Kind, Path | None, str | None]:
    set_loader("strict yaml", load_strict_yaml, exceptions=(yaml.YAMLError,))
    parser = _Parser(prog=program, description=kind.__doc__, allow_abbrev=False, parser_mode="strict yaml")
    parser.source, parser.kind = source, kind
    parser.add_argument("--config", action=ActionConfigFile, help="a file of configs/; other options override its keys")
    parser.add_argument("--run", type=str, help="run directory, created or continued")
    parser.add_argument("--resume", type=str, help="go back to an older checkpoint of the run: its step, name or path")
    parser.add_class_arguments(kind)
    words = _files_first(argv)
    _refuse_too_large(words, parser)
    try:
        parsed = parser.parse_args(words)
    except UnicodeDecodeError as error:
        parser.error(f"the configuration is not a text file: {error}.")
    except ValueError as error:  # a null character, where jsonargparse looks for a file of that name
        parser.error(f"the configuration cannot be used: {error}.")
    for f in fields(kind):
        section = parsed[f.name]
        if isinstance(section, list | str | int | float) or (section is None and f.name not in OPTIONAL_SECTIONS):
            found = "nothing" if section is None else repr(section)
            parser.error(f"'{f.name}' is a section of keys and cannot be {found}.")
        for inner in fields(f.type) if is_dataclass(f.type) else ():
            if is_dataclass(inner.type) and section[inner.name] is None:
                parser.error(f"'{f.name}.{inner.name}' is a section of keys and cannot be nothing.")
    try:
        namespace = parser.instantiate(parsed)
        # jsonargparse accepts null for any key and does not check ranges.
        values = asdict(kind(**{f.name: namespace[f.name] for f in fields(kind)}))
        config = understand(values, kind, "")
    except InputError as error:
        parser.error(str(error))
    return config, Path(namespace.run) if namespace.run else None, namespace.resume


def _refuse_too_large(words: Sequence[str], parser: "_Parser") -> None:
    """Refuse oversized values first: jsonargparse would parse them again in other ways and print them in full."""
    for word in words:
        value = word.partition("=")[2] if word.startswith("--") else word
        try:
            load_strict_yaml(value)
        except TooLarge as error:
            parser.error(f"{word[:40]}…: {error.problem}.")
        except yaml.YAMLError:
            pass  # for example a path, which need not be YAML


def _files_first(words: Sequence[str]) -> list[str]:
    """Move --config FILE to the front: the last value of a key wins, and options must override the file."""
    files, others, rest = [], [], iter(words)
    for word in rest:
        if word == "--config":
            files += [word, *islice(rest, 1)]
        else:
            (files if word.startswith("--config=") else others).append(word)
    return files + others


def config_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines such as "training.steps: 10 -> 20" for every key whose value differs between two plain configurations."""
    lines = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += config_differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines


class _Mistake(SystemExit):
    """What `_Parser` ends in. jsonargparse would try other readings of a word after most other errors."""

    def __init__(self, paragraph: str) -> None:
        super().__init__(2)
        self.paragraph = paragraph


# What jsonargparse says before the errors of a type of several, such as "int or null"
_SUBTYPES = re.compile(r"Does not validate against any of the Union subtypes Subtypes: \[.*\] Errors: ")


class _Parser(ArgumentParser):
    """Reports errors as one paragraph that names the nearest key, without the usage of seventy options."""

    source = ""  # the beginning of that paragraph: what was read
    kind: type[Settings] = Config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if message.startswith("Unexpected config"):
            message = "the configuration is empty, or holds no sections with keys."
        group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
        option = re.search(r"Option '([\w.]+)' is not accepted|unrecognized arguments: --([\w.]+)", message)
        key = ".".join(group.groups()) if group else next(filter(None, option.groups())) if option else None
        plain = _SUBTYPES.sub("", " ".join(message.split()))
        paragraph = f"Unknown key '{key}': {nearest(key, config_keys(self.kind))}" if key else plain
        raise _Mistake(f"{self.source}{paragraph}")

"""What `accelerate launch` was told that a command's own options say, too."""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from sit_atconv.errors import InputError

_PREFIX = "ACCELERATE_"
_NOTHING = ("none", "auto")
# The ways to call it: accelerate launch, accelerate-launch, python -m accelerate.commands.launch
_LAUNCHES = re.compile(r"accelerate(_cli\.py)?[ -]launch$|accelerate[./]commands[./]launch(\.py)?$")


@dataclass(frozen=True)
class Setting:
    """What both can say: the launcher's option with its default, and the command's own, with its value.

    A `value` of None says that nothing the launcher could say is the same.
    """

    option: str
    default: str
    own: str
    value: object = None


def require_same_from_launcher(*settings: Setting) -> None:
    """Raise `InputError` where the launcher asks for something else than the command's own options.

    A launcher that was told nothing says what Accelerate has as defaults ("no" precision, no compiler, one micro-batch
    for DeepSpeed): then the command's own options decide.
    """
    for setting in settings:
        asked = _asked(setting.option, setting.default)
        if asked is not None and not _is_same(asked, setting.value):
            now = "" if setting.value is None else f", which is {setting.value} here"
            raise InputError(
                f"The launcher was told --{setting.option} {asked} (or its configuration file was), but {setting.own} "
                f"decides{now}: leave the option of the launcher out, and set --{setting.own} if you want another "
                "value."
            )


def asked_precision() -> str | None:
    """The precision that the launcher was told to train in, None if it was not."""
    return _asked("mixed_precision", "no")


def _asked(option: str, default: str) -> str | None:
    asked = os.environ.get(_PREFIX + option.upper()) or _told(option, _launcher()) or default
    asked = asked.lower()
    return None if asked in (default, *_NOTHING) else asked


def _launcher() -> list[str]:
    """The command line of the parent process."""
    try:
        parent = psutil.Process().parent()
        return parent.cmdline() if parent else []
    except psutil.Error:  # of another user, or gone
        return []


def _told(option: str, words: Sequence[str]) -> str | None:
    """The value of an option on the command line of `accelerate launch`, which does not hand on all of its options."""
    places = [i for i, word in enumerate(words) if _LAUNCHES.search(" ".join(words[max(0, i - 1) : i + 1]))]
    if not places:
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{option}", f"--{option.replace('_', '-')}", dest="value")
    try:
        return parser.parse_known_args(words[places[0] + 1 :])[0].value
    except argparse.ArgumentError:  # an option without a value
        return None


def _is_same(asked: str, value: object) -> bool:
    """Whether a launcher's word means an option's value: "1.0" is 1."""
    if isinstance(value, int | float):
        try:
            return float(asked) == value
        except ValueError:
            return False
    return asked == str(value)

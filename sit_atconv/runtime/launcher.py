"""What `accelerate launch` says by environment variables that a command's own options say, too."""

import os
from dataclasses import dataclass

from sit_atconv.errors import InputError

_PREFIX = "ACCELERATE_"
_NOTHING = ("none", "auto")


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
    asked = os.environ.get(_PREFIX + option.upper(), default).lower()
    return None if asked in (default, *_NOTHING) else asked


def _is_same(asked: str, value: object) -> bool:
    """Whether a launcher's word means an option's value: "1.0" is 1."""
    if isinstance(value, int | float):
        try:
            return float(asked) == value
        except ValueError:
            return False
    return asked == str(value)

"""Command lines: numbers within limits, and mistakes as one paragraph, told once however many processes there are."""

import os
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import NoReturn

from sit_atconv.errors import InputError, exit_on_input_error

MOST = 10**12  # of anything that is counted
_MOST_WORKERS = 1_024


class Parser(ArgumentParser):
    """argparse's own, without abbreviated options; a mistake ends the command with one paragraph and code 2.

    `refuse`: what to do with that paragraph instead, such as raising an error where the options come from a file.
    """

    def __init__(self, *arguments: object, refuse: Callable[[str], NoReturn] | None = None, **options: object) -> None:
        super().__init__(*arguments, allow_abbrev=False, **options)
        self._refuse = refuse

    def error(self, message: str) -> NoReturn:
        (self._refuse or refuse)(f"{message.rstrip('.')}. All options: {self.prog} --help")


def refuse(message: str) -> NoReturn:
    """End a command whose arguments cannot be used, with code 2; of several processes one says why."""
    with exit_on_input_error():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from sit_atconv.runtime.processes import leaving_in_order  # torch takes seconds

            with leaving_in_order():
                raise InputError(message)
        raise InputError(message)


def whole_number(least: int, most: int = MOST) -> Callable[[str], int]:
    """What turns a word of the command line into a whole number from `least` to `most`.

    It raises `ArgumentTypeError`, which argparse reports, for any other word.
    """

    def read(word: str) -> int:
        if not word.isdecimal() or len(word) > len(str(most)) or not least <= int(word) <= most:
            raise ArgumentTypeError(f"'{_short(word)}' is not a whole number from {least} to {most}")
        return int(word)

    return read


count, workers = whole_number(1), whole_number(0, _MOST_WORKERS)


def _short(word: str) -> str:
    return word if len(word) <= 40 else f"{word[:40]}…"

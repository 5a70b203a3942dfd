"""Run the checks on a token mixer that every mixer of this package passes.

    python -m sit_atconv.models.check NAME | MODULE:CLASS [--options '{"kernel_size": 5}'] [--dim 64] [--num-heads 4]

Each check prints a line, with the reason if it fails; the exit code is then 1. Forward-mode derivatives are reported,
not required. The cost is the time relative to attention on this machine, with one thread.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.models.check.checks import CHECKS, REPORTED, Subject, costs, failure
from sit_atconv.models.mixers.plugins import find_plugins, import_offered, import_plugins
from sit_atconv.models.mixers.registry import check_options, find_mixer, list_mixers, register_mixer


def find_name(what: str) -> str:
    """The registered name of the mixer `what`: a name, or MODULE:CLASS, which is imported and registered if necessary.

    Raises `InputError` when there is no such mixer.
    """
    module, _, class_name = what.partition(":")
    if not class_name:
        find_plugins([what])
        import_offered([what])
        find_mixer(what)
        return what
    import_plugins([module])
    found = getattr(importlib.import_module(module), class_name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InputError(f"{module} has no class {class_name} that is a torch.nn.Module.")
    name = next((name for name in list_mixers() if find_mixer(name) is found), class_name)
    register_mixer(name)(found)
    return name


def run_checks(subject: Subject) -> bool:
    """Run all checks and write a line for each. Returns whether the required ones passed."""
    passed = True
    for name, check in CHECKS.items():
        reason = failure(check, subject)
        passed = passed and reason is None
        _say(name, "passed" if reason is None else f"FAILED: {reason}")
    for name, check in REPORTED.items():
        reason = failure(check, subject)
        _say(name, "yes" if reason is None else f"no: {reason}")
    if passed:
        _say("time over attention's, forward | with gradients", costs(subject))
    return passed


def _say(name: str, found: str) -> None:
    sys.stdout.write(f"{name:<50} {found}\n")
    sys.stdout.flush()


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON ({error})") from None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f'{text} is not an object of options: expected {{"name": value, …}}')
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    usage, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        "python -m sit_atconv.models.check", description=usage, epilog=details.split("\n\n")[1], allow_abbrev=False
    )
    parser.add_argument("mixer", help="a registered name, or MODULE:CLASS")
    parser.add_argument("--options", type=_options, default={}, metavar="JSON", help="options of the mixer")
    parser.add_argument("--dim", type=int, default=64, help="width C (default 64)")
    parser.add_argument("--num-heads", type=int, default=4, help="attention heads (default 4)")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    with exit_on_input_error():
        name = find_name(given.mixer)
        subject = Subject(name, check_options(name, given.options), given.dim, given.num_heads)
        subject.model()  # a size or option that the mixer rejects is the user's mistake, not the mixer's
        sys.exit(0 if run_checks(subject) else 1)


if __name__ == "__main__":
    main()

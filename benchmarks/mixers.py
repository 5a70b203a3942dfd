"""The option --mixers of the benchmarks that compare registered mixers."""

import argparse

from sit_atconv.models.mixers import list_mixers


def add_mixers(parser: argparse.ArgumentParser) -> None:
    """The option --mixers: names of registered mixers, an empty list for all of them, None if it is not given."""
    what = "compare these registered mixers; without names, all of them"
    parser.add_argument("--mixers", nargs="*", choices=list_mixers(), metavar="NAME", help=what)

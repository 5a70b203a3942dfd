"""New mixers in a trained network: `python -m sit_atconv.graft CHECKPOINT OUT --mixer-pattern hybrid --data DATA`.

Each new mixer is fitted to the outputs of the old one on noised latents (arXiv 2506.05340). OUT then opens in sample.py
and in train.py --model.init_from, which trains the whole network on. The same command continues an interrupted fit.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import yaml

from sit_atconv.config.strict_yaml import load_strict_yaml
from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.graft.run import graft_to_directory
from sit_atconv.graft.settings import LOSSES, GraftSettings
from sit_atconv.models.mixers import import_plugins
from sit_atconv.models.mixers.pattern import Pattern
from sit_atconv.runtime.arguments import Parser, count, workers
from sit_atconv.runtime.processes import leaving_in_order
from sit_atconv.runtime.reading import understand
from sit_atconv.sampling.arguments import seed
from sit_atconv.sampling.settings import PRECISIONS


def _parser() -> Parser:
    summary, details = __doc__.split("\n\n")
    parser = Parser(prog="python -m sit_atconv.graft", description=summary.split(":")[0] + ".", epilog=details)
    add, default = parser.add_argument, GraftSettings()
    add("checkpoint", type=Path, help="a model directory, or a checkpoint that holds one")
    add("out", type=Path, help="directory of the graft, for sample.py and train.py --model.init_from")
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--mixer-pattern", metavar="P", help="as model.mixer_pattern of train.py: atconv, hybrid, '[…]'")
    kinds.add_argument("--self", action="store_true", dest="same", help="new mixers of the same kinds, as a test")
    add("--data", required=True, help="prepared data, or digits[:train|:heldout][@resolution]")
    add("--weights", metavar="NAME", help="of the checkpoint's: raw (in training), or an average: 0.9999, ...")
    add("--steps", type=count, default=default.steps, help="optimizer steps (default: %(default)s)")
    add("--batch-size", type=count, default=default.batch_size, help="over all processes (default: %(default)s)")
    add("--lr", type=float, default=default.lr, help="in the first quarter; it halves with each (default: %(default)s)")
    add("--loss", choices=tuple(LOSSES), default=default.loss, help="between outputs (default: %(default)s)")
    add("--seed", type=seed, default=default.seed, help="of new weights, data order and noise (default: %(default)s)")
    add("--precision", choices=PRECISIONS, default=default.precision, help="bf16 runs the networks in autocast")
    add("--workers", type=workers, default=2, help="loader processes (default: %(default)s)")
    add("--plugins", nargs="+", default=[], metavar="MODULE", help="modules that register mixers of your own")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    given = vars(_parser().parse_args(argv))
    with exit_on_input_error(), leaving_in_order():
        settings = GraftSettings(**{field.name: given.pop(field.name) for field in fields(GraftSettings)})
        import_plugins(given.pop("plugins"))
        word, same = given.pop("mixer_pattern"), given.pop("same")
        graft_to_directory(pattern=None if same else read_pattern(word), settings=settings, **given)


def read_pattern(word: str) -> Pattern:
    """A pattern from the command line: a name, or a list in YAML or JSON. Raises `InputError` for anything else."""
    try:
        value = load_strict_yaml(word)
    except yaml.YAMLError as error:
        raise InputError(f"--mixer-pattern {word}: this is not YAML ({' '.join(str(error).split())}).") from None
    return understand(value, str | list[str | dict], "--mixer-pattern", "Give a mixer, hybrid, or a list of entries.")


if __name__ == "__main__":
    main()

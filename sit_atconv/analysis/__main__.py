"""What token mixers do: `python -m sit_atconv.analysis WHAT MODEL --images SOURCE --out DIR`.

routing: which positions influence the output at anchors, how far away they are (FAR), and arrows to them. inhibition:
how much influence the others lose when an anchor is raised. contrast, rank: of every layer's output, with and without
lateral inhibition. paths: the weights of ACmix's two paths over depth. MODEL is a network of sit_atconv.zoo, by name,
or a checkpoint of a SiT, whose --images are its data and which is looked at for each of --times. DIR gets WHAT.json and
figures.
"""

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from sit_atconv.analysis.curves import contrast_and_rank, paths
from sit_atconv.analysis.maps import routing_and_inhibition
from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.runtime.arguments import Parser, count
from sit_atconv.sampling.arguments import seed

log = logging.getLogger(__name__)

WHAT = {
    "routing": routing_and_inhibition,
    "inhibition": routing_and_inhibition,
    "contrast": contrast_and_rank,
    "rank": contrast_and_rank,
    "paths": paths,
}


def _parser() -> Parser:
    summary, details = __doc__.split("\n\n")
    parser = Parser(prog="python -m sit_atconv.analysis", description=summary.split(":")[0] + ".", epilog=details)
    add = parser.add_argument
    add("what", choices=tuple(WHAT))
    add("model", help="a network of sit_atconv.zoo, or a checkpoint of a SiT")
    add("--images", metavar="SOURCE", help="pictures, or the data of a SiT (paths needs none)")
    add("--out", type=Path, required=True, help="folder of the numbers and figures")
    add("--weights", type=Path, help="file of a network's weights; without it they are random")
    add(
        "--without",
        metavar="MODEL",
        help="a model that was trained without inhibition, to compare with (contrast, rank)",
    )
    add("--without-weights", type=Path, help="file of its weights")
    add("--count", type=count, default=4, help="images (default: %(default)s)")
    add("--times", type=float, nargs="+", default=[0.2, 0.5, 0.8], help="of a SiT (default: 0.2 0.5 0.8)")
    add("--radius", type=float, default=1.5, help="in positions, of FAR (default: %(default)s, the reach of 3×3)")
    add("--channels", type=count, default=8, help="output channels to average over (default: %(default)s)")
    add("--layers", type=count, default=6, help="layers in a figure, evenly chosen (default: %(default)s)")
    add("--epsilon", type=float, default=1.0, help="by how much an anchor is raised (default: %(default)s)")
    add("--seed", type=seed, default=0, help="of noise, channels and random weights (default: %(default)s)")
    return parser


def _check(options: Namespace) -> None:
    if options.images is None and options.what != "paths":
        raise InputError(f"{options.what} looks at what a model does with images: give --images.")
    if not all(0 <= t <= 1 for t in options.times):
        raise InputError(f"--times lie between 0 (data) and 1 (noise), not {options.times}.")
    if options.radius < 0 or not options.epsilon > 0:
        raise InputError("--radius must not be negative, and --epsilon must be positive.")
    if options.without is not None and options.what not in ("contrast", "rank"):
        raise InputError(f"--without is for contrast and rank, not for {options.what}.")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _parser().parse_args(argv)
    with exit_on_input_error():
        _check(options)
        WHAT[options.what](options)
        log.info("Written to %s.", options.out)


if __name__ == "__main__":
    main()

"""Draw samples from a checkpoint: `python sample.py --checkpoint RUN/checkpoints/latest/model --out OUT`."""

from sit_atconv.runtime.terminal import leave_when_interrupted

if __name__ == "__main__":
    leave_when_interrupted()  # Ctrl-C while the rest is imported

from collections.abc import Sequence
from pathlib import Path

from sit_atconv.errors import exit_on_input_error
from sit_atconv.runtime.arguments import Parser, count
from sit_atconv.runtime.processes import leaving_in_order
from sit_atconv.sampling import sample_to_directory
from sit_atconv.sampling.arguments import add_sampling_arguments, split_sampling_arguments


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a model directory, or a checkpoint that holds one")
    add("--out", type=Path, required=True, help="directory for samples.npz, grid.png and, with --png, png/")
    add("--png", action="store_true", help="write every sample as a PNG too")
    add("--batch-size", type=count, default=64, help="for each process; does not change the samples")
    add_sampling_arguments(parser, weights="--weights")
    given = vars(parser.parse_args(argv))
    with exit_on_input_error(), leaving_in_order():
        settings, rest = split_sampling_arguments(given)
        sample_to_directory(settings=settings, **rest)


if __name__ == "__main__":
    main()

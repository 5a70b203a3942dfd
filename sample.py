"""Draw samples from a checkpoint: `python sample.py --checkpoint RUN/checkpoints/latest/model --out OUT`."""

from sit_atconv.runtime.terminal import begin_command

if __name__ == "__main__":
    begin_command()  # Ctrl-C while the rest is imported

import sys
from collections.abc import Sequence

from sit_atconv.errors import exit_on_input_error
from sit_atconv.runtime.processes import leaving_in_order
from sit_atconv.sampling import sample_to_directory
from sit_atconv.sampling.arguments import sample_parser, split_sampling_arguments


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--sweep" for word in words):
        from sit_atconv.study.sweep import main as sweep

        sweep(words)
        return
    epilog = "With --sweep KEY=VALUE,VALUE it scores a grid of settings instead: sample.py --sweep --help."
    given = vars(sample_parser(description=__doc__, epilog=epilog).parse_args(words))
    with exit_on_input_error(), leaving_in_order():
        settings, rest = split_sampling_arguments(given)
        sample_to_directory(settings=settings, **rest)


if __name__ == "__main__":
    main()

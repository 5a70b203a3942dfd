"""`python -m sit_atconv.zoo.train --config configs/attnet_t2.yaml --run runs/attnet [--section.key value ...]`."""

from collections.abc import Sequence

from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.runtime.arguments import refuse
from sit_atconv.runtime.terminal import begin_command

PROGRAM = "python -m sit_atconv.zoo.train"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    with exit_on_input_error():
        from sit_atconv.config import ImageConfig, parse_command_line

        try:
            config, run, resume = parse_command_line(argv, kind=ImageConfig, program=PROGRAM)
        except InputError as error:
            refuse(str(error))
        if run is None:
            refuse("Say where the run shall live: --run runs/NAME. The same --run again continues it.")
        # Imported after the flags are known to be right: torch takes seconds
        from sit_atconv.runtime.processes import leaving_in_order
        from sit_atconv.zoo.train.trainer import train

        with leaving_in_order():
            train(config, run, resume, ends_process=True)


if __name__ == "__main__":
    begin_command()
    main()

"""Train a SiT: `python train.py --config configs/quickstart.yaml --run runs/first [--section.key value ...]`."""

from collections.abc import Sequence

from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.runtime.arguments import refuse
from sit_atconv.runtime.terminal import begin_command


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_input_error():
        from sit_atconv.config import parse_command_line

        try:
            config, run, resume = parse_command_line(argv)
        except InputError as error:
            refuse(str(error))
        if run is None:
            refuse("Say where the run shall live: --run runs/NAME. The same --run again continues it.")
        # Imported after the flags are known to be right: torch takes seconds
        from sit_atconv.runtime.processes import leaving_in_order
        from sit_atconv.training import train

        with leaving_in_order():
            train(config, run, resume, ends_process=True)


if __name__ == "__main__":
    begin_command()
    main()

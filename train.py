"""Train a SiT: `python train.py --config configs/quickstart.yaml --run runs/first [--section.key value ...]`."""

from collections.abc import Sequence

from sit_atconv.errors import exit_on_input_error
from sit_atconv.runtime.terminal import begin_command


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_input_error():
        from sit_atconv.config import training_command

        config, run, resume = training_command(argv)
        # Imported after the flags are known to be right: torch takes seconds
        from sit_atconv.runtime.processes import leaving_in_order
        from sit_atconv.training import train

        with leaving_in_order():
            train(config, run, resume, ends_process=True)


if __name__ == "__main__":
    begin_command()
    main()

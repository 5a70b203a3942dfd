"""An average of any width from a run's snapshots: `python -m sit_atconv.training.power_ema RUN OUT --width 0.12`."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from sit_atconv.errors import exit_on_input_error
from sit_atconv.runtime.whole_files import require_free, whole_folder
from sit_atconv.training.averages.power_ema import reconstruct


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser(
        prog="python -m sit_atconv.training.power_ema", description=__doc__.split(":")[0] + ".", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="a run trained with training.power_ema")
    parser.add_argument("out", type=Path, help="directory for the model, as of sample.py --checkpoint")
    parser.add_argument("--width", type=float, required=True, help="standard deviation of the average, of the run")
    parser.add_argument("--step", type=int, help="of a snapshot; the last one by default")
    options = parser.parse_args(argv)
    with exit_on_input_error():
        require_free(options.out)
        model = reconstruct(options.run / "ema", options.width, options.step)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(options.out) as unfinished:
            model.save_pretrained(unfinished)


if __name__ == "__main__":
    main()

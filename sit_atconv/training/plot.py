"""Curves of one or several runs: `python -m sit_atconv.training.plot RUN [RUN ...] [--out curves.png]`."""

import logging
from collections.abc import Sequence
from pathlib import Path

from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.figures import pyplot_without_screen, save_figure
from sit_atconv.runtime.arguments import Parser
from sit_atconv.runtime.whole_files import make_folder_of
from sit_atconv.training.run.log import read_log

log = logging.getLogger(__name__)

PANELS = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "images_per_second": "images/s",
}


def curves(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each panel's quantity in a run's log. Raises `InputError` when there is none."""
    path = run / "log.jsonl"
    if not path.is_file():
        raise InputError(f"{run} is not a training run: there is no log.jsonl in it.")
    lines = read_log(path)
    found = {}
    for name in PANELS:
        points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
        found[name] = ([step for step, _ in points], [value for _, value in points])
    if not found["loss"][0]:
        raise InputError(f"{path} holds no steps yet: wait for its first line.")
    return found


def draw(runs: Sequence[Path], out: Path) -> None:
    """Draw the panels side by side with one colour a run, and write a PNG."""
    pyplot = pyplot_without_screen()
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4), layout="constrained")
    found = [curves(run) for run in runs]
    for run, drawn in zip(runs, found, strict=True):
        for axis, (steps, values) in zip(axes, drawn.values(), strict=True):
            axis.plot(steps, values, label=run.name, marker="." if len(steps) < 30 else None)
    for axis, title in zip(axes, PANELS.values(), strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    for axis, name in list(zip(axes, PANELS, strict=True))[:2]:
        values = [value for drawn in found for value in drawn[name][1]]
        axis.set_yscale("log" if min(values, default=1) > 0 else "linear")  # the loss of meanflow is a logarithm
    axes[0].legend()
    save_figure(figure, out, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m sit_atconv.training.plot", description="Curves of training runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    options = parser.parse_args(argv)
    with exit_on_input_error():
        make_folder_of(options.out)
        draw(options.runs, options.out)
        log.info("%s", options.out)


if __name__ == "__main__":
    main()

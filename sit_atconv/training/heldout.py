"""The held-out loss of a checkpoint: `python -m sit_atconv.training.heldout CHECKPOINT --data DATA [--share 0.05]`.

It is the number that a run with `evaluation.loss` has logged for that step, to the last bit on the same device.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.latents import refuse_damaged
from sit_atconv.data.part import hold_out
from sit_atconv.errors import exit_on_input_error
from sit_atconv.models.checkpoint import find_weights, load_model
from sit_atconv.runtime.arguments import Parser, count
from sit_atconv.runtime.processes import leaving_in_order, process_state
from sit_atconv.runtime.whole_files import make_folder_of, write_json
from sit_atconv.training.session.heldout import require_measurable
from sit_atconv.training.watch.heldout_loss import TIMES, HeldOutLoss

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m sit_atconv.training.heldout", description=__doc__.split(":")[0] + ".")
    add = parser.add_argument
    add("checkpoint", type=Path, help="a model directory, or a checkpoint that holds one")
    add("--data", required=True, help="prepared data, or digits[:train|:heldout][@resolution]")
    add("--share", type=share, help="measure on the share that a run with this data.heldout holds out (default: all)")
    add("--weights", metavar="NAME", help="of the checkpoint's: raw (in training), or an average: 0.9999, ...")
    add("--batch-size", type=count, default=64, help="for each process; does not change the result")
    add("--json", type=Path, help="file for the result")
    options = parser.parse_args(argv)
    with exit_on_input_error(), leaving_in_order():
        measure(**vars(options))


def share(word: str) -> float:
    """A share from a word of the command line. Raises `ArgumentTypeError` unless it is between 0 and 1."""
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"'{word[:40]}' is not a share between 0 and 1, such as 0.05")
    return number


def measure(
    checkpoint: Path, data: str, share: float | None, weights: str | None, batch_size: int, json: Path | None
) -> None:
    """Measure the held-out loss on all processes; the main one logs it, and writes it to the file `json`.

    Raises `InputError` for a checkpoint or data that cannot be used.
    """
    if json is not None:
        make_folder_of(json)
    state = process_state()
    chosen, model = find_weights(checkpoint, weights), load_model(checkpoint, weights).float()
    dataset = open_dataset(data)
    refuse_damaged(dataset.damaged() if state.is_local_main_process else ())
    if share is not None:
        _, dataset = hold_out(dataset, share)
    require_measurable(model, dataset, data)
    scores = HeldOutLoss(dataset, batch_size, state).scores(model.to(state.device), state.is_main_process)
    if not state.is_main_process:
        return
    loss, *losses = scores.values()
    log.info("Held-out loss of %s: %s, %d pictures", chosen, loss, len(dataset))
    if json is not None:
        times = {f"{time:g}": value for time, value in zip(TIMES, losses, strict=True)}
        origin = {"checkpoint": str(checkpoint), "weights": chosen.name, "step": chosen.step}
        facts = {"images": len(dataset), **origin, "data": data, "share": share}
        write_json(json, {"heldout_loss": loss, "times": times, **facts})


if __name__ == "__main__":
    main()

"""Top-1 and top-5 accuracy: `python -m sit_atconv.zoo.validate MODEL --data DATA [--checkpoint FILE] [--json OUT]`.

Crop, interpolation, mean and standard deviation are those of the network's pretrained_cfg, or of the options.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from sit_atconv.errors import exit_on_input_error
from sit_atconv.models.mixers import import_plugins
from sit_atconv.runtime.arguments import Parser, count, whole_number, workers
from sit_atconv.runtime.cpu import chosen_workers
from sit_atconv.runtime.processes import leaving_in_order, process_state
from sit_atconv.runtime.terminal import begin_command
from sit_atconv.runtime.whole_files import make_folder_of, write_json
from sit_atconv.zoo.validate.loading import load_network, require_size
from sit_atconv.zoo.validate.pictures import open_pictures
from sit_atconv.zoo.validate.scoring import Validation, view_of

log = logging.getLogger(__name__)

_INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m sit_atconv.zoo.validate", description=__doc__.split(":")[0] + ".")
    add = parser.add_argument
    add("model", help="a run's checkpoints/latest/model, or a name of timm or ours (docs/zoo.md) with --checkpoint")
    add("--data", required=True, help="pictures with classes: class folders, a zip of them, hf:NAME:SPLIT, ...")
    add("--share", type=share, help="measure on the share that a run with this data.heldout holds out (default: all)")
    add("--checkpoint", type=Path, help="file of weights for a network by name: ours, or a release's .pth")
    add("--weights", metavar="NAME", help="raw: those in training of a run; or the key of a release's file: model_ema")
    add("--plugins", nargs="+", default=(), metavar="MODULE", help="modules that register mixers of your own")
    add("--image-size", type=whole_number(1, 4096), help="side of the square that the network sees")
    add("--crop-pct", type=share, help="that side over the shorter side of the resized picture")
    add("--interpolation", choices=_INTERPOLATIONS, help="of resizing")
    add("--mean", type=float, nargs=3, help="of each channel, for normalisation")
    add("--std", type=float, nargs=3, help="of each channel, for normalisation")
    add("--batch-size", type=count, default=64, help="for each process; does not change the result")
    add("--workers", type=workers, help="loader processes for each process; by default as many as help")
    add("--json", type=Path, help="file for the result")
    options = parser.parse_args(argv)
    with exit_on_input_error(), leaving_in_order():
        measure(options)


def share(word: str) -> float:
    """A share from a word of the command line. Raises `ArgumentTypeError` unless it is in (0, 1]."""
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"'{word[:40]}' is not a share above 0 and up to 1, such as 0.875")
    return number


def measure(options: argparse.Namespace) -> None:
    """Measure a network on all processes; the main one logs the result, and writes it to the file `options.json`.

    Raises `InputError` for network, weights or data that cannot be used or do not agree.
    """
    if options.json is not None:
        make_folder_of(options.json)
    state = process_state()
    import_plugins(options.plugins)
    pictures = open_pictures(options.data)
    if options.share is not None:
        _, pictures = pictures.split(options.share)
    model = load_network(options.model, options.checkpoint, options.weights, pictures.num_classes)
    names = ("image_size", "crop_pct", "interpolation", "mean", "std")
    view = view_of(model, **{name: getattr(options, name) for name in names})
    require_size(model, view.image_size, options.model)
    with torch.inference_mode():
        validation = Validation(
            pictures, view, options.batch_size, chosen_workers(options.workers, state.device), state
        )
        scores = validation.scores(model.to(state.device))
    if not state.is_main_process:
        return
    log.info(
        "%s: top-1 %.2f %%, top-5 %.2f %%, loss %.4f, %d pictures",
        options.model, scores["top1"], scores["top5"], scores["loss"], len(pictures),
    )  # fmt: skip
    if options.json is not None:
        origin = {name: getattr(options, name) for name in ("model", "checkpoint", "weights", "data", "share")}
        write_json(options.json, {**scores, "images": len(pictures), **vars(view), **origin})


if __name__ == "__main__":
    begin_command()
    main()

"""FID, sFID, IS, precision and recall: `python evaluate_fid.py --samples OUT/samples.npz --reference REF.npz`."""

import sys
from argparse import SUPPRESS, ArgumentParser, Namespace

import torch
from accelerate import PartialState

from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.evaluation.command import parse, run
from sit_atconv.evaluation.evaluate import SampleStream
from sit_atconv.evaluation.loading import share
from sit_atconv.sampling import SOLVERS, SamplerSettings, generate, open_generator


def add_sampling(parser: ArgumentParser) -> list[str]:
    """Add the options of --checkpoint, absent unless given; return their names."""
    text = "as in sample.py, with the same defaults"
    add = parser.add_argument_group("with --checkpoint", text, argument_default=SUPPRESS).add_argument
    added = [
        add("--num-samples", type=int),
        add("--labels"),
        add("--seed", type=int),
        add("--solver", choices=SOLVERS),
        add("--steps", type=int),
        add("--guidance", type=float),
        add("--interval", type=float, nargs=2, metavar=("LOW", "HIGH")),
        add("--guidance-channels", type=int),
        add("--precision", choices=("no", "bf16")),
        add("--vae"),
    ]
    return [action.dest for action in added]


def open_stream(options: Namespace, device: torch.device) -> SampleStream:
    """This process's share of the samples of a checkpoint."""
    given = {name: value for name, value in vars(options).items() if name in options.sampling}
    facts = {"path": str(options.checkpoint), "kind": "checkpoint", "num_samples": 50_000, **given}
    count, vae = given.pop("num_samples", 50_000), given.pop("vae", None)
    draw = {name: given.pop(name) for name in ("labels", "seed") if name in given}
    if count < 1:
        raise InputError("--num-samples must be at least 1.")
    state = PartialState()
    mine = share(count, state.process_index, state.num_processes)
    model, autoencoder = open_generator(options.checkpoint, vae, device)
    settings = SamplerSettings(**{**given, "interval": tuple(given.get("interval", (0.0, 1.0)))})
    batches = generate(model, autoencoder, mine, settings, **draw, batch_size=options.batch_size)
    return SampleStream(batches, mine.start, len(mine), facts)


def main() -> None:
    options = parse(sys.argv[1:], add_sampling)
    with exit_on_input_error():
        run(options, open_stream)


if __name__ == "__main__":
    main()

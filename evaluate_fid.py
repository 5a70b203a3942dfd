"""FID, sFID, IS, precision and recall: `python evaluate_fid.py --samples OUT/samples.npz --reference REF.npz`."""

import sys
from argparse import ArgumentParser, Namespace

import torch
from accelerate import PartialState

from sit_atconv.errors import exit_on_input_error
from sit_atconv.evaluation.command import parse, run
from sit_atconv.evaluation.evaluate import SampleStream
from sit_atconv.evaluation.loading import share
from sit_atconv.sampling import SOLVERS, SamplerSettings, generate, open_generator


def add_sampling(parser: ArgumentParser) -> None:
    """The options that --checkpoint takes, as sample.py has them."""
    add = parser.add_argument_group("with --checkpoint", "see sample.py for more").add_argument
    add("--num-samples", type=int, default=50_000)
    add("--labels", default="balanced")
    add("--seed", type=int, default=0)
    add("--solver", choices=SOLVERS, default="heun")
    add("--steps", type=int, default=50)
    add("--guidance", type=float, default=1.0)
    add("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"))
    add("--guidance-channels", type=int)
    add("--precision", choices=("no", "bf16"), default="no")
    add("--vae")


def open_stream(options: Namespace, device: torch.device) -> SampleStream:
    """This process's share of the samples of a checkpoint."""
    model, autoencoder = open_generator(options.checkpoint, options.vae, device)
    names = ("solver", "steps", "guidance", "guidance_channels", "precision")
    settings = SamplerSettings(interval=tuple(options.interval), **{name: getattr(options, name) for name in names})
    state = PartialState()
    mine = share(options.num_samples, state.process_index, state.num_processes)
    batches = generate(
        model, autoencoder, mine, settings, labels=options.labels, seed=options.seed, batch_size=options.batch_size
    )
    facts = {name: getattr(options, name) for name in (*names, "interval", "num_samples", "labels", "seed")}
    facts |= {"path": str(options.checkpoint), "kind": "checkpoint"}
    return SampleStream(batches, mine.start, len(mine), facts)


def main() -> None:
    options = parse(sys.argv[1:], add_sampling)
    with exit_on_input_error():
        run(options, open_stream)


if __name__ == "__main__":
    main()

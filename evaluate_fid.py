"""FID, sFID, IS, precision and recall: `python evaluate_fid.py --samples OUT/samples.npz --reference REF.npz`."""

from sit_atconv.runtime.terminal import begin_command

if __name__ == "__main__":
    begin_command()  # Ctrl-C while the rest is imported

import sys
from argparse import Namespace

import torch
from accelerate import PartialState

from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.evaluation.command import parse, run
from sit_atconv.evaluation.evaluate import SampleStream
from sit_atconv.evaluation.reading.loading import share
from sit_atconv.models.checkpoint import find_weights, load_model
from sit_atconv.runtime.processes import leaving_in_order
from sit_atconv.sampling import generate, open_generator
from sit_atconv.sampling.arguments import add_sampling_arguments, split_sampling_arguments


def open_stream(options: Namespace, device: torch.device) -> SampleStream:
    """This process's share of the samples of a checkpoint, as sample.py draws them."""
    settings, rest = split_sampling_arguments({name: vars(options)[name] for name in options.sampling})
    if rest["num_samples"] < 2:
        raise InputError(f"--num-samples must be at least 2, not {rest['num_samples']}: one sample has no covariance.")
    state = PartialState()
    mine = share(rest["num_samples"], state.process_index, state.num_processes)
    weights = rest.pop("checkpoint_weights", None)
    model, autoencoder = open_generator(options.checkpoint, rest.get("vae"), device, weights)
    weak = load_model(rest["weak_checkpoint"]).to(device) if "weak_checkpoint" in rest else None
    draw = {name: rest[name] for name in ("labels", "seed") if name in rest}
    batches = generate(model, autoencoder, mine, settings, **draw, batch_size=options.batch_size, weak=weak)
    facts = {
        "path": str(options.checkpoint),
        "kind": "checkpoint",
        "weights": find_weights(options.checkpoint, weights).name,
    }
    facts |= {**rest, **settings.to_dict()}
    return SampleStream(batches, mine.start, len(mine), facts, model.classes if model.num_classes else None)


def main() -> None:
    if sys.argv[1:2] == ["table"]:
        from sit_atconv.study.table import main as table

        table(sys.argv[2:])
        return
    options = parse(sys.argv[1:], add_sampling_arguments)
    with exit_on_input_error(), leaving_in_order():
        run(options, open_stream)


if __name__ == "__main__":
    main()

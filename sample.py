"""Draw samples from a checkpoint: `python sample.py --checkpoint RUN/checkpoints/latest/model --out OUT`."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from sit_atconv.errors import exit_on_input_error
from sit_atconv.flow import DIFFUSIONS, LAST_STEPS
from sit_atconv.sampling import SOLVERS, SamplerSettings, sample_to_directory


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a model directory, or a checkpoint that holds one")
    add("--out", type=Path, required=True, help="directory for samples.npz, grid.png and, with --png, png/")
    add("--num-samples", type=int, default=50_000)
    add("--labels", default="balanced", help="balanced, random, or labels separated by commas, taken in turn")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=64, help="for each process; does not change the samples")
    add("--solver", choices=SOLVERS, default="heun")
    add("--steps", type=int, default=50)
    add("--guidance", type=float, default=1.0, help="guidance scale; 1 is none")
    add("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"), help="times with guidance")
    add("--guidance-channels", type=int, help="guide the first so many latent channels only (3: as DiT and SiT do)")
    add("--shift", type=float, default=1.0, help="timestep shift of the ODE solvers")
    add("--diffusion", choices=DIFFUSIONS, default="sigma", help="diffusion of the SDE")
    add("--diffusion-scale", type=float, default=1.0)
    add("--last-step", choices=LAST_STEPS, default="mean", help="last step of the SDE")
    add("--last-step-size", type=float, default=0.04)
    add("--precision", choices=("no", "bf16"), default="no", help="bf16 runs the network in autocast")
    add("--vae", help="decode with this autoencoder instead of the one the checkpoint names")
    add("--png", action="store_true", help="write every sample as a PNG too")
    flags = vars(parser.parse_args(argv))
    call = {name: flags.pop(name) for name in ("checkpoint", "out", "num_samples", "labels", "seed", "batch_size")}
    call |= {name: flags.pop(name) for name in ("vae", "png")}
    flags["interval"] = tuple(flags["interval"])
    with exit_on_input_error():
        sample_to_directory(settings=SamplerSettings(**flags), **call)


if __name__ == "__main__":
    main()

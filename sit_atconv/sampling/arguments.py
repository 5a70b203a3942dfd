"""The command-line options of sampling, shared by sample.py and evaluate_fid.py --checkpoint."""

from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from dataclasses import fields
from pathlib import Path
from typing import Any

from sit_atconv.flow import DIFFUSIONS, LAST_STEPS
from sit_atconv.randomness import MAX_SEED
from sit_atconv.sampling.settings import PRECISIONS, SOLVERS, SamplerSettings

NUM_SAMPLES = 50_000
_MOST = 10**12


def add_sampling_arguments(parser: ArgumentParser) -> list[str]:
    """Add the sampling options to `parser`, absent from its result unless given; returns their names."""
    add = parser.add_argument_group("drawing", argument_default=SUPPRESS).add_argument
    added = [
        add("--num-samples", type=count, help=f"{NUM_SAMPLES} unless given"),
        add("--labels", help="balanced (unless given), random, or labels separated by commas, taken in turn"),
        add("--seed", type=seed, help="0 unless given"),
        add("--vae", help="decode with this autoencoder instead of the one the checkpoint names"),
        add("--solver", choices=SOLVERS, help=_default("solver")),
        add("--steps", type=int, help=_default("steps")),
        add("--guidance", type=float, help="guidance scale; 1 is none, " + _default("guidance")),
        add("--weak-checkpoint", type=Path, help="guide away from this model (autoguidance), not from the null class"),
        add("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times with guidance"),
        add("--guidance-channels", type=int, help="guide only this many leading latent channels (3: as DiT and SiT)"),
        add("--shift", type=float, help="timestep shift of euler, heun and midpoint, " + _default("shift")),
        add("--atol", type=float, help="of dopri5, " + _default("atol")),
        add("--rtol", type=float, help="of dopri5, " + _default("rtol")),
        add("--diffusion", choices=DIFFUSIONS, help="of the SDE, " + _default("diffusion")),
        add("--diffusion-scale", type=float, help="of the SDE, " + _default("diffusion_scale")),
        add("--last-step", choices=LAST_STEPS, help="of the SDE, " + _default("last_step")),
        add("--last-step-size", type=float, help="of the SDE, " + _default("last_step_size")),
        add("--precision", choices=PRECISIONS, help="bf16 runs the network in autocast"),
        add("--compile", action="store_true", help="use torch.compile, which pays off in long runs on a GPU"),
    ]
    return [action.dest for action in added]


def split_sampling_arguments(given: dict[str, Any]) -> tuple[SamplerSettings, dict[str, Any]]:
    """Split the given options into sampler settings and the rest.

    The rest always contains `num_samples`; `labels`, `seed`, `vae`, `weak_checkpoint` and the parser's other options
    only if given.

    Raises `InputError` for options that do not go together.
    """
    names = {field.name for field in fields(SamplerSettings)}
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if name in names}
    rest = {name: value for name, value in given.items() if name not in names}
    return SamplerSettings(**settings), {"num_samples": NUM_SAMPLES, **rest}


def seed(word: str) -> int:
    """Parse a seed on the command line. Raises `ArgumentTypeError`, which argparse reports, for anything else."""
    if not word.isdecimal() or len(word) > len(str(MAX_SEED)) or int(word) > MAX_SEED:
        raise ArgumentTypeError(f"{word} is not a seed: give a whole number from 0 to {MAX_SEED}")
    return int(word)


def count(word: str) -> int:
    """Parse a number >= 1 on the command line. Raises `ArgumentTypeError` for anything else."""
    if not word.isdecimal() or not 1 <= int(word) <= _MOST:
        raise ArgumentTypeError(f"{word} is not a valid number: give a whole number from 1 to {_MOST}")
    return int(word)


def _default(name: str) -> str:
    return f"{getattr(SamplerSettings(), name)} unless given"

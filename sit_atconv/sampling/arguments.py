"""The command line of sample.py, whose options of drawing evaluate_fid.py --checkpoint has as well."""

from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from sit_atconv.flow import DIFFUSIONS, LAST_STEPS
from sit_atconv.flow.ode import MOST_STEPS
from sit_atconv.randomness import MAX_SEED
from sit_atconv.runtime.arguments import Parser, count, whole_number
from sit_atconv.runtime.launcher import Setting, require_same_from_launcher
from sit_atconv.sampling.settings import PRECISIONS, SOLVERS, SamplerSettings

NUM_SAMPLES = 50_000

seed, steps = whole_number(0, MAX_SEED), whole_number(1, MOST_STEPS)


def sample_parser(refuse: Callable[[str], NoReturn] | None = None, **options: Any) -> Parser:
    """The parser of sample.py; `refuse` and `options` are those of `Parser`."""
    parser = Parser(prog="sample.py", refuse=refuse, **options)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a model directory, or a checkpoint that holds one")
    add("--out", type=Path, required=True, help="directory for samples.npz, grid.png and, with --png, png/")
    add("--png", action="store_true", help="write every sample as a PNG too")
    add("--batch-size", type=count, default=64, help="for each process; does not change the samples")
    add_sampling_arguments(parser, weights="--weights")
    return parser


def add_sampling_arguments(parser: ArgumentParser, weights: str = "--checkpoint-weights") -> list[str]:
    """Add the sampling options to `parser`, absent from its result unless given; returns their names.

    `weights`: the name of the option that chooses among a checkpoint's weights.
    """
    add = parser.add_argument_group("drawing", argument_default=SUPPRESS).add_argument
    added = [
        add("--num-samples", type=count, help=f"{NUM_SAMPLES} unless given"),
        add(
            weights,
            metavar="NAME",
            help="of the checkpoint's: raw (in training), or an average: 0.9999, power-0.1, ...",
        ),
        add("--labels", help="balanced (unless given), random, or labels separated by commas, taken in turn"),
        add("--seed", type=seed, help="0 unless given"),
        add("--vae", help="decode with this autoencoder instead of the one the checkpoint names"),
        add("--solver", choices=SOLVERS, help=_default("solver")),
        add("--steps", type=steps, help=_default("steps")),
        add("--guidance", type=float, help="guidance scale; 1 is none, " + _default("guidance")),
        add("--weak-checkpoint", type=Path, help="guide away from this model (autoguidance), not from the null class"),
        add("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times with guidance"),
        add("--guidance-channels", type=count, help="guide the first so many latent channels only (3: as DiT and SiT)"),
        add("--shift", type=float, help="timestep shift of euler, heun, midpoint and meanflow, " + _default("shift")),
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

    The rest always contains `num_samples`; `weights`, `labels`, `seed`, `vae`, `weak_checkpoint` and the parser's other
    options only if given.

    Raises `InputError` for options that do not go together, or with what the launcher was told.
    """
    names = {field.name for field in fields(SamplerSettings)}
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if name in names}
    rest = {name: value for name, value in given.items() if name not in names}
    chosen = SamplerSettings(**settings)
    require_same_from_launcher(
        Setting("mixed_precision", "no", "precision", chosen.precision),
        Setting("dynamo_backend", "no", "compile"),  # which is another way to compile
    )
    return chosen, {"num_samples": NUM_SAMPLES, **rest}


def _default(name: str) -> str:
    return f"{getattr(SamplerSettings(), name)} unless given"

"""What models and mixers cost: forward passes, training steps, memory, operations, in turns within one run.

Every number is a median over turns, so that a slow moment of the machine affects all of them, and ratios are to the
first model. A step is the trainer's own. MiB are the peak of a call beyond the weights and the optimizer's state.
"""

import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from sit_atconv.config import Config, DataConfig, ModelConfig, TrainingConfig
from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.evaluation.output import show
from sit_atconv.models.flops import forward_flops
from sit_atconv.models.mixers import list_mixers
from sit_atconv.models.mixers.plugins import import_plugins
from sit_atconv.models.registry import create_model
from sit_atconv.models.sit import SiT
from sit_atconv.runtime.arguments import Parser, whole_number
from sit_atconv.runtime.measuring.memory import peak_mebibytes
from sit_atconv.runtime.measuring.records import command_line, machine, table, write_rows
from sit_atconv.runtime.measuring.timing import default_device, median_milliseconds
from sit_atconv.runtime.whole_files import make_folder_of
from sit_atconv.study.costs.passes import CHANNELS, CLASSES, forward_pass, trainers_step, write_noise
from sit_atconv.training.session.session import build_session

PASSES = ("forward", "step")
_STATE = 16  # bytes a weight: itself, Adam's two moments and an average, in fp32
_side, _images, _turns = whole_number(1, 4096), whole_number(1, 10**7), whole_number(1, 10**4)


@dataclass(frozen=True)
class Subject:
    """A model to measure at one size of latents; operations are of one forward pass of one latent (multiply-adds × 2).

    kept: bytes an image that training keeps at least, one number a channel, token and block.
    """

    config: ModelConfig
    parameters: int
    flops: int
    kept: int


def chosen_models(names: Sequence[str], mixers: Sequence[str] | None) -> dict[str, ModelConfig]:
    """By title: the named models, and the first of them with each of these mixers in all blocks.

    No `mixers` are all registered ones but the first model's own; None are none.
    """
    models = {name: ModelConfig(name) for name in names}
    own = _build(models[names[0]], 64).config.mixer_pattern
    every = [mixer for mixer in list_mixers() if mixer != own]
    chosen = () if mixers is None else mixers or every
    return models | {f"{names[0]} with {mixer}": ModelConfig(names[0], mixer_pattern=mixer) for mixer in chosen}


def examine(title: str, config: ModelConfig, latent: int) -> Subject:
    """What is known of a model without running it. Raises `InputError` for one that cannot be built for `latent`."""
    try:
        model = _build(config, latent)
    except InputError as error:
        raise InputError(f"{title} for latents of {latent}x{latent}: {error}") from error
    shape = model.config
    return Subject(
        config,
        sum(p.numel() for p in model.parameters()),
        forward_flops(model, (CHANNELS, latent, latent)),
        4 * shape.hidden_size * shape.depth * model.grid[0] * model.grid[1],
    )


def require_memory(subjects: Sequence[Subject], batch_size: int, device: torch.device) -> None:
    """Raise `InputError` if the models' state and the least that a step keeps need more memory than is free.

    All models are there at once, since they are measured in turns.
    """
    state = _STATE * sum(subject.parameters for subject in subjects)
    step = batch_size * max(subject.kept for subject in subjects)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if state + step > free:
        raise InputError(
            f"The weights and optimizer states of {len(subjects)} models take {state / 2**30:.1f} GiB, and a step of "
            f"{batch_size} images at least {step / 2**30:.1f} GiB more, but {free / 2**30:.1f} GiB are free. Take "
            "fewer or smaller models, smaller latents, or a smaller --batch-size. (Several runs with the same first "
            "model can be compared by their ratios.)"
        )


def measure(subjects: Mapping[str, Subject], latent: int, options: Namespace, device: torch.device) -> list[dict]:
    """Measure all models in turns at one size of latents; a row each. Raises `InputError` when memory runs out."""
    torch.compiler.reset()
    training = TrainingConfig(
        batch_size=options.batch_size,
        precision="bf16" if device.type == "cuda" else "no",
        compile=options.compile,
    )
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder), options.batch_size, latent)
        config = Config(data=DataConfig(folder, workers=0, verify=False), training=training)
        try:
            for title, subject in subjects.items():
                session = build_session(replace(config, model=subject.config), Path(folder))
                batch = next(iter(session.loader(0)))
                runs[title, "forward"] = forward_pass(session.model, options.batch_size, latent, device)
                runs[title, "step"] = partial(trainers_step, session, batch)
            milliseconds = median_milliseconds(runs, device, options.turns)
            mebibytes = {key: peak_mebibytes(run, device) for key, run in runs.items()}
        except RuntimeError as error:
            if not _is_shortage(error):
                raise
            raise InputError(
                f"Memory ran out with {len(subjects)} models at latents of {latent}x{latent} and batches of "
                f"{options.batch_size}. Take fewer models, smaller latents, or a smaller --batch-size."
            ) from error
    first = next(iter(subjects))
    return [
        {"model": title, "latent": latent, "parameters": subject.parameters, "flops": subject.flops}
        | {f"{what}_ms": milliseconds[title, what] for what in PASSES}
        | {f"{what}_ratio": round(milliseconds[title, what] / milliseconds[first, what], 4) for what in PASSES}
        | {f"{what}_mib": mebibytes[title, what] for what in PASSES}
        for title, subject in subjects.items()
    ]


def describe(rows: Sequence[dict], batch_size: int) -> str:
    """The rows as a Markdown table, with times for one image and ratios to the first model in brackets."""
    lines = []
    for row in rows:
        line = {
            "model": row["model"],
            "latent": row["latent"],
            "parameters": row["parameters"],
            "GFLOP an image": f"{row['flops'] / 1e9:.4g}",
        }
        for what in PASSES:
            line[f"{what}: ms an image"] = f"{row[f'{what}_ms'] / batch_size:.4g} ({row[f'{what}_ratio']:.2f})"
            line[f"{what}: MiB"] = "-" if row[f"{what}_mib"] is None else f"{row[f'{what}_mib']:.4g}"
        lines.append(line)
    return table(lines)


def _build(config: ModelConfig, latent: int) -> SiT:
    pattern = {} if config.mixer_pattern is None else {"mixer_pattern": config.mixer_pattern}
    with torch.device("meta"):
        return create_model(config.name, latent, CHANNELS, CLASSES, **pattern)


def _is_shortage(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)  # the latter on a CPU


def _parser() -> Parser:
    parser = Parser("python -m sit_atconv.study costs", description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="NAME", help="such as SiT-S/2; ratios are to the first")
    mixers = "also the first model with each of these registered mixers in all blocks; without names, every one"
    add("--mixers", nargs="*", metavar="NAME", help=mixers)
    add("--plugins", nargs="+", default=[], metavar="MODULE", help="import these, which register mixers of your own")
    add("--latents", nargs="+", type=_side, default=[32], metavar="SIDE", help="height and width of the latents (32)")
    add("--batch-size", type=_images, help="default: 2 on a CPU, 64 on a GPU")
    add("--compile", action="store_true", help="compile the repeated blocks with torch.compile")
    add("--turns", type=_turns, default=5, help="how often each is measured (5)")
    add("--json", type=Path, metavar="FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = _parser().parse_args(argv)
    with exit_on_input_error():
        device = default_device()
        options.batch_size = options.batch_size or (2 if device.type == "cpu" else 64)
        if options.json:
            make_folder_of(options.json)
        import_plugins(options.plugins)
        models = chosen_models(options.models, options.mixers)
        cases = {
            latent: {title: examine(title, config, latent) for title, config in models.items()}
            for latent in options.latents
        }
        for subjects in cases.values():
            require_memory(list(subjects.values()), options.batch_size, device)
        rows = []
        for latent, subjects in tqdm(cases.items(), unit="size", desc="latents"):
            rows += measure(subjects, latent, options, device)
        head = f"{machine(device)}, batch {options.batch_size}. MiB: peak beyond weights and optimizer state."
        show(f"{head}\n\n{describe(rows, options.batch_size)}\n")
        if options.json:
            facts = {"batch": options.batch_size, "compiled": options.compile, "turns": options.turns}
            write_rows(options.json, command_line(), device, rows, **facts)
            show(f"\nWritten to {options.json}.\n")

"""Compares a training step with those of SiT and REPA: `python -m benchmarks.training [--models NAME ...]`.

Ours is the step of the trainer: posterior sampling, teacher, forward and backward pass, clipping, fused AdamW, average
and the check for non-finite numbers. The originals are the transcriptions in `benchmarks.baselines` with the same
inputs, weights and teacher: SiT's for plain runs, REPA's for aligned ones. A teacher is live (run in every step) or
cached (its tokens are read with the data); its weights are random. Data are synthetic and in memory; `benchmarks.data`
measures reading. All contenders of a setting run in turns.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.baselines import OriginalTraining, ReleasedSiT
from benchmarks.output import write_json
from sit_atconv.alignment import Teacher
from sit_atconv.config import (
    AlignmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TeacherConfig,
    TrainingConfig,
)
from sit_atconv.data.shards.format import encode_png, pack_images, shard_name, write_shard
from sit_atconv.errors import exit_on_input_error
from sit_atconv.models import list_models
from sit_atconv.models.flops import training_flops
from sit_atconv.runtime.measuring.memory import peak_mebibytes
from sit_atconv.runtime.measuring.records import machine
from sit_atconv.runtime.measuring.timing import default_device, median_milliseconds
from sit_atconv.study.costs.passes import SPEC, save_dataset, trainers_step
from sit_atconv.training.session.session import Session, build_session
from sit_atconv.training.trainer import prepare_inputs
from sit_atconv.training.watch.throughput import peak_flops

DEFAULTS = {
    "cpu": {"models": ["SiT-S/2", "SiT-Hybrid-S/2", "SiT-ATConv-S/2"], "batch": 2, "teacher": "vit_tiny_patch16_224"},
    "cuda": {
        "models": ["SiT-XL/2", "SiT-Hybrid-XL/2", "SiT-ATConv-XL/2"],
        "batch": 64,
        "teacher": "vit_base_patch14_dinov2",
    },
}
SETTINGS = ("plain", "live", "cached")
DOWNSCALE = SPEC.downscale


class Contender(NamedTuple):
    """A step that returns its loss terms, the trained modules, and their averaged parameters by name."""

    step: Callable[[], dict[str, float | Tensor]]
    trained: nn.Module
    average: Callable[[], dict[str, Tensor]]


def main() -> None:
    device = default_device()
    options = parse(DEFAULTS[device.type])
    rows = []
    print(f"{machine(device)}, {options.precision}, batch {options.batch_size}, latents of {options.latent}.\n")
    header = ("step/s", "images/s", "MFU", "MiB", "ours")
    print(f"{'':17} {'':8} {'':8}" + "".join(f"{name:>10}" for name in header))
    for setting in options.settings:
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder), options.batch_size, options.latent, options.teacher)
            found = measure(setting, Path(folder), options, device)
        gc.collect()  # Accelerate's objects form cycles and hold device memory until they are collected
        print("\n".join(map(line, found)), flush=True)
        rows += found
    print("\nMiB: peak of a step beyond weights, Adam's moments and averages. Ours: how many times faster ours is.")
    write_json(options.json, device, rows, precision=options.precision, compiled=options.compile)


def parse(defaults: dict) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", default=defaults["models"], choices=list_models(), metavar="NAME")
    parser.add_argument("--latent", type=int, default=32, help="height and width of a latent, an eighth of the pixels")
    parser.add_argument("--batch-size", type=int, default=defaults["batch"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--teacher", default=defaults["teacher"], help="timm's name; its weights are random")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16" if torch.cuda.is_available() else "no")
    parser.add_argument("--compile", action="store_true", help="compile our step; the originals are not compiled")
    parser.add_argument("--ours", action="store_true", help="only our step, for models that do not fit twice")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("training.json"))
    return parser.parse_args()


def write_data(root: Path, count: int, latent: int, teacher: str) -> None:
    """Write a prepared data set of noise: latents, pictures and a teacher's tokens."""
    pixels, index = DOWNSCALE * latent, torch.arange(count)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (count, 3, pixels, pixels), generator=generator, dtype=torch.uint8)
    seen = Teacher(teacher, "random", default_device())
    tensors = {
        "moments": torch.randn(count, 8, latent, latent, generator=generator).half(),
        "tokens_0": torch.cat([seen.own_tokens(picture[None]) for picture in pictures]).half().cpu(),
        "labels": index % 1000,
        "index": index,
        **pack_images([encode_png(picture.permute(1, 2, 0).numpy()) for picture in pictures]),
    }
    shard = write_shard(root / shard_name(0), tensors)
    spec = seen.spec(pixels, pixels, flip=False)
    save_dataset(root, pixels, 1000, [shard], has_flip=False, has_images=True, teachers=[spec])


def configuration(model: str, setting: str, data: Path, options: argparse.Namespace) -> Config:
    """The published settings: SiT's without clipping, REPA's with clipping and a teacher."""
    teacher = TeacherConfig(options.teacher, "random", cached=setting == "cached")
    return Config(
        model=ModelConfig(model),
        data=DataConfig(str(data), workers=0),
        alignment=None if setting == "plain" else AlignmentConfig(teachers=[teacher]),
        optimizer=OptimizerConfig(clip_norm=None if setting == "plain" else 1.0),
        training=TrainingConfig(batch_size=options.batch_size, precision=options.precision, compile=options.compile),
    )


def contenders(config: Config, ours_alone: bool = False) -> tuple[Session, dict[str, Contender]]:
    """Our step and, unless `ours_alone`, the original one, on the same first batch and from the same weights."""
    session = build_session(config, Path(config.data.path))
    batch = next(iter(session.loader(0)))
    found = {
        "ours": Contender(
            partial(trainers_step, session, batch),
            session.bare,
            lambda: dict(session.averages.tensors(session.averages.main)),
        )
    }
    if not ours_alone:
        found["SiT's" if config.alignment is None else "REPA's"] = original_step(session, batch)
    return session, found


def original_step(session: Session, batch: dict[str, Tensor]) -> Contender:
    """The step of SiT or REPA, with inputs prepared like ours."""
    aligned = session.config.alignment.block if session.config.alignment else 0
    network = ReleasedSiT(session.model, session.bare.projectors, aligned)
    settings = session.config.training
    training = OriginalTraining(network, settings.precision, session.config.optimizer.lr, settings.ema_decay)

    def step() -> dict[str, float]:
        latents, labels, draws, targets = prepare_inputs(session, batch)
        if aligned:
            return training.repa_step(latents, labels, draws, targets)
        return {"flow": training.sit_step(latents, labels, draws)}

    return Contender(step, network, lambda: dict(training.ema.named_parameters()))


def measure(setting: str, data: Path, options: argparse.Namespace, device: torch.device) -> list[dict]:
    """Measure all models and both steps of one setting, in turns."""
    steps, flops = {}, {}
    for model in options.models:
        session, found = contenders(configuration(model, setting, data, options), options.ours)
        steps |= {(model, name): contender for name, contender in found.items()}
        flops[model] = training_flops(session.model, session.dataset.latent_shape)
    times = median_milliseconds({key: contender.step for key, contender in steps.items()}, device, options.turns)
    peak = peak_flops(device, options.precision)
    rows = []
    for (model, name), contender in steps.items():
        seconds = times[model, name] / 1000
        for parameter in contender.trained.parameters():
            parameter.grad = None  # SiT keeps gradients between steps; like ours, they count as part of a step
        row = {
            "model": model,
            "setting": setting,
            "step": name,
            "seconds": seconds,
            "images_per_second": options.batch_size / seconds,
            "mfu": flops[model] * options.batch_size / seconds / peak if peak else None,
            "mebibytes": peak_mebibytes(contender.step, device),
            "speedup": times[model, name] / times[model, "ours"],
        }
        rows.append({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()})
    return rows


def line(row: dict) -> str:
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.3f}"
    memory = "-" if row["mebibytes"] is None else f"{row['mebibytes']:.0f}"
    times = "" if row["step"] == "ours" else f"{row['speedup']:.2f} x"
    cells = (f"{1 / row['seconds']:.3f}", f"{row['images_per_second']:.2f}", mfu, memory, times)
    return f"{row['model']:17} {row['setting']:8} {row['step']:8}" + "".join(f"{cell:>10}" for cell in cells)


if __name__ == "__main__":
    with exit_on_input_error():
        main()

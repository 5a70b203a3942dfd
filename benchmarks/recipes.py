"""Resources of the published recipes: ``python -m benchmarks.recipes`` prints the tables of docs/recipes.md.

Parameters, operations and disk space are counted from shapes. Activations are what autograd saves per image in bf16
autocast (`benchmarks.memory`); compiled programs save less. Times are estimates, not measurements: operations divided
by an assumed share of a GPU's peak.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import activation_bytes, fake_gpu, kept_bytes
from benchmarks.output import write_json
from sit_atconv.alignment import Projector
from sit_atconv.config import Config, load_config
from sit_atconv.models import create_model
from sit_atconv.models.flops import training_flops
from sit_atconv.runtime.measuring.records import table

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = [f"{family}-{size}/2" for size in ("B", "L", "XL") for family in ("SiT", "SiT-Hybrid", "SiT-ATConv")]
RECIPES = {
    "ffhq512": {"images": 70_000, "side": 64, "pixels": 512, "classes": 0, "copies": 2},
    "imagenet256_repa": {"images": 1_281_167, "side": 32, "pixels": 256, "classes": 1000, "copies": 1},
}
# fp32 weights, gradients, Adam's two moments and averaged weights, and the bf16 weights that autocast caches.
BYTES_PER_PARAMETER = 4 + 4 + 8 + 4 + 2
PEAK, SHARE = 312e12, 0.4  # bf16 FLOP/s of an A100, and the share that a well-compiled transformer is assumed to reach


def teacher_flops(config: Config, pixels: int) -> int:
    """Operations of the forward passes of all teachers for one picture."""
    total = 0
    for teacher in config.alignment.teachers if config.alignment else ():
        with torch.device("meta"):
            model = timm.create_model(teacher.name.split(".")[0], num_classes=0, dynamic_img_size=True)
            side = model.patch_embed.patch_size[0] * pixels // 16
            with FlopCounterMode(display=False) as counter:
                model.forward_features(torch.empty(1, 3, side, side))
        total += counter.get_total_flops()
    return total


def teacher_bytes(config: Config) -> int:
    """Bytes of the fp32 weights of all teachers that run during training."""
    with torch.device("meta"):
        names = [teacher.name.split(".")[0] for teacher in config.alignment.teachers] if config.alignment else []
        models = [timm.create_model(name, num_classes=0, dynamic_img_size=True) for name in names]
    return sum(4 * p.numel() for model in models for p in model.parameters())


def projector_activation_bytes(width: int, hidden: int, tokens: int) -> int:
    """Bytes per image that the projector for DINOv2-B saves for its backward pass."""
    with fake_gpu("bf16"):
        projector = Projector(width, 768, hidden)
        one, two = (kept_bytes(lambda n=n: projector(torch.randn(n, tokens, width)), projector) for n in (1, 2))
    return two - one


def checkpoint_bytes(parameters: int, averaged: int) -> int:
    """Bytes of fp32 weights and Adam's moments of all trained parameters, and one average of the model."""
    return (4 + 8) * parameters + 4 * averaged


def row(recipe: str, name: str) -> dict[str, str | float]:
    """One line of the table."""
    facts, config = RECIPES[recipe], load_config(CONFIGS / f"{recipe}.yaml")
    side, batch = facts["side"], config.training.batch_size
    with torch.device("meta"):
        model = create_model(name, input_size=side, num_classes=facts["classes"])
        width = model.config.hidden_size
        aligned = [Projector(width, 768, config.alignment.projector_width)] if config.alignment else []
    tokens, averaged = (side // 2) ** 2, sum(p.numel() for p in model.parameters())
    parameters = averaged + sum(p.numel() for module in aligned for p in module.parameters())
    projector_flops = sum(2 * p.numel() for module in aligned for p in module.parameters() if p.ndim == 2)
    flops = training_flops(model, (4, side, side)) + 3 * projector_flops * tokens
    teacher = teacher_flops(config, facts["pixels"])
    kept = activation_bytes(name, side, "bf16", num_classes=facts["classes"])["none"]
    if aligned:
        kept += projector_activation_bytes(width, config.alignment.projector_width, tokens)
    state = parameters * BYTES_PER_PARAMETER + teacher_bytes(config)
    return {
        "model": name,
        "parameters": parameters,
        "gflop_per_image": round((flops + teacher) / 1e9, 1),
        "teacher_share": round(teacher / (flops + teacher), 3),
        "checkpoint_gb": round(checkpoint_bytes(parameters, averaged) / 1e9, 1),
        "state_gib": round(state / 2**30, 1),
        "activation_mib_per_image": round(kept / 2**20),
        "gib_on_8_gpus": round((state + kept * batch // 8) / 2**30, 1),
        "seconds_per_step_on_8_gpus": round((flops + teacher) * batch / 8 / (PEAK * SHARE), 3),
    }


def disk(recipe: str) -> dict[str, str | float]:
    """GB of a prepared data set (latents, pictures at most, one teacher's tokens) and of 50,000 raw samples."""
    facts = RECIPES[recipe]
    each = {"latents": 2 * 4 * facts["side"] ** 2 * 2, "tokens": (facts["pixels"] // 16) ** 2 * 768 * 2}
    gigabytes = {name: round(size * facts["images"] * facts["copies"] / 1e9, 1) for name, size in each.items()}
    pictures = round(facts["images"] * facts["pixels"] ** 2 * 3 / 1e9, 1)
    return {
        "data": recipe,
        "latents_gb": gigabytes["latents"],
        "pictures_gb_at_most": pictures,
        "tokens_gb": gigabytes["tokens"],
        "tokens_kb_a_picture": round(each["tokens"] / 1e3),
        "samples_gb": round(50_000 * facts["pixels"] ** 2 * 3 / 1e9, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, default=Path("recipes.json"))
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    tables = {recipe: [row(recipe, name) for name in MODELS] for recipe in RECIPES}
    tables["disk"] = [disk(recipe) for recipe in RECIPES]
    for name, rows in tables.items():
        print(f"\n{name}\n\n{table(rows)}")
    named = [{"table": name, **line} for name, rows in tables.items() for line in rows]
    write_json(options.json, torch.device("cpu"), named)


if __name__ == "__main__":
    main()

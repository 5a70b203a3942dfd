"""What a training step takes: `python -m benchmarks.training [--models ...] [--batch-size 4] [--json training.json]`.

The state is weights, gradients, Adam's two moments and one average, all in fp32: 20 bytes a parameter. Activations come
on top; time and peak memory are those of whole steps, optimiser and average included, on random latents of 256 px.
"""

import json
import time
from argparse import ArgumentParser
from pathlib import Path

import torch

from sit_atconv.config import FlowConfig
from sit_atconv.models import create_model, list_models
from sit_atconv.training.ema import ConstantDecay, WeightAverages
from sit_atconv.training.flops import training_flops
from sit_atconv.training.objective import Draws, Objective
from sit_atconv.training.throughput import peak_flops, peak_memory_gib

SHAPE = (4, 32, 32)


def costs(name: str) -> dict[str, float]:
    """Parameters, bytes of state and operations of one model, from its shapes."""
    with torch.device("meta"):
        model = create_model(name)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters_m": parameters / 1e6,
        "state_gib": 20 * parameters / 2**30,
        "gflop_per_image": training_flops(model, SHAPE) / 1e9,
    }


def measure(name: str, batch_size: int, steps: int, precision: str, compiled: bool, device: str) -> dict[str, float]:
    """Median seconds of a step, images/s and peak memory so far on `device`."""
    model = create_model(name).to(device)
    twin = create_model(name).to(device)
    objective = Objective(model, FlowConfig(), None)
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-4, fused=True)
    averages = WeightAverages(model, twin, [ConstantDecay(0.9999)])
    if compiled:
        model.compile_repeated_blocks()
    latents, noise = torch.randn(2, batch_size, *SHAPE, device=device).unbind()
    labels, uniform = torch.randint(1000, (batch_size,), device=device), torch.rand(batch_size, device=device)
    draws, taken, times = Draws(uniform, noise, noise, uniform), torch.ones((), dtype=torch.bool, device=device), []
    for step in range(1, steps + 3):  # the first two warm up
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = objective(latents, labels, draws, [])["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averages.update(step, taken)
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - began)
    seconds = sorted(times[2:])[steps // 2]
    peak = peak_flops(torch.device(device), precision)
    mfu = training_flops(model, SHAPE) * batch_size / seconds / peak if peak else None
    memory = peak_memory_gib(torch.device(device))
    return {"seconds_per_step": seconds, "images_per_second": batch_size / seconds, "memory_gib": memory, "mfu": mfu}


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.training", description="Costs of a training step.")
    parser.add_argument("--models", nargs="*", default=[], help="measure these; all are counted")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    table = {name: costs(name) for name in list_models("*/2")}
    for name in options.models:
        arguments = (options.batch_size, options.steps, options.precision, options.compile, device)
        table[name] |= measure(name, *arguments)
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    print(f"{'model':16s}" + "".join(f"{column:>20s}" for column in columns))
    for name, row in table.items():
        cells = (f"{row[column]:20.4g}" if row.get(column) is not None else f"{'-':>20s}" for column in columns)
        print(f"{name:16s}" + "".join(cells))
    if options.json:
        options.json.write_text(
            json.dumps({"device": device, "batch_size": options.batch_size, "rows": table}, indent=2)
        )


if __name__ == "__main__":
    main()

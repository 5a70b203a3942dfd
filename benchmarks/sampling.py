"""Compares sampling with the programs of SiT and REPA on the same weights: `python -m benchmarks.sampling`.

Their programs are their sampling loops with their network, both transcribed, or with our network, to compare only the
loops. The table shows medians of several turns, and the effect of each of our optimisations, removed one at a time.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.baselines import ReleasedSiT, repa_euler_maruyama, sit_euler_maruyama
from benchmarks.output import write_json
from sit_atconv import SiT, create_model
from sit_atconv.errors import exit_on_input_error
from sit_atconv.flow import guided_velocity, integrate_sde
from sit_atconv.runtime.measuring.records import machine
from sit_atconv.runtime.measuring.timing import default_device, median_milliseconds
from sit_atconv.sampling import SamplerSettings
from sit_atconv.sampling.draw import Drawing

SCALE, INTERVAL = 1.8, (0.0, 0.7)


def main() -> None:
    options = parse()
    device = default_device()
    contenders = build(options, device)
    with torch.inference_mode():
        report(options, device, median_milliseconds(contenders, device, options.turns))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    parser.add_argument("--model", default="SiT-ATConv-S/2")
    parser.add_argument("--input-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--labels", type=int, default=4, help="number of different labels in a batch")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("sampling.json"))
    return parser.parse_args()


def build(options: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The contenders by name, each a function without arguments that draws one batch."""
    torch.manual_seed(0)
    with device:
        model = create_model(options.model, input_size=options.input_size).eval()
    for parameter in model.parameters():  # a fresh SiT predicts zero
        nn.init.normal_(parameter, std=0.02)
    B, steps = options.batch_size, options.steps
    shape = (B, 4, options.input_size, options.input_size)
    noise, increments = torch.randn(shape, device=device), torch.randn((steps, *shape), device=device)
    labels = torch.arange(B) % options.labels
    on_device = labels.to(device)

    released = ReleasedSiT(model)

    def theirs(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return released(x, t, y)[0]

    def sit(network: Callable) -> Callable[[], Tensor]:
        return partial(sit_euler_maruyama, network, noise, on_device, 1000, steps, SCALE, increments)

    def repa(network: Callable) -> Callable[[], Tensor]:
        return partial(repa_euler_maruyama, network, noise, on_device, 1000, steps, SCALE, INTERVAL, increments)

    always = SamplerSettings("sde", steps, SCALE, guidance_channels=3)
    interval = SamplerSettings("sde", steps, SCALE, INTERVAL)
    return {
        "SiT's program": sit(theirs),
        "  SiT's loop, our network": sit(model),
        "ours, guided as SiT": partial(Drawing(model, always).integrate, noise, labels, increments.__getitem__),
        "REPA's program": repa(theirs),
        "  REPA's loop, our network": repa(model),
        "ours, guided as REPA": partial(Drawing(model, interval).integrate, noise, labels, increments.__getitem__),
        "  a condition for every row": partial(plain, model, noise, on_device, steps, increments),
        "  null half outside the interval too": partial(
            Drawing(model, SamplerSettings("sde", steps, SCALE)).integrate, noise, labels, increments.__getitem__
        ),
    }


def plain(model: SiT, noise: Tensor, labels: Tensor, steps: int, increments: Tensor) -> Tensor:
    """Our solver with the model's plain forward, which computes embeddings and modulations for each row."""
    velocity = guided_velocity(
        lambda x, t, y: model(x, t.expand(len(x)).to(x), y), labels, SCALE, null_label=1000, interval=INTERVAL
    )
    return integrate_sde(velocity, noise, steps, noise=increments.__getitem__)


def report(options: argparse.Namespace, device: torch.device, medians: dict[str, float]) -> None:
    """Print the table and write it as JSON."""
    print(
        f"{options.model}, latents {options.input_size}x{options.input_size}, batch {options.batch_size} of "
        f"{options.labels} labels, {options.steps} steps, {machine(device)}\n"
    )
    print(f"{'':38} ms/image   to the program above")
    rows, program = [], 0.0
    for contender, milliseconds in medians.items():
        original = contender.endswith("program")
        program = milliseconds if original else program
        ratio, each = program / milliseconds, milliseconds / options.batch_size
        shown = "" if original else f"{ratio:8.2f} x as fast"
        print(f"{contender:38} {each:8.1f}   {shown}")
        rows.append(
            {"contender": contender.strip(), "milliseconds_per_image": round(each, 3), "ratio": round(ratio, 3)}
        )
    print("\nThe last two lines are ours guided as REPA, each without one optimisation.")
    write_json(options.json, device, rows)


if __name__ == "__main__":
    with exit_on_input_error():
        main()

"""The image networks: parameters, operations and time of a forward pass, `python -m benchmarks.zoo [NETWORK ...]`.

Without names: AttNet-T1 beside its release and ATConv-PVT-T beside PVT-T. `--all` gives the table of docs/zoo.md.
Networks are measured in turns, in fp32 on a CPU and under bf16 autocast on a GPU.
"""

import argparse
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sit_atconv.zoo  # noqa: F401  registers the networks
from benchmarks.output import write_json
from benchmarks.released_attnet import ReleasedAttNet
from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.runtime.measuring.records import machine, table
from sit_atconv.runtime.measuring.timing import Run, default_device, median_milliseconds

RELEASED = "attnet_t1, released"
PAIRS = {"attnet_t1": RELEASED, "atconv_pvt_tiny": "pvt_tiny"}  # each with what it is compared with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="of sit_atconv.zoo; default: two comparisons")
    parser.add_argument("--all", action="store_true", help="all networks of sit_atconv.zoo")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batch-size", type=int, help="default: 1 on a CPU, 128 on a GPU")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("zoo.json"))
    options = parser.parse_args()
    device = default_device()
    batch = options.batch_size or (128 if device.type == "cuda" else 1)
    names = ours() if options.all else options.networks
    names = names or [name for pair in PAIRS.items() for name in pair]
    x = torch.randn(batch, 3, options.size, options.size, device=device)
    models = {name: create(name).eval().to(device) for name in names}
    operations = {name: count(model, x[:1]) for name, model in models.items()}
    milliseconds = median_milliseconds({name: forward(m, x) for name, m in models.items()}, device, options.turns)
    rows = [
        {
            "network": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "GMACs": round(operations[name] / 2e9, 3),
            "ms an image": round(milliseconds[name] / batch, 2),
            "images/s": round(1000 * batch / milliseconds[name], 1),
        }
        for name, model in models.items()
    ]
    print(f"{machine(device)}, {options.size} px, batch {batch}\n\n{table(rows)}\n")
    for name, other in PAIRS.items():
        if {name, other} <= models.keys():
            print(f"{name} is {milliseconds[other] / milliseconds[name]:.2f} times as fast as {other}.")
    write_json(options.json, device, rows, batch=batch, size=options.size)


def ours() -> list[str]:
    """The names of all networks of sit_atconv.zoo."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("sit_atconv.")]


def create(name: str) -> nn.Module:
    """A network by timm's name, or AttNet-T1 as released, with the same weights as ours."""
    torch.manual_seed(0)
    if name == RELEASED:
        return ReleasedAttNet((2, 3, 12, 3), (48, 96, 224, 384))
    if not timm.is_model(name):
        raise InputError(f"There is no network '{name}': timm.list_models('attnet*') and docs/zoo.md have the names.")
    return timm.create_model(name)


def forward(model: nn.Module, x: Tensor) -> Run:
    """A forward pass without gradients."""

    def run() -> Tensor:
        with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return model(x)

    return run


def count(model: nn.Module, x: Tensor) -> int:
    """Operations of products and convolutions of one image, two for each multiplication and addition."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


if __name__ == "__main__":
    with exit_on_input_error():
        main()

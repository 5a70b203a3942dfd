"""Counts the memory of a training step without running it: `python -m benchmarks.memory [--json FILE]`.

Weights, gradients, Adam's two moments and one average are fp32: 20 bytes per parameter. Activations are added: all
tensors that autograd saves in the forward pass for the backward pass, with each storage counted once. They are counted
on fake CUDA tensors, which have shapes but no data, for the kernels of a GPU in eager mode, with flash attention (fp32:
memory-efficient attention). Compiled programs save less; temporary memory of the backward pass is not counted.
`--measure` runs real steps and compares them with their count.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from benchmarks.output import write_json
from sit_atconv import SiT, create_model
from sit_atconv.models import list_models
from sit_atconv.models.flops import training_flops
from sit_atconv.models.sit import RECOMPUTED
from sit_atconv.runtime.measuring.memory import peak_mebibytes
from sit_atconv.runtime.measuring.records import machine, table
from sit_atconv.runtime.measuring.timing import Run, default_device

MODELS = [f"{family}-{size}/2" for size in ("S", "B", "L", "XL") for family in ("SiT", "SiT-Hybrid", "SiT-ATConv")]
PRECISIONS = ("bf16", "fp32")
STATE_BYTES = 4 + 4 + 8 + 4  # per parameter: weight, gradient, Adam's moments, average


class GpuAttention(TorchFunctionMode):
    """Uses the attention kernel of a GPU: without a GPU, torch would choose one that saves N×N scores."""

    def __torch_function__(
        self, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if torch.is_autocast_enabled("cuda"):
            return aten._scaled_dot_product_flash_attention(*args)[0]
        return aten._scaled_dot_product_efficient_attention(*args, None, True)[0]


@contextlib.contextmanager
def fake_gpu(precision: str) -> Iterator[None]:
    """Create fake tensors on a GPU, in autocast if `precision` is bf16. From torch 2.10 on, no GPU is needed.

    torch.autocast would disable itself without a GPU, so its parts are called here.
    """
    before = torch.is_autocast_enabled("cuda")
    with FakeTensorMode(), torch.device("cuda"), GpuAttention():
        torch.set_autocast_enabled("cuda", precision == "bf16")
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", before)


def kept_bytes(forward: Run, model: nn.Module) -> int:
    """Bytes that `forward` saves for the backward pass, each storage counted once, without the model's own tensors."""
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # kept alive, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    del result
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def inputs(model: SiT, batch: int, side: int) -> tuple[Tensor, ...]:
    """Latents, times and labels on the default device."""
    y = torch.zeros(batch, dtype=torch.int64) if model.num_classes else None
    return torch.randn(batch, model.in_channels, side, side), torch.rand(batch), y


def activation_bytes(name: str, side: int, precision: str, **overrides: object) -> dict[str, int]:
    """Bytes per image for each kind of checkpointing, and bytes saved once for all images ("once": weights in bf16).

    When blocks or mixers are recomputed, the activations of one of them (the mean over all) exist again temporarily,
    and are counted as well.
    """
    with fake_gpu(precision):
        model = create_model(name, input_size=side, **overrides)
        found = {}
        for what in RECOMPUTED:
            model.recompute(what)
            one, two = (kept_bytes(lambda n=n: model(*inputs(model, n, side)), model) for n in (1, 2))
            found[what] = two - one
            found.setdefault("once", 2 * one - two)  # from the first kind, which saves everything
    depth = len(model.blocks)
    again = {what: round((found["none"] - found[what]) / depth) for what in RECOMPUTED}
    return found | {what: found[what] + again[what] for what in RECOMPUTED}


def count(name: str, side: int) -> dict:
    """One line of the table: facts of the model, and MiB of activations per image in both precisions."""
    with torch.device("meta"):
        model = create_model(name, input_size=side)
    parameters = sum(p.numel() for p in model.parameters())
    row = {
        "model": name,
        "latent": side,
        "parameters": parameters,
        "state_gib": round(STATE_BYTES * parameters / 2**30, 2),
        "gflop_per_image": round(training_flops(model, (4, side, side)) / 1e9, 1),
    }
    for precision in PRECISIONS:
        found = activation_bytes(name, side, precision)
        if precision == "bf16":
            row["bf16_weights_gib"] = round(found["once"] / 2**30, 2)
        row |= {f"{precision}_{what}": round(found[what] / 2**20, 1) for what in RECOMPUTED}
    return row


def measure(name: str, side: int, batch: int, device: torch.device) -> list[dict]:
    """MiB of real fp32 steps for each kind of checkpointing: saved, the same counted on fake tensors, and the peak.

    The peak is that of the forward and backward pass beyond the weights; it includes part of the gradients.
    """
    with device:
        model = create_model(name, input_size=side)
        arguments = inputs(model, batch, side)
    without_numbers = FakeTensorMode()
    with without_numbers, device:
        fake = create_model(name, input_size=side)

    def step() -> None:
        model(*arguments).square().mean().backward()
        model.zero_grad()

    rows = []
    for what in RECOMPUTED:
        model.recompute(what)
        fake.recompute(what)
        kept = kept_bytes(lambda: model(*arguments), model)
        with without_numbers, device:
            counted = kept_bytes(lambda: fake(*inputs(fake, batch, side)), fake)
        sizes = {"kept MiB": kept / 2**20, "counted MiB": counted / 2**20, "peak MiB": peak_mebibytes(step, device)}
        rounded = {key: round(size, 1) for key, size in sizes.items()}
        rows.append({"model": name, "latent": side, "batch": batch, "computed again": what, **rounded})
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """One line per model: MiB of activations with none / mixers / blocks recomputed, for each size and precision."""
    lines: dict[str, dict] = {}
    for row in rows:
        shared = {"model": row["model"], "state GiB": row["state_gib"], "bf16 weights GiB": row["bf16_weights_gib"]}
        line = lines.setdefault(row["model"], shared)
        for precision in PRECISIONS:
            sizes = [f"{row[f'{precision}_{what}']:.0f}" for what in RECOMPUTED]
            line[f"{precision}, latent {row['latent']}"] = " / ".join(sizes)
    return list(lines.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", default=MODELS, choices=list_models(), metavar="NAME")
    parser.add_argument("--latents", type=int, nargs="+", default=[32, 64], help="default: 256 and 512 px")
    parser.add_argument("--measure", type=int, metavar="BATCH", help="run the models in fp32 with this batch size")
    parser.add_argument("--json", type=Path, default=Path("memory.json"))
    options = parser.parse_args()
    device = default_device()
    torch.manual_seed(0)
    cases = [(name, side) for side in options.latents for name in options.models]
    if options.measure:
        rows = [row for name, side in cases for row in measure(name, side, options.measure, device)]
        print(f"{machine(device)}\n\n{table(rows)}")
    else:
        rows = [count(name, side) for name, side in cases]
        print(f"MiB per image with {' / '.join(RECOMPUTED)} recomputed\n\n{table(summary(rows))}")
    write_json(options.json, device, rows)


if __name__ == "__main__":
    main()

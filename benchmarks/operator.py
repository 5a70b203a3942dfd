"""Token mixing alone, as in Fig. 4 of the ATConv paper (arXiv 2510.20092): `python -m benchmarks.operator`.

Compares ATConv (ours and as released), full attention and cheaper attentions on C = 128 channels for images of growing
size, without the projections that all of them share: q, k, v are given, and ATConv makes its kernels from k. Measures
time and peak memory, forward and with gradients; `benchmarks.figures` draws them.

`--mixers NAME ...` compares registered mixers instead, as they are: with their projections and the gradients of their
weights. Their operations are counted, too.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.baselines import ReleasedATConv
from benchmarks.mixers import add_mixers
from benchmarks.output import write_json
from sit_atconv.models.mixers import ATConv, create_mixer, list_mixers, mixer_flops
from sit_atconv.ops import per_sample_depthwise_conv2d, pool_tokens
from sit_atconv.runtime.measuring.memory import peak_mebibytes
from sit_atconv.runtime.measuring.records import machine
from sit_atconv.runtime.measuring.timing import Run, default_device, median_milliseconds

SIDES = (8, 16, 32, 64, 128)
HEAD = 32  # channels of a head
WINDOW = 8

Mixing = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, H, W, C) -> (B, H, W, C)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token attends to all tokens."""
    q, k, v = (rearrange(t, "b h w (n d) -> b n (h w) d", d=HEAD) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v)
    return y.transpose(1, 2).flatten(2)


def window_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token attends to its 8×8 window (Swin)."""
    pattern = "b (h p) (w q) (n d) -> (b h w) n (p q) d"
    return F.scaled_dot_product_attention(*(rearrange(t, pattern, p=WINDOW, q=WINDOW, d=HEAD) for t in (q, k, v)))


def grid_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token attends to an 8×8 grid spread over the image (MaxViT)."""
    pattern = "b (p h) (q w) (n d) -> (b h w) n (p q) d"
    return F.scaled_dot_product_attention(*(rearrange(t, pattern, p=WINDOW, q=WINDOW, d=HEAD) for t in (q, k, v)))


def pooled_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token attends to 7×7 averages of keys and values (PVTv2)."""
    grid = q.shape[1:3]
    q = rearrange(q, "b h w (n d) -> b n (h w) d", d=HEAD)
    k, v = (rearrange(pool_tokens(t.flatten(1, 2), grid, (7, 7)), "b m (n d) -> b n m d", d=HEAD) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """φ(q)·(φ(k)ᵀv), normalised, φ = elu + 1 (Katharopoulos et al. 2020)."""
    q, k, v = (rearrange(t, "b h w (n d) -> b n (h w) d", d=HEAD) for t in (q, k, v))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.transpose(-1, -2) @ v)) / (q @ k.sum(2).unsqueeze(-1))


def atconv(mixer: ATConv, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Convolve v with the kernels made from k, without the mixer's projections."""
    return per_sample_depthwise_conv2d(v, mixer.kernels(k.flatten(1, 2), tuple(k.shape[1:3])))


def released_atconv(mixer: ReleasedATConv, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as in the released code: torch's grouped convolution, with transposes to channels first and back."""
    return mixer.mix(k.flatten(1, 2), v.flatten(1, 2), tuple(v.shape[1:3])).unflatten(1, v.shape[1:3])


ATTENTIONS: dict[str, Mixing] = {
    "attention": attention,
    "window": window_attention,
    "pooled keys": pooled_attention,
    "linear": linear_attention,
    "grid": grid_attention,
}


def all_mixings(channels: int, dtype: torch.dtype, device: torch.device) -> dict[str, Mixing]:
    """All contenders; both ATConvs have the same weights."""
    ours, released = (kind(channels).requires_grad_(False).to(device, dtype) for kind in (ATConv, ReleasedATConv))
    released.load_state_dict(ours.state_dict())
    ours.kernel_proj = nn.Identity()
    return {"ATConv": partial(atconv, ours), "ATConv, released": partial(released_atconv, released), **ATTENTIONS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], allow_abbrev=False)
    add_mixers(parser)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--batch-size", type=int, help="default: 1 on a CPU, 64 on a GPU")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="of the image in tokens, multiples of 8")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("operator.json"))
    options = parser.parse_args()
    device = default_device()
    B = options.batch_size or (64 if device.type == "cuda" else 1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.channels % HEAD or any(side % WINDOW for side in options.sides):
        parser.error(f"--channels must be multiples of {HEAD}, --sides of {WINDOW}, for heads and windows.")
    rows = [
        measure((B, side, side, options.channels), gradients, dtype, device, options)
        for gradients in (False, True)
        for side in options.sides
    ]
    report(rows, device)
    write_json(options.json, device, rows)


def measure(
    shape: tuple[int, ...], gradients: bool, dtype: torch.dtype, device: torch.device, options: argparse.Namespace
) -> dict:
    """Measure all contenders in turns, for one size."""
    row = {"shape": shape, "gradients": gradients}
    if options.mixers is None:
        tokens = [torch.randn(shape, device=device, dtype=dtype, requires_grad=gradients) for _ in range(3)]
        runs = {name: call(mixing, tokens) for name, mixing in all_mixings(shape[-1], dtype, device).items()}
    else:
        _, *grid, C = shape
        names = options.mixers or list_mixers()
        mixers = {name: create_mixer(name, C, C // HEAD).to(device, dtype) for name in names}
        row["operations"] = {name: mixer_flops(mixer, tuple(grid), C) for name, mixer in mixers.items()}
        x = torch.randn(shape, device=device, dtype=dtype, requires_grad=gradients).flatten(1, 2)
        runs = {name: call_mixer(mixer, x, tuple(grid)) for name, mixer in mixers.items()}
    return row | {
        "milliseconds": median_milliseconds(runs, device, options.turns),
        "mebibytes": {name: peak_mebibytes(run, device) for name, run in runs.items()},
    }


def call(mixing: Mixing, tokens: list[Tensor]) -> Run:
    """The mixing of these tokens, with gradients of those that it uses if they require gradients."""
    forward = partial(mixing, *tokens)
    if not tokens[0].requires_grad:
        return forward
    dy = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), tokens, dy, allow_unused=True)


def call_mixer(mixer: nn.Module, x: Tensor, grid: tuple[int, int]) -> Run:
    """A registered mixer of tokens x, with gradients of x and its weights if x requires one."""
    mixer.requires_grad_(x.requires_grad)
    if not x.requires_grad:
        return lambda: mixer(x, grid)
    return lambda: torch.autograd.grad(mixer(x, grid).sum(), [x, *mixer.parameters()])


def report(rows: list[dict], device: torch.device) -> None:
    print(f"{machine(device)}. Milliseconds; in brackets peak MiB beyond the memory in use before.\n")
    print(f"{'B, H, W, C':22} {'':15}" + "".join(f"{name:>18}" for name in rows[0]["milliseconds"]))
    for row in rows:
        cells = []
        for name, ms in row["milliseconds"].items():
            memory = row["mebibytes"][name]
            cells.append(f"{ms:.3f}" + ("" if memory is None else f" [{memory:.4g}]"))
        passes = "with gradients" if row["gradients"] else "forward"
        print(f"{', '.join(map(str, row['shape'])):22} {passes:15}" + "".join(f"{cell:>18}" for cell in cells))
        if "operations" in row and not row["gradients"]:
            counted = (f"{operations / 1e9:.4g}" for operations in row["operations"].values())
            print(f"{'':22} {'GFLOP an image':15}" + "".join(f"{count:>18}" for count in counted))


if __name__ == "__main__":
    main()

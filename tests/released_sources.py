"""The networks that SiT, REPA and ATConv released, written down as functions of their state dicts.

Nothing here comes from the package: names, shapes and formulas are those of the released code, so that a converted
model is compared with the definition and not with itself.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A network of one of the four trees: (sit | repa) × (the original | ATConv's). `mixers` has a word a block."""

    tree: str = "sit"
    mixers: tuple[str, ...] = ("attention", "attention")
    width: int = 32
    heads: int = 4
    patch: int = 2
    channels: int = 4
    side: int = 8  # of the latents
    label_rows: int = 6
    mlp: int = 96
    variance: bool = True
    position: bool = True
    projector_widths: tuple[int, ...] = ()

    @property
    def convolutions(self) -> bool:
        return self.tree == "repa"  # ATConv's REPA tree projects with 1×1 convolutions and has SiLU


def random_state(source: Source, seed: int = 0) -> dict[str, Tensor]:
    """A state dict in the source's layout, random everywhere but in its fixed position table."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 25
        return torch.randn(*shape, generator=generator) / math.sqrt(fan_in)

    state: dict[str, Tensor] = {}

    def layer(name: str, rows: int, *columns: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = random(rows, *columns), random(rows)

    width, patch = source.width, source.patch
    if source.position:
        state["pos_embed"] = position_table(width, source.side // patch)[None]
    layer("x_embedder.proj", width, source.channels, patch, patch)
    layer("t_embedder.mlp.0", width, 256)
    layer("t_embedder.mlp.2", width, width)
    state["y_embedder.embedding_table.weight"] = torch.randn(source.label_rows, width, generator=generator)
    for i, mixer in enumerate(source.mixers):
        name = f"blocks.{i}"
        if mixer == "attention":
            layer(f"{name}.attn.qkv", 3 * width, width)
            layer(f"{name}.attn.proj", width, width)
        else:
            state[f"{name}.attn.difference_control"] = torch.randn(width, generator=generator)
            layer(f"{name}.attn.kernel_gen", 9, 9)
            for part in ("kernel_proj", "x_proj", "proj"):
                layer(f"{name}.attn.{part}", width, width, *((1, 1) if source.convolutions else ()))
        layer(f"{name}.mlp.fc1", source.mlp, width)
        layer(f"{name}.mlp.fc2", width, source.mlp)
        layer(f"{name}.adaLN_modulation.1", 6 * width, width)
    for i, out in enumerate(source.projector_widths):
        layer(f"projectors.{i}.0", 64, width)
        layer(f"projectors.{i}.2", 64, 64)
        layer(f"projectors.{i}.4", out, 64)
    layer("final_layer.linear", patch**2 * source.channels * (2 if source.variance else 1), width)
    layer("final_layer.adaLN_modulation.1", 2 * width, width)
    return state


def position_table(width: int, grid: int) -> Tensor:
    """MAE's table, (grid², width): sines and cosines of the column, then of the row."""
    table = np.empty((grid, grid, width))
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    for row in range(grid):
        for column in range(grid):
            halves = [np.concatenate([np.sin(at * omega), np.cos(at * omega)]) for at in (column, row)]
            table[row, column] = np.concatenate(halves)
    return torch.from_numpy(table.reshape(grid * grid, width)).float()


def released_forward(source: Source, state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """What the released network gives for x (B, C, H, H), t (B,) in its own direction and labels y (B,)."""

    def layer(name: str, tensor: Tensor) -> Tensor:
        return F.linear(tensor, state[f"{name}.weight"], state[f"{name}.bias"])

    tokens = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=source.patch)
    tokens = tokens.flatten(2).transpose(1, 2)
    if source.position:
        tokens = tokens + state["pos_embed"]
    omega = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t[:, None].float() * omega[None]
    time = layer("t_embedder.mlp.2", F.silu(layer("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    condition = F.silu(time + state["y_embedder.embedding_table.weight"][y])

    def normed(tensor: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(tensor, (source.width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    for i, mixer in enumerate(source.mixers):
        parts = layer(f"blocks.{i}.adaLN_modulation.1", condition).chunk(6, dim=1)
        mix = _attention if mixer == "attention" else _atconv
        tokens = tokens + parts[2][:, None] * mix(source, state, f"blocks.{i}.attn", normed(tokens, *parts[:2]))
        hidden = F.gelu(layer(f"blocks.{i}.mlp.fc1", normed(tokens, *parts[3:5])), approximate="tanh")
        tokens = tokens + parts[5][:, None] * layer(f"blocks.{i}.mlp.fc2", hidden)
    last = layer("final_layer.adaLN_modulation.1", condition).chunk(2, dim=1)
    return _unpatchify(source, layer("final_layer.linear", normed(tokens, *last)))


def _unpatchify(source: Source, patches: Tensor) -> Tensor:
    """Patches (B, N, p·p·C') hold rows, then columns, then channels; the variance is the second half of those."""
    batch, grid, p = len(patches), source.side // source.patch, source.patch
    channels = source.channels * (2 if source.variance else 1)
    image = torch.empty(batch, channels, source.side, source.side)
    for token in range(grid * grid):
        row, column = divmod(token, grid)
        pixels = patches[:, token].reshape(batch, p, p, channels).permute(0, 3, 1, 2)
        image[:, :, row * p : row * p + p, column * p : column * p + p] = pixels
    return image[:, : source.channels]


def _attention(source: Source, state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    q, k, v = F.linear(x, state[f"{name}.qkv.weight"], state[f"{name}.qkv.bias"]).split(source.width, dim=2)
    size = source.width // source.heads
    heads = []
    for h in range(source.heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        heads.append(scores.softmax(dim=-1) @ v[..., part])
    return F.linear(torch.cat(heads, dim=2), state[f"{name}.proj.weight"], state[f"{name}.proj.bias"])


def _atconv(source: Source, state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Both trees on channels first: the project-all-then-pool order of the release, one grouped convolution."""
    batch, _, width = x.shape
    side = source.side // source.patch
    image = x.transpose(1, 2).reshape(batch, width, side, side)

    def project(part: str, tensor: Tensor) -> Tensor:
        weight = state[f"{name}.{part}.weight"].reshape(width, width, 1, 1)
        return F.conv2d(tensor, weight, state[f"{name}.{part}.bias"])

    pooled = F.adaptive_avg_pool1d(project("kernel_proj", image).flatten(2), 9)
    active = F.silu(pooled) if source.convolutions else F.gelu(pooled, approximate="tanh")
    kernels = F.linear(active, state[f"{name}.kernel_gen.weight"], state[f"{name}.kernel_gen.bias"])
    inhibition = state[f"{name}.difference_control"].sigmoid()[None, :, None]
    kernels = (kernels - inhibition * kernels.mean(dim=2, keepdim=True)).reshape(batch * width, 1, 3, 3)
    values = project("x_proj", image).reshape(1, batch * width, side, side)
    mixed = F.conv2d(values, kernels, padding=1, groups=batch * width).reshape(batch, width, side, side)
    return project("proj", mixed).flatten(2).transpose(1, 2)

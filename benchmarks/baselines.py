"""Transcriptions of the original programs: SiT (arXiv 2401.08740), REPA (2410.06940) and ATConv (2510.20092).

They are written from the descriptions and work as those programs do. Results can be compared: parameters have our names
and shapes, so that one state fits both; all random draws are given; and time runs in our direction (SiT's own runs the
other way, and its velocity has the opposite sign).

* Models: patches by a strided convolution, time frequencies computed again and moved to the device in every call, SiLU
  of the condition and a modulation in every block, ATConv's three projections over all tokens and a grouped convolution
  between transposes, hidden tokens folded for the projectors, and timm's MLP. Their four unused output channels are
  left out.
* Training steps: torch's default AdamW, an average updated parameter by parameter through dictionaries of names, the
  loss read back in every step, REPA's alignment summed in a loop over teachers and samples. Encoding and logging are
  left out.
* Sampling loops: SiT doubles the batch at all times, guides the first three channels, and evaluates the network once
  for the velocity and once more for the score; REPA doubles the batch only within the guidance interval and derives
  the score from one evaluation. Both pass the network a time and a label for each row.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from sit_atconv.models import SiT
from sit_atconv.models.block import Block
from sit_atconv.models.mixers import ATConv
from sit_atconv.training.session.objective import Draws

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


class ReleasedATConv(ATConv):
    """The same function as `ATConv`, computed as the released code does."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.out_proj(self.mix(self.kernel_proj(x), self.value_proj(x), grid))

    def mix(self, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Convolve tokens v with the kernels made from tokens k, both (B, N, C) and projected."""
        B, N, C = v.shape
        K = self.kernel_size
        context = F.adaptive_avg_pool2d(k.transpose(1, 2).reshape(B, C, *grid), K).flatten(2)
        kernels = self.kernel_gen(F.gelu(context))
        kernels = kernels - torch.sigmoid(self.inhibition).view(1, C, 1) * kernels.mean(2, keepdim=True)
        values = v.transpose(1, 2).reshape(1, B * C, *grid)
        y = F.conv2d(values, kernels.reshape(B * C, 1, K, K), padding=K // 2, groups=B * C)
        return y.view(B, C, N).transpose(1, 2)

    def flops(self, grid: tuple[int, int]) -> int:
        """All tokens are projected for the kernels, not only the K² that are left after pooling."""
        return super().flops(grid) + 2 * (grid[0] * grid[1] - self.kernel_size**2) * self.dim**2


class ReleasedBlock(nn.Module):
    """DiT's block with the parts of one of our blocks: each block applies SiLU to the condition itself."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.norm2, self.modulation, self.mixer = block.norm1, block.norm2, block.modulation, block.mixer
        hidden, dim = block.mlp.fc1.weight.shape
        self.mlp = Mlp(dim, hidden, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.mlp.load_state_dict(block.mlp.state_dict())
        if isinstance(block.mixer, ATConv):
            self.mixer = ReleasedATConv(dim, block.mixer.kernel_size)
            self.mixer.load_state_dict(block.mixer.state_dict())
        self.to(block.modulation.weight)  # its dtype and device

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, int]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).chunk(6, dim=1)
        y = self.norm1(x) * (1 + scale1.unsqueeze(1)) + shift1.unsqueeze(1)
        x = x + gate1.unsqueeze(1) * self.mixer(y, grid)
        y = self.norm2(x) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1)
        return x + gate2.unsqueeze(1) * self.mlp(y)


class ReleasedSiT(nn.Module):
    """SiT with copied weights of one of our models, and REPA's projectors of the tokens after block `aligned`.

    ATConv has its default options: it pools over the grid and uses GELU.
    """

    def __init__(self, model: SiT, projectors: nn.ModuleList | None = None, aligned: int = 0) -> None:
        super().__init__()
        model = copy.deepcopy(model)
        self.num_classes, self.grid, self.patch_size = model.num_classes, model.grid, model.patch_size
        self.patch_embed, self.time_embed, self.label_embed = model.patch_embed, model.time_embed, model.label_embed
        self.blocks = nn.ModuleList(ReleasedBlock(block) for block in model.blocks)
        self.final = model.final
        self.position_table = model.position_table
        self.projectors, self.aligned = copy.deepcopy(projectors or nn.ModuleList()), aligned

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The velocity at x (B, C, H, W), and the projected tokens (B, N, D) for each teacher."""
        B, channels, p = len(x), x.shape[1], self.patch_size
        weight = self.patch_embed.weight.view(-1, channels, p, p)
        tokens = F.conv2d(x, weight, self.patch_embed.bias, stride=p).flatten(2).transpose(1, 2) + self.position_table
        c = self._time(t) + self.label_embed(y)
        projected = []
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, c, self.grid)
            if number == self.aligned:
                folded = tokens.reshape(-1, tokens.shape[-1])
                projected = [project(folded).reshape(B, tokens.shape[1], -1) for project in self.projectors]
        shift, scale = self.final.modulation(F.silu(c)).chunk(2, dim=1)
        tokens = self.final.proj(self.final.norm(tokens) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))
        patches = tokens.reshape(B, *self.grid, p, p, channels)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(x.shape), projected

    def _time(self, t: Tensor) -> Tensor:
        first, activation, second = self.time_embed
        half = first.in_features // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).to(t.device)
        angles = t[:, None].float() * frequencies[None]
        features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        return second(activation(first(features.to(first.weight.dtype))))


class OriginalTraining:
    """Weights, average and optimizer, and the training step of either program.

    Args:
        network: trained in place.
        precision: "no", or "bf16" for autocast, which REPA uses through Accelerate and SiT does not have.
        lr, decay: those of both programs.
    """

    def __init__(self, network: ReleasedSiT, precision: str = "no", lr: float = 1e-4, decay: float = 0.9999) -> None:
        self.network, self.precision, self.decay = network, precision, decay
        self.ema = copy.deepcopy(network).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0)

    def sit_step(self, latents: Tensor, labels: Tensor, draws: Draws) -> float:
        """SiT's step: time runs from noise to data, the velocity has the opposite sign, gradients are not clipped."""
        labels = torch.where(draws.dropout < 0.1, self.network.num_classes, labels)
        s = 1 - draws.times
        s_ = s.view(-1, *([1] * (latents.ndim - 1)))
        x = s_ * latents + (1 - s_) * draws.noise
        with self._autocast(latents):
            predicted = -self.network(x, 1 - s, labels)[0]
        loss = mean_flat((predicted - (latents - draws.noise)) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        update_ema(self.ema, self.network, self.decay)
        return loss.item()

    def repa_step(self, latents: Tensor, labels: Tensor, draws: Draws, targets: list[Tensor]) -> dict[str, float]:
        """REPA's step, aligned with teachers' tokens (B, N, D): coefficient 0.5, gradients clipped to a norm of 1."""
        labels = torch.where(draws.dropout < 0.1, self.network.num_classes, labels)
        t_ = draws.times.view(-1, *([1] * (latents.ndim - 1)))
        x = (1 - t_) * latents + t_ * draws.noise
        with self._autocast(latents):
            predicted, projected = self.network(x, draws.times, labels)
        denoising = mean_flat((predicted - (draws.noise - latents)) ** 2).mean()
        alignment = alignment_by_samples(projected, targets)
        (denoising + 0.5 * alignment).backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_ema(self.ema, self.network, self.decay)
        return {"flow": denoising.item(), "alignment": alignment.item(), "grad_norm": norm.item()}

    def _autocast(self, like: Tensor) -> torch.autocast:
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all axes except the first."""
    return torch.mean(x, dim=list(range(1, x.ndim)))


def alignment_by_samples(projected: list[Tensor], targets: list[Tensor]) -> Tensor:
    """−cos of projected and teacher tokens, each (B, N, D), averaged in a loop over teachers and samples."""
    loss = 0.0
    for of_teacher, of_projector in zip(targets, projected, strict=True):
        for target, tokens in zip(of_teacher, of_projector, strict=True):
            tokens, target = F.normalize(tokens, dim=-1), F.normalize(target, dim=-1)
            loss += -(target * tokens).sum(dim=-1).mean()
    return loss / (len(targets) * len(targets[0]))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema ← decay·ema + (1 − decay)·model, one parameter after the other."""
    averages, parameters = OrderedDict(ema.named_parameters()), OrderedDict(model.named_parameters())
    for name, parameter in parameters.items():
        averages[name.replace("module.", "")].mul_(decay).add_(parameter.data, alpha=1 - decay)


def sit_euler_maruyama(
    network: Network, noise: Tensor, labels: Tensor, null_label: int, steps: int, scale: float, increments: Tensor
) -> Tensor:
    """SiT's stochastic sampler with D(t) = σ(t) and the "Mean" last step of 0.04, on the linear interpolant.

    Args:
        network: the velocity in our direction of time; SiT's own runs the other way with the opposite sign.
        noise: (B, C, H, W); labels: (B,); increments: (steps, B, C, H, W) standard normal.
    """
    doubled_labels = torch.cat([labels, torch.full_like(labels, null_label)])

    def velocity(x: Tensor, s: Tensor) -> Tensor:
        half = x[: len(x) // 2]
        out = -network(torch.cat([half, half]), 1 - s, doubled_labels)
        first, rest = out[:, :3], out[:, 3:]
        conditional, unconditional = first.chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)

    def score(x: Tensor, s: Tensor) -> Tensor:
        s_ = s.view(-1, 1, 1, 1)
        return (s_ * velocity(x, s) - x) / (1 - s_)

    def drift(x: Tensor, s: Tensor) -> Tensor:
        return velocity(x, s) + (1 - s).view(-1, 1, 1, 1) * score(x, s)

    x = torch.cat([noise, noise])
    grid = torch.linspace(0, 1 - 0.04, steps)
    dt = grid[1] - grid[0]
    for i, s in enumerate(grid[:-1]):
        rows = torch.ones(len(x), device=x.device) * s
        dw = torch.cat([increments[i], increments[i]]) * dt.sqrt()
        mean = x + drift(x, rows) * dt
        x = mean + (2 * (1 - rows)).sqrt().view(-1, 1, 1, 1) * dw
    rows = torch.ones(len(x), device=x.device) * grid[-1]
    return (x + drift(x, rows) * 0.04)[: len(noise)]


def repa_euler_maruyama(
    network: Network,
    noise: Tensor,
    labels: Tensor,
    null_label: int,
    steps: int,
    scale: float,
    interval: tuple[float, float],
    increments: Tensor,
) -> Tensor:
    """REPA's stochastic sampler: w = 2t, fp64 state, guidance within an interval of times, last step without noise.

    The other arguments are those of `sit_euler_maruyama`.
    """
    grid = torch.cat([torch.linspace(1.0, 0.04, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    x = noise.to(torch.float64)
    for i, (t, t_next) in enumerate(pairwise(grid)):
        guided = interval[0] <= t <= interval[1]
        inputs = torch.cat([x, x]) if guided else x
        rows = torch.cat([labels, torch.full_like(labels, null_label)]) if guided else labels
        times = torch.ones(len(inputs), dtype=torch.float64, device=x.device) * t
        v = network(inputs.to(noise.dtype), times.to(noise.dtype), rows).to(torch.float64)
        shaped = times.view(-1, 1, 1, 1)
        score = -((1 - shaped) * v + inputs) / shaped
        d = v - 0.5 * 2 * shaped * score
        if guided:
            conditional, unconditional = d.chunk(2)
            d = unconditional + scale * (conditional - unconditional)
        x = x + d * (t_next - t)
        if i < steps - 1:
            x = x + (2 * t).sqrt() * increments[i].to(torch.float64) * (t - t_next).sqrt()
    return x.to(noise.dtype)

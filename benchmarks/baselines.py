"""The sampling loops of SiT (arXiv 2401.08740) and REPA (arXiv 2410.06940), transcribed for comparison.

Both are written as those programs work, from their description: SiT keeps the batch doubled all the way, guides the
first three channels and asks the network once for the velocity and once more for the score; REPA doubles the batch
within the interval of guidance alone and converts one answer. Both hand the network a time and a label for each row.
The noise of every step is given, so that results can be compared.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def sit_euler_maruyama(
    network: Network, noise: Tensor, labels: Tensor, null_label: int, steps: int, scale: float, increments: Tensor
) -> Tensor:
    """SiT's stochastic sampler with D(t) = σ(t) and the "Mean" last step of 0.04, on the linear interpolant.

    Args:
        network: the velocity in our direction of time; SiT's own runs the other way with the other sign.
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

    Arguments are those of `sit_euler_maruyama`.
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

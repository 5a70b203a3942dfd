"""Decoupled MeanFlow (arXiv 2510.24474): the objective of average velocities, and what a run with it needs."""

from collections.abc import Callable
from copy import deepcopy

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sit_atconv.config import Config, FlowConfig, MeanFlowConfig
from sit_atconv.errors import InputError
from sit_atconv.flow import Linear
from sit_atconv.flow.field import match_dims
from sit_atconv.flow.meanflow import contained_guidance, mean_flow_error, squared_error, times_from_normal
from sit_atconv.models import SiT
from sit_atconv.models.embeddings import time_features
from sit_atconv.models.mixers import expand_pattern
from sit_atconv.ops.precision import without_autocast

FEATURES = 128  # Fourier features of each of the two times
FLOOR = 0.01  # c of the weighting
_FIRST_BLOCKS = 20 / 28  # of the depth see t


class MeanFlowLoss(nn.Module):
    """½ (flow matching at t + mean flow from t to r), each in the learnt weighting log(m·e^(−l) + c) + l.

    m is a sample's mean squared error. l is linear in Fourier features of t and r, starts as zero, and is needed in
    training alone, so it is no part of the model.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.guidance, self.interval = config.meanflow.guidance, config.meanflow.interval
        self.shift = config.shift
        self.level = nn.Linear(2 * FEATURES, 1)  # l
        nn.init.zeros_(self.level.weight)
        nn.init.zeros_(self.level.bias)

    def forward(
        self,
        model: SiT,
        network: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        y: Tensor | None,
        times: tuple[Tensor, Tensor],
        noises: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of data x (B, C, H, W), a scalar, and the mean errors of its halves, for the log.

        Args:
            model: the flow map u(x, t, r).
            network: the same as a callable of (x, t), for the flow matching half.
            y: labels (B,), some of them dropped; None for an unconditional model.
            times: t of the flow matching half (B,), and normal numbers for t and r of the other half (B, 2).
            noises: of both halves, (B, C, H, W).
        """
        # Flow matching comes first. Autocast keeps the casts of weights: these must be made with gradients.
        t, path = times[0], Linear()
        x_t, velocity = path.interpolate(x, noises[0], t), path.velocity(x, noises[0], t)
        predicted = network(x_t, t).to(x.dtype)
        flow = squared_error(predicted, self.guided(model, x_t, t, y, velocity))

        def average(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no forward-mode derivative
                return model(x_t, t, y, r=r).to(x.dtype)

        later, r = times_from_normal(times[1], self.shift)
        x_t, velocity = path.interpolate(x, noises[1], later), path.velocity(x, noises[1], later)
        mean = mean_flow_error(average, x_t, later, r, self.guided(model, x_t, later, y, velocity))
        loss = (self.weighted(flow, t, t) + self.weighted(mean, later, r)).mean() / 2
        return loss, {"flow": flow.mean().detach(), "mean_flow": mean.mean().detach()}

    def guided(self, model: SiT, x_t: Tensor, t: Tensor, y: Tensor | None, velocity: Tensor) -> Tensor:
        """The velocity (B, C, H, W) with the guidance that the model is to contain; without it at dropped labels.

        See `contained_guidance`; no gradients flow through it.
        """
        if y is None or self.guidance == 1:
            return velocity
        null = torch.full_like(y, model.num_classes)
        with torch.no_grad():
            both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null])).to(velocity.dtype)
        low, high = self.interval
        acts = (low <= t) & (t <= high) & (y != null)
        return torch.where(match_dims(acts, x_t), contained_guidance(velocity, *both.chunk(2), self.guidance), velocity)

    def weighted(self, error: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """log(m·e^(−l) + c) + l for mean squared errors m (B,) between times (B,): (B,).

        It is computed as log(m + c·e^l), which is the same and cannot overflow.
        """
        with without_autocast(error.device):
            features = torch.cat([time_features(t, FEATURES), time_features(r, FEATURES)], dim=1)
            level = self.level(features.to(self.level.weight.dtype)).squeeze(1)
            return torch.log(error + FLOOR * level.exp())


def make_flow_map(model: SiT, config: MeanFlowConfig) -> None:
    """Let `model` predict average velocities. Raises `InputError` when it has fewer blocks than are to see t."""
    depth = len(model.blocks)
    blocks = config.blocks or round(depth * _FIRST_BLOCKS)
    if blocks > depth:
        raise InputError(f"flow.meanflow.blocks is {blocks}, but the model has {depth} blocks: give 1 to {depth}.")
    model.register_to_config(meanflow_blocks=blocks)


def require_mean_flow(config: Config, accelerator: Accelerator) -> None:
    """Raise `InputError` for a setting that the objective does not go with, or that would do nothing without it."""
    flow, training = config.flow, config.training
    if flow.objective != "meanflow":
        if flow.meanflow != MeanFlowConfig():
            raise InputError("flow.meanflow does nothing here: set flow.objective to meanflow, or leave it out.")
        return
    refused = {
        f"flow.interpolant {flow.interpolant}: it is defined for the linear one": flow.interpolant != "linear",
        "model.internal_block: the second head would have to predict average velocities as well. Set it to null": (
            config.model.internal_block is not None
        ),
        "flow.cosine, which compares velocities. Set it to 0": flow.cosine > 0,
        f"flow.prediction {flow.prediction}: an average velocity is a velocity": flow.prediction != "velocity",
        "training.precision fp16: its derivatives leave the range of fp16. Take bf16": training.precision == "fp16",
        "training.compile: torch crashes where forward derivatives are compiled. Set it to false": training.compile,
        f"training.gradient_checkpointing {training.gradient_checkpointing}: what is recomputed has no forward-mode "
        "derivative. Set it to none": training.gradient_checkpointing != "none",
        "FSDP, which does not gather weights again for the backward pass of a forward-mode derivative. Take "
        "configs/accelerate/ddp.yaml": accelerator.distributed_type == DistributedType.FSDP,
        "DeepSpeed, under which it was never tried. Take configs/accelerate/ddp.yaml": accelerator.distributed_type
        == DistributedType.DEEPSPEED,
    }
    for what, asked in refused.items():
        if asked:
            raise InputError(f"flow.objective meanflow does not go with {what}.")
    low, high = flow.meanflow.interval
    if low > high:
        raise InputError(f"flow.meanflow.interval must be low <= high, not {low} {high}.")


def require_trainable(model: SiT, config: FlowConfig) -> None:
    """Raise `InputError` unless the model's guidance can be learnt and every mixer has a forward-mode derivative."""
    if model.num_classes and config.meanflow.guidance != 1 and config.label_dropout == 0:
        raise InputError(
            f"flow.meanflow.guidance {config.meanflow.guidance} needs a null class, and flow.label_dropout is 0: drop "
            "some labels, such as 0.1, or set flow.meanflow.guidance to 1."
        )
    entries = [str(entry) for entry in expand_pattern(model.config.mixer_pattern, len(model.blocks))]
    for entry, block in dict(zip(entries, model.blocks, strict=True)).items():
        reason = _fault_of_derivative(block.mixer, model.config.hidden_size, model.grid)
        if reason is not None:
            raise InputError(
                f"flow.objective meanflow needs the forward-mode derivative of every mixer, and that of '{entry}' "
                f"{reason}. Choose another mixer, or flow.objective flow-matching."
            )


def _fault_of_derivative(mixer: nn.Module, dim: int, grid: tuple[int, int]) -> str | None:
    """What is wrong with the mixer's derivative for tokens (1, N, dim), in fp64; None if it agrees with differences."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, grid[0] * grid[1], dim)
    x, direction = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    wide, step = deepcopy(mixer).double(), 1e-5
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            found = torch.func.jvp(lambda x: wide(x, grid), (x,), (direction,))[1]
            expected = (wide(x + step * direction, grid) - wide(x - step * direction, grid)) / (2 * step)
    except Exception as error:  # mixers of others may raise anything
        return f"fails ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
    scale = expected.abs().max()
    return None if (found - expected).abs().max() <= 1e-3 * scale else "is wrong: it differs from differences"

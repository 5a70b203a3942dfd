"""The training loss of one micro-batch: flow matching, and alignment to teachers when there are any."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sit_atconv.alignment import ConvProjector, Projector, normalise_spatially
from sit_atconv.config import AlignmentConfig, FlowConfig
from sit_atconv.flow import (
    alignment_loss,
    create_interpolant,
    drop_labels,
    flow_matching_loss,
    require_loss,
    require_times,
    times_from_uniform,
)
from sit_atconv.models import SiT
from sit_atconv.randomness import Stream, keyed_normal, keyed_uniform
from sit_atconv.training.session.meanflow import MeanFlowLoss


@dataclass(frozen=True)
class Draws:
    """All random numbers of a micro-batch; each row is a function of (seed, position in the data order)."""

    times: Tensor  # (B,) fp32
    noise: Tensor  # (B, C, H, W)
    posterior_noise: Tensor  # (B, C, H, W)
    dropout: Tensor  # (B,) uniform in [0, 1)
    # Of the objective meanflow alone: for the times t and r, (B, 2) standard normal, and its noise (B, C, H, W)
    mean_flow_times: Tensor | None = None
    mean_flow_noise: Tensor | None = None


def draw(positions: Tensor, shape: tuple[int, ...], config: FlowConfig, seed: int) -> Draws:
    """Times, noise, posterior noise and label dropout for the samples at `positions` (B,), on the CPU."""
    rows = positions.tolist()
    u = keyed_uniform(seed, Stream.TIME, rows)
    interpolant = create_interpolant(config.interpolant)
    more = {}
    if config.objective == "meanflow":
        more["mean_flow_times"] = keyed_normal(seed, Stream.MEAN_FLOW_TIMES, rows, (2,))
        more["mean_flow_noise"] = keyed_normal(seed, Stream.MEAN_FLOW_NOISE, rows, shape)
    return Draws(
        times_from_uniform(u, config.times, interpolant, config.shift, config.prediction).float(),
        keyed_normal(seed, Stream.NOISE, rows, shape),
        keyed_normal(seed, Stream.POSTERIOR, rows, shape),
        keyed_uniform(seed, Stream.LABEL_DROPOUT, rows),
        **more,
    )


def draw_fields(positions: list[int], shape: tuple[int, ...], config: FlowConfig, seed: int) -> dict[str, Tensor]:
    """`draw` as a dictionary, for data loader workers: a large batch's noise takes longer than reading the batch."""
    draws = vars(draw(torch.tensor(positions), shape, config, seed))
    return {name: tensor for name, tensor in draws.items() if tensor is not None}


class Objective(nn.Module):
    """SiT and its projectors in one module, so that distributed wrappers see a single forward pass.

    Args:
        model: the network to train.
        flow: the flow-matching objective.
        alignment: None for a plain SiT run.
        teacher_widths: D of each teacher.

    Raises:
        InputError: for a weighting or a distribution of times that the prediction or the interpolant does not support.
    """

    def __init__(
        self, model: SiT, flow: FlowConfig, alignment: AlignmentConfig | None, teacher_widths: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.model, self.flow, self.alignment = model, flow, alignment
        self.interpolant = create_interpolant(flow.interpolant)
        require_loss(flow.prediction, flow.weighting)
        require_times(flow.times, self.interpolant)
        self.projectors = nn.ModuleList(self._projector(width) for width in teacher_widths)
        self.mean_flow = MeanFlowLoss(flow) if flow.objective == "meanflow" else None

    def forward(
        self, latents: Tensor, labels: Tensor, draws: Draws, teachers: list[Tensor] | None
    ) -> dict[str, Tensor]:
        """Scalar loss terms of latents (B, C, H, W) with labels (B,); "loss" is to be minimised.

        `teachers` holds the tokens (B, N, D) of each teacher; None when the alignment has stopped.
        """
        y = None
        if self.model.num_classes:
            y = drop_labels(labels, draws.dropout, self.flow.label_dropout, self.model.num_classes)
        projected: list[Tensor] = []

        def project(tokens: Tensor) -> None:
            projected.extend(projector(tokens) for projector in self.projectors)

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            blocks = [self.alignment.block] if self.alignment else []
            return self.model.forward_intermediates(x_t, t, y, blocks, read=project)[0]

        if self.mean_flow is not None:
            times, noises = (draws.times, draws.mean_flow_times), (draws.noise, draws.mean_flow_noise)
            flow, terms = self.mean_flow(self.model, network, latents, y, times, noises)
        else:
            flow = flow_matching_loss(
                network,
                latents,
                draws.noise,
                draws.times,
                self.interpolant,
                prediction=self.flow.prediction,
                weighting=self.flow.weighting,
            ).mean()
            terms = {"flow": flow.detach()}
        if self.alignment is None:
            return {"loss": flow, **terms}
        alignment = self._alignment(projected, teachers)
        loss = flow + self.alignment.coefficient * alignment
        return {"loss": loss, **terms, "alignment": alignment.detach()}

    def _alignment(self, projected: list[Tensor], teachers: list[Tensor] | None) -> Tensor:
        if teachers is None:  # zero with zero gradients: distributed wrappers expect the same graph in every step
            return 0 * torch.stack([each.float().mean() for each in projected]).sum()
        if self.alignment.variant == "irepa":
            teachers = [normalise_spatially(target) for target in teachers]
        terms = [alignment_loss(each, target).mean() for each, target in zip(projected, teachers, strict=True)]
        return torch.stack(terms).mean()

    def _projector(self, width: int) -> nn.Module:
        dim = self.model.config.hidden_size
        if self.alignment.variant == "irepa":
            return ConvProjector(dim, width, self.model.grid)
        return Projector(dim, width, self.alignment.projector_width)

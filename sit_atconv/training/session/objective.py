"""The training loss of one micro-batch: flow matching, and alignment to teachers when there are any."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sit_atconv.alignment import ConvProjector, Projector, normalise_spatially
from sit_atconv.config import AlignmentConfig, FlowConfig
from sit_atconv.flow import (
    alignment_loss,
    create_interpolant,
    direction_loss,
    drop_labels,
    flow_matching_loss,
    require_direction,
    require_loss,
    require_times,
    times_from_uniform,
)
from sit_atconv.models import SiT
from sit_atconv.randomness import Stream, keyed_normal, keyed_uniform


@dataclass(frozen=True)
class Draws:
    """All random numbers of a micro-batch; each row is a function of (seed, position in the data order)."""

    times: Tensor  # (B,) fp32
    noise: Tensor  # (B, C, H, W)
    posterior_noise: Tensor  # (B, C, H, W)
    dropout: Tensor  # (B,) uniform in [0, 1)


def draw(positions: Tensor, shape: tuple[int, ...], config: FlowConfig, seed: int) -> Draws:
    """Times, noise, posterior noise and label dropout for the samples at `positions` (B,), on the CPU."""
    rows = positions.tolist()
    u = keyed_uniform(seed, Stream.TIME, rows)
    interpolant = create_interpolant(config.interpolant)
    return Draws(
        times_from_uniform(
            u, config.times, interpolant, config.shift, config.prediction, config.times_mean, config.times_std
        ).float(),
        keyed_normal(seed, Stream.NOISE, rows, shape),
        keyed_normal(seed, Stream.POSTERIOR, rows, shape),
        keyed_uniform(seed, Stream.LABEL_DROPOUT, rows),
    )


def draw_fields(positions: list[int], shape: tuple[int, ...], config: FlowConfig, seed: int) -> dict[str, Tensor]:
    """`draw` as a dictionary, for data loader workers: a large batch's noise takes longer than reading the batch."""
    return vars(draw(torch.tensor(positions), shape, config, seed))


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
        require_times(flow.times, self.interpolant, flow.times_mean, flow.times_std)
        if flow.cosine:
            require_direction(flow.prediction, model.in_channels)
        self.projectors = nn.ModuleList(self._projector(width) for width in teacher_widths)

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
        predicted: list[Tensor] = []

        def project(tokens: Tensor) -> None:
            projected.extend(projector(tokens) for projector in self.projectors)

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            blocks = [self.alignment.block] if self.alignment else []
            predicted.append(self.model.forward_intermediates(x_t, t, y, blocks, read=project)[0])
            return predicted[-1]

        flow = flow_matching_loss(
            network,
            latents,
            draws.noise,
            draws.times,
            self.interpolant,
            prediction=self.flow.prediction,
            weighting=self.flow.weighting,
        ).mean()
        loss, terms = flow, {"flow": flow.detach()}
        if self.flow.cosine:
            cosine = direction_loss(predicted[0], latents, draws.noise, draws.times, self.interpolant).mean()
            loss, terms["cosine"] = loss + self.flow.cosine * cosine, cosine.detach()
        if self.alignment is not None:
            alignment = self._alignment(projected, teachers)
            loss, terms["alignment"] = loss + self.alignment.coefficient * alignment, alignment.detach()
        return {"loss": loss, **terms}

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

"""The training loss of one micro-batch: flow matching, and what is asked for beside it, as alignment to teachers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sit_atconv.alignment import (
    LATENTS,
    ConvProjector,
    LatentProjector,
    Projector,
    dispersive_loss,
    latent_loss,
    normalise_spatially,
)
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
from sit_atconv.models.sit import INTERNAL
from sit_atconv.randomness import Stream, keyed_normal, keyed_uniform
from sit_atconv.training.session.meanflow import MeanFlowLoss

PREDICTED = "predicted"  # the key of the network's prediction among what a forward pass gives


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
        times_from_uniform(
            u, config.times, interpolant, config.shift, config.prediction, config.times_mean, config.times_std
        ).float(),
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
        require_times(flow.times, self.interpolant, flow.times_mean, flow.times_std)
        if flow.cosine:
            require_direction(flow.prediction, model.in_channels)
        self._by_latents = [teacher.name == LATENTS for teacher in alignment.teachers] if teacher_widths else []
        kinds = zip(teacher_widths, self._by_latents, strict=True)
        self.projectors = nn.ModuleList(self._projector(width, by_latents) for width, by_latents in kinds)
        self._dispersed = None if flow.dispersion is None else flow.dispersion_block or max(1, len(model.blocks) // 4)
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
        found: dict[str, Tensor] = {}  # what the forward pass gives beside the prediction

        def read(block: int, tokens: Tensor) -> None:
            if self.alignment and block == self.alignment.block:
                projected.extend(projector(tokens) for projector in self.projectors)
            if block == self._dispersed:
                found["dispersion"] = dispersive_loss(tokens, self.flow.dispersion_group, self.flow.dispersion_tau)

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            blocks = [each for each in (self.alignment and self.alignment.block, self._dispersed) if each]
            has_head = self.model.internal is not None
            prediction, others = self.model.forward_intermediates(x_t, t, y, blocks, read=read, internal=has_head)
            found.update({INTERNAL: others[INTERNAL]} if has_head else {})
            found[PREDICTED] = prediction
            return prediction

        if self.mean_flow is not None:
            times, noises = (draws.times, draws.mean_flow_times), (draws.noise, draws.mean_flow_noise)
            loss, terms = self.mean_flow(self.model, network, latents, y, times, noises)
        else:
            loss = self._error(network, latents, draws)
            terms = {"flow": loss.detach()}
        if self.flow.cosine:
            cosine = direction_loss(found[PREDICTED], latents, draws.noise, draws.times, self.interpolant).mean()
            loss, terms["cosine"] = loss + self.flow.cosine * cosine, cosine.detach()
        if self.alignment is not None:
            alignment = self._alignment(projected, teachers)
            loss, terms["alignment"] = loss + self.alignment.coefficient * alignment, alignment.detach()
        if INTERNAL in found:
            internal = self._error(lambda x_t, t: found[INTERNAL], latents, draws)
            loss, terms[INTERNAL] = loss + self.flow.internal_weight * internal, internal.detach()
        if self._dispersed is not None:
            dispersion = found["dispersion"]
            loss, terms["dispersion"] = loss + self.flow.dispersion * dispersion, dispersion.detach()
        return {"loss": loss, **terms}

    def _error(self, network: Callable[[Tensor, Tensor], Tensor], latents: Tensor, draws: Draws) -> Tensor:
        """The mean loss of a prediction."""
        flow, path = self.flow, self.interpolant
        losses = flow_matching_loss(
            network, latents, draws.noise, draws.times, path, prediction=flow.prediction, weighting=flow.weighting
        )
        return losses.mean()

    def _alignment(self, projected: list[Tensor], teachers: list[Tensor] | None) -> Tensor:
        if teachers is None:  # zero with zero gradients: distributed wrappers expect the same graph in every step
            return 0 * torch.stack([each.float().mean() for each in projected]).sum()
        terms = []
        for each, target, by_latents in zip(projected, teachers, self._by_latents, strict=True):
            if by_latents:
                terms.append(latent_loss(each, target).mean())
            else:
                target = normalise_spatially(target) if self.alignment.variant == "irepa" else target
                terms.append(alignment_loss(each, target).mean())
        return torch.stack(terms).mean()

    def _projector(self, width: int, by_latents: bool) -> nn.Module:
        dim = self.model.config.hidden_size
        if by_latents:
            return LatentProjector(dim, width)
        if self.alignment.variant == "irepa":
            return ConvProjector(dim, width, self.model.grid)
        return Projector(dim, width, self.alignment.projector_width)

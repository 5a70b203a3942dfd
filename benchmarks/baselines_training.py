"""The training steps of SiT (arXiv 2401.08740) and REPA (arXiv 2410.06940), transcribed to compare with.

Written from their description, and as those programs work: AdamW as torch makes it by default, an average updated
parameter by parameter through dictionaries of names, the loss read back in every step, REPA's alignment summed in a
loop over teachers and samples. Latents, times, noise and label dropout are given, so that results can be compared;
encoding and logging are left out.
"""

import copy
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines_model import ReleasedSiT
from sit_atconv.training.objective import Draws


class OriginalTraining:
    """Weights, average and optimiser, and a step of either program on them.

    Args:
        network: trained in place.
        precision: "no", or "bf16" for autocast, which REPA has from Accelerate and SiT has not.
        lr, decay: both programs'.
    """

    def __init__(self, network: ReleasedSiT, precision: str = "no", lr: float = 1e-4, decay: float = 0.9999) -> None:
        self.network, self.precision, self.decay = network, precision, decay
        self.ema = copy.deepcopy(network).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0)

    def sit_step(self, latents: Tensor, labels: Tensor, draws: Draws) -> float:
        """SiT's step: its time runs from noise to data, its velocity has the other sign; no clipping."""
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
        """REPA's step, aligned to teachers' tokens (B, N, D): the coefficient 0.5, gradients clipped to a norm of 1."""
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
    """Mean over all axes but the first."""
    return torch.mean(x, dim=list(range(1, x.ndim)))


def alignment_by_samples(projected: list[Tensor], targets: list[Tensor]) -> Tensor:
    """−cos of projected and teacher tokens, each (B, N, D), averaged by a loop over teachers and samples."""
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

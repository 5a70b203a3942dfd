"""The optimizer of a run: AdamW for all weights, or Muon for the hidden matrices and AdamW for the rest."""

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from sit_atconv.config import OptimizerConfig
from sit_atconv.models.matrices import hidden_matrices
from sit_atconv.training.averages.sharding import local, share_of, whole
from sit_atconv.training.session.objective import Objective

_ADAM, _MOMENTUM = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # Jordan's: they raise small singular values fastest
_RMS = 0.2  # of AdamW's updates, as Moonshot found it (arXiv 2502.16982, Eq. 4)


class Muon(Optimizer):
    """Muon for matrices (Jordan 2024; Liu et al. 2025, arXiv 2502.16982), fused AdamW for all other parameters.

    For a gradient G with momentum μ: B ← μB + (1−μ)G, O = newton_schulz((1−μ)G + μB) and, as decoupled weight decay is
    λ, W ← (1 − ηλ)W − 0.2 √max(rows, columns) η O: a step of the size of AdamW's, so that η and λ are AdamW's. A fused
    weight is treated as the matrices that it holds. Of a sharded matrix every process computes the whole update.

    torch.optim.Muon computes the same for whole matrices; it has no parts, cannot skip a step on the device, and joined
    torch after the oldest version that this program supports.

    Args:
        matrices: each parameter (M, N), and the numbers of rows of the matrices that it holds.
        others: the parameters that AdamW trains.
        lr: η; momentum: μ; weight_decay: λ; betas, eps: AdamW's.

    If `found_inf`, a scalar tensor that is set before a step, is not 0, the step changes nothing; the host never waits
    for its value.
    """

    _step_supports_amp_scaling = True  # torch's loss scaler then leaves skipping to `found_inf`, as with a fused AdamW

    def __init__(
        self,
        matrices: dict[Parameter, tuple[int, ...]],
        others: list[Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self._adam = AdamW(others, lr, betas, eps, weight_decay, fused=True)
        held = {"params": list(matrices), "rows": list(matrices.values()), "momentum": momentum}
        super().__init__([held, *self._adam.param_groups], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient, unless `found_inf`."""
        matrices, others = self.param_groups
        found_inf = getattr(self, "found_inf", None)
        for parameter, rows in zip(matrices["params"], matrices["rows"], strict=True):
            if parameter.grad is not None:
                self._update(parameter, rows, matrices, found_inf)
        # Groups and state are this optimizer's own: whoever wraps it may have replaced them.
        self._adam.param_groups, self._adam.state = [others], self.state
        self._adam.found_inf, self._adam.grad_scale = found_inf, None
        self._adam.step()

    def _update(self, parameter: Parameter, rows: tuple[int, ...], group: dict, found_inf: Tensor | None) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        # Shards of all three; the same tensors where nothing is sharded
        weight, gradient, average = map(local, (parameter, parameter.grad, state["momentum_buffer"]))
        moved = average.lerp(gradient, 1 - group["momentum"])
        ahead = torch.empty_like(parameter, dtype=_precision(weight))
        local(ahead).copy_(gradient.lerp(moved, group["momentum"]))  # Nesterov's
        scaled = [_size(part) * newton_schulz(part).to(weight.dtype) for part in whole(ahead).split(rows)]
        stepped = weight * (1 - group["lr"] * group["weight_decay"])
        stepped.add_(share_of(torch.cat(scaled), parameter), alpha=-group["lr"])
        if found_inf is not None:
            bad = found_inf != 0
            moved, stepped = torch.where(bad, average, moved), torch.where(bad, weight, stepped)
        average.copy_(moved)
        weight.copy_(stepped)


def build_optimizer(settings: OptimizerConfig, objective: Objective) -> AdamW | Muon:
    """The optimizer that the configuration names, for all parameters of `objective`."""
    adam = {"betas": tuple(settings.betas), "eps": settings.eps}
    if settings.name == "adamw":
        return AdamW(objective.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True, **adam)
    rows = {f"model.{name}": parts for name, parts in hidden_matrices(objective.model).items()}
    named = dict(objective.named_parameters())
    return Muon(
        {named[name]: parts for name, parts in rows.items()},
        [parameter for name, parameter in named.items() if name not in rows],
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        **adam,
    )


def state_keys(optimizer: Optimizer, parameter: Parameter) -> tuple[str, ...]:
    """The names of the tensors that the optimizer keeps for a parameter."""
    if isinstance(optimizer, SGD):
        return _MOMENTUM
    matrices = optimizer.param_groups[0]["params"] if isinstance(optimizer, Muon) else ()
    return _MOMENTUM if any(parameter is each for each in matrices) else _ADAM


def newton_schulz(matrix: Tensor) -> Tensor:
    """About UVᵀ of a matrix (M, N) = UΣVᵀ, in its dtype: all of its singular values become 0.7 to 1.2.

    Five iterations X ← aX + (bA + cA²)X with A = XXᵀ, from X of Frobenius norm 1.
    """
    a, b, c = _COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]  # A is the smaller product
    x = matrix if wide else matrix.mT
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def _size(matrix: Tensor) -> float:
    """Brings an orthogonal matrix to the root mean square of AdamW's updates: that of UVᵀ is 1/√max(M, N)."""
    return _RMS * max(matrix.shape) ** 0.5


def _precision(weight: Tensor) -> torch.dtype:
    """bf16 on a GPU, as published; CPUs without bf16 matrix units are slower in bf16."""
    return torch.bfloat16 if weight.device.type == "cuda" else torch.float32

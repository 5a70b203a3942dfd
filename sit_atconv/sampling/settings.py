"""Sampler settings: together with model, labels and seed they determine every sample."""

import math
from dataclasses import dataclass, fields
from typing import Any

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.flow import DIFFUSIONS, LAST_STEPS, ODE_METHODS
from sit_atconv.flow.guidance import require_guidance_ranges
from sit_atconv.flow.ode import FIXED_STEP_METHODS, require_steps

SDE_SOLVERS = {"sde": "euler-maruyama", "sde-heun": "heun"}
MEAN_FLOW = "meanflow"  # of flow maps
SOLVERS = (*ODE_METHODS, *SDE_SOLVERS, MEAN_FLOW)
PRECISIONS = ("no", "bf16")
OF_GUIDANCE = ("guidance", "interval", "guidance_channels", "internal_guidance", "internal_interval")
_JOINED_LATER = ("internal_guidance", "internal_interval")
_FIXED = f"{', '.join(FIXED_STEP_METHODS[:-1])} or {FIXED_STEP_METHODS[-1]}"


class NoEffectError(InputError):
    """Options that would do nothing beside the others; `names` are their settings."""

    def __init__(self, names: list[str], why: str) -> None:
        super().__init__(f"{', '.join(names)} would do nothing {why}.")
        self.names = names


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of the sampler.

    Args:
        solver: "euler", "heun", "midpoint", "adams2", "adams4", "dopri5" (ODE), "sde" (Euler-Maruyama), "sde-heun", or
            "meanflow", of models that were trained with that objective, which takes 1, 2 or 4 steps.
        steps: N intervals; dopri5 chooses its own.
        guidance: guidance scale, 1 for none.
        interval: times (low, high) within which guidance acts.
        internal_guidance: scale of Internal Guidance by the model's own head (arXiv 2512.24176), 1 for none.
        internal_interval: times (low, high) within which Internal Guidance acts.
        guidance_channels: guide only this many leading latent channels; None guides all.
        shift: timestep shift of the ODE solvers with fixed steps and of meanflow.
        atol, rtol: tolerances of dopri5.
        diffusion, diffusion_scale, last_step, last_step_size: of the SDE, see `integrate_sde`.
        precision: "no", or "bf16" to run the network in autocast.
        compile: compile the repeated blocks, one program for all batch sizes; this takes about a minute and pays off in
            long runs on a GPU.

    Raises:
        InputError: for unknown names, values out of range, and (`NoEffectError`) options that would have no effect: an
            interval or channels without guidance, options of another kind of solver, the size of a last step without
            one.
    """

    solver: str = "heun"
    steps: int = 50
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    guidance_channels: int | None = None
    shift: float = 1.0
    atol: float = 1e-6
    rtol: float = 1e-3
    diffusion: str = "sigma"
    diffusion_scale: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04
    precision: str = "no"
    compile: bool = False
    internal_guidance: float = 1.0
    internal_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        require_one_of(self.solver, SOLVERS, "solver")
        require_one_of(self.precision, PRECISIONS, "precision")
        require_one_of(self.diffusion, DIFFUSIONS, "diffusion")
        require_one_of(self.last_step, LAST_STEPS, "last step")
        self._require_ranges()
        if self.solver == MEAN_FLOW and not self.guidance == self.internal_guidance == 1:
            raise InputError(
                f"The solver meanflow takes no guidance, which is in the model's weights since training: guidance is "
                f"{self.guidance}, internal guidance {self.internal_guidance}. Leave both at 1."
            )
        if self.guidance == 1:
            self._refuse(("interval", "guidance_channels"), "without guidance: give a guidance scale other than 1")
        if self.internal_guidance == 1:
            self._refuse(("internal_interval",), "without Internal Guidance: give an internal guidance other than 1")
        if not self.stochastic:
            of_sde = ("diffusion", "diffusion_scale", "last_step", "last_step_size")
            self._refuse(of_sde, f"with the ODE solver {self.solver}: choose the solver sde or sde-heun")
        if self.last_step == "none":
            self._refuse(("last_step_size",), f"with the last step none: choose {', '.join(LAST_STEPS[:-1])}")
        if self.stochastic or self.solver == "dopri5":
            self._refuse(("shift",), f"with the solver {self.solver}: choose {_FIXED}")
        if self.solver != "dopri5":
            self._refuse(("atol", "rtol"), f"with the solver {self.solver}: they are dopri5's")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has them; those that joined later only where they are set, as in files of earlier versions."""
        later = {f.name: f.default for f in fields(self) if f.name in _JOINED_LATER}
        given = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}
        return {name: v for name, v in given.items() if name not in later or getattr(self, name) != later[name]}

    @property
    def stochastic(self) -> bool:
        """Whether the solver is an SDE solver."""
        return self.solver in SDE_SOLVERS

    def _require_ranges(self) -> None:
        """Raise early what guidance and solvers would raise only after the sample directory was created."""
        require_steps(self.steps)
        require_guidance_ranges(self.guidance, self.interval)
        require_guidance_ranges(self.internal_guidance, self.internal_interval, "internal guidance")
        if not 0 < self.shift < math.inf:
            raise InputError(f"The timestep shift must be positive and finite, not {self.shift}; 1 is none.")
        if not 0 <= self.diffusion_scale < math.inf:
            raise InputError(f"The diffusion scale must be a finite number >= 0, not {self.diffusion_scale}.")
        if not 0 < self.last_step_size < 1:
            raise InputError(f"The last step's size must lie between 0 and 1: not {self.last_step_size}.")
        if not (0 <= self.atol < math.inf and 0 <= self.rtol < math.inf and self.atol + self.rtol > 0):
            raise InputError(
                f"The tolerances must be finite numbers >= 0, and one of them positive: not atol {self.atol} and rtol "
                f"{self.rtol}."
            )

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        given = [name for name in names if getattr(self, name) != defaults[name]]
        if given:
            raise NoEffectError(given, why)

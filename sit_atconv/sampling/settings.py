"""Sampler settings: together with model, labels and seed they determine every sample."""

import math
from dataclasses import dataclass, fields

from sit_atconv.errors import InputError, require_one_of
from sit_atconv.flow import DIFFUSIONS, LAST_STEPS, ODE_METHODS
from sit_atconv.flow.ode import require_steps

SDE_SOLVERS = {"sde": "euler-maruyama", "sde-heun": "heun"}
MEAN_FLOW = "meanflow"  # of flow maps
SOLVERS = (*ODE_METHODS, *SDE_SOLVERS, MEAN_FLOW)
PRECISIONS = ("no", "bf16")


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of the sampler.

    Args:
        solver: "euler", "heun", "midpoint", "dopri5" (ODE), "sde" (Euler-Maruyama), "sde-heun", or "meanflow", of
            models that were trained with that objective, which takes 1, 2 or 4 steps.
        steps: N intervals; dopri5 chooses its own.
        guidance: guidance scale, 1 for none.
        interval: times (low, high) within which guidance acts.
        guidance_channels: guide only this many leading latent channels; None guides all.
        shift: timestep shift of euler, heun, midpoint and meanflow.
        atol, rtol: tolerances of dopri5.
        diffusion, diffusion_scale, last_step, last_step_size: of the SDE, see `integrate_sde`.
        precision: "no", or "bf16" to run the network in autocast.
        compile: compile the repeated blocks, one program for all batch sizes; this takes about a minute and pays off in
            long runs on a GPU.

    Raises:
        InputError: for unknown names, values out of range, and options that would have no effect: an interval or
            channels without guidance, options of another kind of solver, the size of a last step without one.
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

    def __post_init__(self) -> None:
        require_one_of(self.solver, SOLVERS, "solver")
        require_one_of(self.precision, PRECISIONS, "precision")
        require_one_of(self.diffusion, DIFFUSIONS, "diffusion")
        require_one_of(self.last_step, LAST_STEPS, "last step")
        self._require_ranges()
        if self.solver == MEAN_FLOW and self.guidance != 1:
            raise InputError(
                f"The solver meanflow takes no guidance, which is in the model's weights since training: guidance is "
                f"{self.guidance}. Leave it at 1."
            )
        if self.guidance == 1:
            self._refuse(("interval", "guidance_channels"), "without guidance: give a guidance scale other than 1")
        if not self.stochastic:
            of_sde = ("diffusion", "diffusion_scale", "last_step", "last_step_size")
            self._refuse(of_sde, f"with the ODE solver {self.solver}: choose the solver sde or sde-heun")
        if self.last_step == "none":
            self._refuse(("last_step_size",), f"with the last step none: choose {', '.join(LAST_STEPS[:-1])}")
        if self.stochastic or self.solver == "dopri5":
            self._refuse(("shift",), f"with the solver {self.solver}: choose euler, heun or midpoint")
        if self.solver != "dopri5":
            self._refuse(("atol", "rtol"), f"with the solver {self.solver}: they are dopri5's")

    @property
    def stochastic(self) -> bool:
        """Whether the solver is an SDE solver."""
        return self.solver in SDE_SOLVERS

    def _require_ranges(self) -> None:
        """Raise early what guidance and solvers would raise only after the sample directory was created."""
        require_steps(self.steps)
        if not 0 <= self.guidance < math.inf:
            raise InputError(f"The guidance scale must be a finite number >= 0, not {self.guidance}; 1 is no guidance.")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise InputError(f"The guidance interval must satisfy 0 <= low <= high <= 1, not {low} {high}.")
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
            raise InputError(f"{', '.join(given)} would do nothing {why}.")

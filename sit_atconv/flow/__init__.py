"""Flow matching: interpolants, losses, guidance and solvers, all pure functions of a `velocity(x, t)` callable."""

from sit_atconv.flow.guidance import guided_velocity
from sit_atconv.flow.interpolants import VP, Cosine, Interpolant, Linear, create_interpolant
from sit_atconv.flow.losses import alignment_loss, drop_labels, flow_matching_loss, times_from_uniform
from sit_atconv.flow.ode import ODE_METHODS, integrate_ode
from sit_atconv.flow.sde import DIFFUSIONS, LAST_STEPS, integrate_sde

__all__ = [
    "DIFFUSIONS",
    "LAST_STEPS",
    "ODE_METHODS",
    "VP",
    "Cosine",
    "Interpolant",
    "Linear",
    "alignment_loss",
    "create_interpolant",
    "drop_labels",
    "flow_matching_loss",
    "guided_velocity",
    "integrate_ode",
    "integrate_sde",
    "times_from_uniform",
]

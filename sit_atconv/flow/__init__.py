"""Flow matching: interpolants, losses, guidance and solvers, as pure functions of a `velocity(x, t)` callable."""

from sit_atconv.flow.finite import NonFiniteError
from sit_atconv.flow.guidance import guided_velocity, internally_guided
from sit_atconv.flow.interpolants import PREDICTIONS, VP, Cosine, Interpolant, Linear, create_interpolant
from sit_atconv.flow.likelihood import bits_per_dimension
from sit_atconv.flow.losses import (
    WEIGHTINGS,
    alignment_loss,
    direction_loss,
    drop_labels,
    flow_matching_loss,
    require_direction,
    require_loss,
    require_times,
    times_from_uniform,
)
from sit_atconv.flow.ode import ODE_METHODS, integrate_ode, invert
from sit_atconv.flow.predictions import velocity_from_prediction
from sit_atconv.flow.sde import DIFFUSIONS, LAST_STEPS, SDE_METHODS, integrate_sde

__all__ = [
    "DIFFUSIONS",
    "LAST_STEPS",
    "ODE_METHODS",
    "PREDICTIONS",
    "SDE_METHODS",
    "VP",
    "WEIGHTINGS",
    "Cosine",
    "Interpolant",
    "Linear",
    "NonFiniteError",
    "alignment_loss",
    "bits_per_dimension",
    "create_interpolant",
    "direction_loss",
    "drop_labels",
    "flow_matching_loss",
    "guided_velocity",
    "integrate_ode",
    "integrate_sde",
    "internally_guided",
    "invert",
    "require_direction",
    "require_loss",
    "require_times",
    "times_from_uniform",
    "velocity_from_prediction",
]

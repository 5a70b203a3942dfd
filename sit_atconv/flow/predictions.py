"""Velocity fields from networks that predict noise, score or data instead of the velocity."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from sit_atconv.errors import require_one_of
from sit_atconv.flow.field import at_step, switch_times
from sit_atconv.flow.interpolants import PREDICTIONS, Interpolant

_CONVERSIONS: dict[str, Callable[[Interpolant, Tensor, Tensor, Tensor], Tensor]] = {
    "noise": Interpolant.velocity_from_noise,
    "score": Interpolant.velocity_from_score,
    "data": Interpolant.velocity_from_data,
}


@dataclass(frozen=True)
class PredictedVelocity:
    """See `velocity_from_prediction`."""

    network: Callable[..., Tensor]
    prediction: str
    interpolant: Interpolant

    def __call__(self, x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        predicted = self.network(x, t, *labels)
        # In the solver's precision, which is that of t: near the singular ends the two terms nearly cancel.
        return _CONVERSIONS[self.prediction](self.interpolant, x.to(t.dtype), predicted.to(t.dtype), t)

    def at_step(self, t: float) -> "PredictedVelocity":
        """See `field.at_step`."""
        return replace(self, network=at_step(self.network, t))

    @property
    def switch_times(self) -> tuple[float, ...]:
        """See `field.switch_times`."""
        return switch_times(self.network)


def velocity_from_prediction(
    network: Callable[..., Tensor], prediction: str, interpolant: Interpolant
) -> Callable[..., Tensor]:
    """The velocity field of a network that predicts `prediction`, one of `PREDICTIONS`.

    Guide first, then convert: `velocity_from_prediction(guided_velocity(model, …), …)`. At fixed (x, t) the conversion
    is affine in the prediction and the guidance weights add up to 1, so either order gives the same field; this one
    converts once. Only models that predict different things must be converted before one guides the other, which is
    why labels after (x, t) are passed on.

    The conversions are singular at the ends of [0, 1]: integrate within `interpolant.time_range(prediction)`. They also
    amplify errors of the network. Near noise, where α is small, errors of predicted noise and score grow by
    σ' − (α'/α)σ; for the linear interpolant this is 1/(1 − t), up to 1000 where sampling starts. Such a network must be
    trained well at times near noise, which logit-normal times rarely sample. Data predictions are not amplified there,
    and near t = 0 errors have no time left to grow.

    Args:
        network: callable of (x, t) or (x, t, labels), with an optional method `at_step`.
    """
    require_one_of(prediction, PREDICTIONS, "prediction")
    return network if prediction == "velocity" else PredictedVelocity(network, prediction, interpolant)

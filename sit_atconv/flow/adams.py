"""Adams-Bashforth solvers: a step reuses the velocities of the steps before it, and costs one network call.

x_{n+1} = x_n + ∫ p(τ) dτ over the step, where p is the polynomial through the newest k velocities (Hairer, Nørsett &
Wanner I, §III.1 and, for steps of different sizes, §III.5). The error is O(h^k).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sit_atconv.flow.field import Velocity

ADAMS_ORDERS = {"adams2": 2, "adams4": 4}


def adams_weights(past: Sequence[float], t: float, t_next: float) -> list[float]:
    """The weights of the velocities at times `past` and, last, at t, for the step from t to t_next.

    They are the integrals of the Lagrange polynomials: the only weights with which the step is exact for every
    polynomial of a degree below their number. Times may be spaced in any way, in either direction.
    """
    h = t_next - t
    nodes = torch.tensor([(each - t) / h for each in (*past, t)], dtype=torch.float64)
    degrees = torch.arange(len(nodes), dtype=torch.float64)
    return (h * torch.linalg.solve(nodes ** degrees[:, None], 1 / (degrees + 1))).tolist()


class Adams:
    """The velocities of the last steps, for a solver of order 2 or 4.

    They are forgotten where the field changes its form (`field.at_step`), for instance where guidance begins or ends: a
    polynomial across the jump would be wrong. The first step, or the first two of order 4, are then one step of the
    midpoint rule, or two of Ralston's method of order 3. A few such steps keep the order of the whole, since their own
    errors are O(h^k) at most; no step evaluates the field at its end, where the last one may be singular.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self._form: Velocity | None = None
        self._past: list[tuple[float, Tensor]] = []

    def step(self, form: Velocity, field: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """The state at t_next. `form` is the field that `at_step` gave, `field` is how it is evaluated."""
        if form != self._form:
            self._form, self._past = form, []
        v = field(x, t)
        starting = len(self._past) < self.order // 2
        known = [*self._past, (float(t), v)]
        self._past = known[1 - self.order :]
        if starting:
            return (_midpoint if self.order == 2 else _ralston)(field, x, v, t, t_next - t)
        weights = adams_weights([time for time, _ in known[:-1]], float(t), float(t_next))
        return x + sum(weight * velocity for weight, (_, velocity) in zip(weights, known, strict=True))


def _midpoint(field: Velocity, x: Tensor, v: Tensor, t: Tensor, h: Tensor) -> Tensor:
    return x + h * field(x + h / 2 * v, t + h / 2)


def _ralston(field: Velocity, x: Tensor, v: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """Ralston (1962): of all methods with three evaluations, the one with the smallest bound of the error."""
    second = field(x + h / 2 * v, t + h / 2)
    third = field(x + 3 * h / 4 * second, t + 3 * h / 4)
    return x + h / 9 * (2 * v + 3 * second + 4 * third)

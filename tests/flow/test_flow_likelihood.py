"""Likelihoods against densities that are known."""

import itertools
import math

import pytest
import torch
from flow_fields import INTERPOLANTS, MEAN, STD, GaussianField, two_bumps
from torch import Tensor, nn

from sit_atconv.errors import InputError
from sit_atconv.flow import Interpolant, NonFiniteError, bits_per_dimension, guided_velocity
from sit_atconv.models import create_model

TIGHT = {"method": "dopri5", "atol": 1e-9, "rtol": 1e-9}


@pytest.mark.parametrize("path", INTERPOLANTS)
def test_bits_of_gaussian_data_are_exact(path: Interpolant) -> None:
    """The Jacobian is diagonal, for which one probe gives the exact divergence."""
    low, high = path.time_range()
    x, exact = MEAN + STD * torch.randn(4, 2, 3, dtype=torch.float64), GaussianField(path)
    for options, tolerance in ((TIGHT, 1e-6), ({"method": "heun", "steps": 200}, 1e-3), ({"method": "dopri5"}, 2e-3)):
        bits = bits_per_dimension(exact, x, **options, start=low, end=high)
        torch.testing.assert_close(bits, exact.bits(x), atol=max(tolerance, 2 * low), rtol=0)


def test_bits_of_a_linear_gaussian_model_are_its_negative_log_density() -> None:
    """For the linear interpolant p(t = 1) is N(0, I): the model's density is the data's, −log₂ N(x; MEAN, STD²)."""
    x = torch.tensor([[0.7], [1.5], [-2.0]], dtype=torch.float64)
    expected = ((x - MEAN) ** 2 / (2 * STD**2) + math.log(STD * math.sqrt(2 * math.pi))).mean(1) / math.log(2)
    torch.testing.assert_close(
        bits_per_dimension(GaussianField(INTERPOLANTS[0]), x, **TIGHT), expected, atol=1e-6, rtol=0
    )


def test_the_probes_average_to_the_exact_likelihood_of_correlated_data() -> None:
    covariance = torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.8, -0.3], [0.0, -0.3, 0.5]], dtype=torch.float64)
    identity = torch.eye(3, dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        a, s = (1 - t).view(-1, 1, 1), t.view(-1, 1, 1)
        slope = (s * identity - a * covariance) @ torch.linalg.inv(a**2 * covariance + s**2 * identity)
        return (slope @ x.unsqueeze(-1)).squeeze(-1)

    x = torch.tensor([0.5, -1.0, 0.8], dtype=torch.float64)
    probes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)))
    bits = bits_per_dimension(velocity, x.expand(8, 3), probe=probes, **TIGHT)
    density = torch.distributions.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(x)
    assert bits.mean().item() == pytest.approx(-density.item() / 3 / math.log(2), abs=1e-6)
    assert bits.std() > 0.01


def test_data_on_a_scale_twice_as_large_have_one_bit_more() -> None:
    class Doubled(GaussianField):
        """The field of 2x for data x: its paths are those of data N(2·MEAN, (2·STD)²) with noise of its own scale."""

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            t = t.view(-1, 1)
            a, variance = 1 - t, ((1 - t) * 2 * STD) ** 2 + t**2
            return -2 * MEAN + (t - a * (2 * STD) ** 2) / variance * (x - a * 2 * MEAN)

    x = torch.randn(3, 2, dtype=torch.float64)
    once = bits_per_dimension(GaussianField(INTERPOLANTS[0]), x, **TIGHT)
    twice = bits_per_dimension(Doubled(INTERPOLANTS[0]), 2 * x, **TIGHT)
    torch.testing.assert_close(twice, once + 1, atol=1e-6, rtol=0)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x, probe = torch.randn(4, 2, dtype=torch.float64), torch.tensor([1.0, -1.0]).expand(4, 2)
    together = bits_per_dimension(two_bumps, x, method="dopri5", probe=probe)
    alone = [bits_per_dimension(two_bumps, x[i : i + 1], method="dopri5", probe=probe[:1]) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("method", ["heun", "dopri5"])
def test_networks_are_differentiated_whatever_the_caller_has_switched_off(method: str) -> None:
    model = create_model("SiT-Hybrid-S/2", 4, 1, 2, hidden_size=16, depth=2, num_heads=2).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    labels, x = torch.tensor([0, 1]), torch.randn(2, 1, 4, 4)
    velocity = guided_velocity(model, labels, null_label=2)
    options = {"probe": torch.ones_like(x), "atol": 0.1, "rtol": 0.1}
    bits = bits_per_dimension(velocity, x, 3, method, **options)
    assert bits.shape == (2,)
    assert not bits.requires_grad
    for switched_off in (torch.no_grad, torch.inference_mode):
        with switched_off():
            torch.testing.assert_close(bits_per_dimension(velocity, x, 3, method, **options), bits)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_divergence_of_a_network_is_the_trace_of_its_jacobian() -> None:
    model = create_model("SiT-Hybrid-S/2", 2, 1, 0, hidden_size=16, depth=2, num_heads=2).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    # One Euler step of the divergence, from the whole Jacobian and from all sixteen probes
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x, torch.zeros(())), x).reshape(4, 4)
    noise = x + model(x, torch.zeros(()))
    exact = (noise.square().sum() / 2 + 2 * math.log(2 * math.pi) - jacobian.trace()) / 4 / math.log(2)
    probes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4))).view(16, 1, 2, 2)
    bits = bits_per_dimension(model, x.expand(16, 1, 2, 2), 1, "euler", probe=probes)
    assert bits.mean().item() == pytest.approx(exact.item(), rel=1e-6)


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(InputError, match=r"shape of x, \(2, 3\), not \(2,\)"):
        bits_per_dimension(lambda x, t: x, torch.zeros(2, 3), probe=torch.ones(2))
    with pytest.raises(NonFiniteError, match="samples 5 to 6"):
        bits_per_dimension(lambda x, t: x * torch.nan, torch.zeros(2, 3), 3, samples=[5, 6])


@pytest.mark.parametrize("still", [lambda x, t: torch.zeros_like(x), lambda x, t: 0 * t * torch.ones(x.shape)])
def test_a_field_that_does_not_depend_on_x_has_no_divergence(still) -> None:
    x = torch.randn(3, 4)
    expected = (x**2 / 2 + math.log(2 * math.pi) / 2).mean(1) / math.log(2)
    torch.testing.assert_close(bits_per_dimension(still, x, 3).float(), expected)

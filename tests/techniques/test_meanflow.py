"""Decoupled MeanFlow against its definition, on a flow known in closed form, in the network, and in sampling."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from sampling_fixtures import images_of, tiny_model
from torch import Tensor, nn
from training_runs import tiny_config

from sit_atconv import SiT, SiTPipeline
from sit_atconv.errors import InputError
from sit_atconv.flow.meanflow import (
    contained_guidance,
    derivative_along_path,
    integrate_average,
    mean_flow_error,
    times_from_normal,
)
from sit_atconv.models.mixers import list_mixers, register_mixer, registry
from sit_atconv.randomness import Stream, keyed_normal
from sit_atconv.sampling import SamplerSettings
from sit_atconv.sampling.draw import Drawing
from sit_atconv.sampling.inversion import invert_latents
from sit_atconv.sampling.writing.model_card import write_model_card
from sit_atconv.study.table.calls import count_calls
from sit_atconv.training.session.meanflow import require_trainable

STD = 0.5  # of Gaussian data, of mean zero


def spread(t: Tensor) -> Tensor:
    """Standard deviation of x_t for such data."""
    return ((1 - t) ** 2 * STD**2 + t**2).sqrt()


def marginal_velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[ε − x | x_t]: the ODE keeps x_t / spread(t)."""
    return x * ((t - (1 - t) * STD**2) / spread(t) ** 2).reshape(-1, 1)


def exact(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """u(x, t, r) = (x_t − x_r) / (t − r), where x_r = x_t · spread(r) / spread(t)."""
    t, r = t.reshape(-1, 1), r.reshape(-1, 1)
    return x * (1 - spread(r) / spread(t)) / (t - r)


def points(count: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """x (count, 3), t and r < t, in fp64."""
    pair = torch.rand(count, 2, dtype=torch.float64).sort(1).values
    return torch.randn(count, 3, dtype=torch.float64), pair[:, 1], pair[:, 0]


def test_the_exact_average_velocity_satisfies_the_identity() -> None:
    x, t, r = points()
    v = marginal_velocity(x, t)
    u, derivative = derivative_along_path(exact, x, t, r, v)
    torch.testing.assert_close(u, v - (t - r).unsqueeze(1) * derivative, rtol=1e-10, atol=1e-10)
    assert mean_flow_error(exact, x, t, r, v).max() < 1e-20
    assert mean_flow_error(lambda x, t, r: 1.1 * exact(x, t, r), x, t, r, v).mean() > 1e-4


def test_the_derivative_is_that_along_the_path_and_carries_no_gradient() -> None:
    x, t, r = points()
    v, a = torch.randn_like(x), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    u, derivative = derivative_along_path(lambda x, t, r: a * (x * t[:, None]).sin() + r[:, None], x, t, r, v)
    inner = (x * t[:, None]).cos() * 0.7
    torch.testing.assert_close(derivative, inner * (t[:, None] * v + x))  # ∂u/∂x·v + ∂u/∂t, and nothing of r
    assert u.requires_grad and not derivative.requires_grad


def test_the_loss_of_samples_is_stationary_at_the_exact_average_velocity() -> None:
    """Each sample has its own velocity ε − x, of which only the mean given x_t is the flow's."""
    count = 200_000
    data, noise = STD * torch.randn(count, 1, dtype=torch.float64), torch.randn(count, 1, dtype=torch.float64)
    t, r = (time.double() for time in times_from_normal(torch.randn(count, 2)))
    x_t = (1 - t[:, None]) * data + t[:, None] * noise

    def slope(factor: float) -> tuple[float, float]:
        """Derivative of the mean loss by a factor of u, and its standard error."""
        scale = torch.full((count, 1), factor, dtype=torch.float64, requires_grad=True)
        error = mean_flow_error(lambda x, t, r: scale * exact(x, t, r), x_t, t, r, noise - data)
        (each,) = torch.autograd.grad(error.sum(), scale)
        return each.mean().item(), each.std().item() / math.sqrt(count)

    at_exact, error = slope(1.0)
    assert abs(at_exact) < 4 * error
    assert slope(1.1)[0] > 10 * error and slope(0.9)[0] < -10 * error


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("shift", [1.0, 1.5])
def test_any_number_of_steps_gives_the_distribution_of_the_data(steps: int, shift: float) -> None:
    noise, seen = torch.randn(20_000, 1, dtype=torch.float64), []

    def network(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        seen.append((t.item(), r.item()))
        return exact(x, t, r)

    drawn = integrate_average(network, noise, steps, shift=shift)
    torch.testing.assert_close(drawn, STD * noise, rtol=1e-10, atol=1e-10)  # the flow's own map
    assert abs(drawn.std().item() / STD - 1) < 0.02
    evenly = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = (shift * evenly / (1 + (shift - 1) * evenly)).tolist()
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(list(pairwise(times))))


def test_times_are_the_larger_and_smaller_of_two_logit_normals() -> None:
    normal = keyed_normal(0, Stream.MEAN_FLOW_TIMES, range(4000), (2,))
    t, r = times_from_normal(normal)
    a, b = 1 / (1 + (-0.4 - normal[:, 0]).exp()), 1 / (1 + (1.2 - normal[:, 1]).exp())
    torch.testing.assert_close((t, r), (a.maximum(b), a.minimum(b)))
    phi = torch.special.ndtr
    for time in torch.tensor([0.3, 0.5, 0.8]):
        below = phi(time.logit() - 0.4) * phi(time.logit() + 1.2)
        assert (t < time).float().mean().item() == pytest.approx(below.item(), abs=0.03)
    shifted = times_from_normal(normal, 1.5)
    torch.testing.assert_close(shifted, (1.5 * t / (1 + 0.5 * t), 1.5 * r / (1 + 0.5 * r)))


def test_a_network_trained_with_contained_guidance_is_guided() -> None:
    v, null, scale = torch.randn(3, 2), torch.randn(3, 2), 2.5
    torch.testing.assert_close(contained_guidance(v, null + 1, null, scale), v + 0.6)  # the paper's factor
    guided = null + scale * (v - null)
    torch.testing.assert_close(contained_guidance(v, guided, null, scale), guided)


def flow_map(blocks: int = 1, **options: object) -> SiT:
    return tiny_model(meanflow_blocks=blocks, **options)


def inputs(model: SiT) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t, r and labels for four samples."""
    t = torch.rand(4)
    return torch.randn(4, 1, 8, 6), t, t * torch.rand(4), torch.tensor([0, 2, 3, 1])


def test_equal_times_give_the_network_of_one_time_bit_for_bit() -> None:
    plain, model = tiny_model(), flow_map()
    x, t, _, y = inputs(model)
    assert plain.state_dict().keys() == model.state_dict().keys()
    before = plain(x, t, y)
    assert model(x, t, y).equal(before) and model(x, t, y, r=t.clone()).equal(before)
    assert model(x, t[0], y, r=t[0]).equal(plain(x, t[0], y))


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_first_blocks_see_t_the_others_and_the_final_layer_r(blocks: int) -> None:
    model = flow_map(blocks)
    x, t, r, y = inputs(model)
    conditions = [nn.functional.silu(model.condition(time, y)) for time in (t, r)]
    tokens, after = model.embed_patches(x, (4, 3)), {}
    for number, block in enumerate(model.blocks, start=1):
        tokens = after[number] = block(tokens, conditions[number > blocks], (4, 3))
    expected = model.unpatchify(model.final(tokens, conditions[1]), (4, 3))
    found, intermediates = model.forward_intermediates(x, t, y, [1, 2], r=r)
    assert found.equal(expected) and not found.equal(model(x, t, y))
    assert all(intermediates[number].equal(after[number]) for number in (1, 2))


def test_samples_share_conditions_of_both_times() -> None:
    model = flow_map()
    x, t, r, _ = inputs(model)
    labels, rows = torch.tensor([2, 0]), torch.tensor([0, 1, 1, 0])
    found = model(x, t[0], labels, rows, r=r[0])
    torch.testing.assert_close(found, model(x, t[0].expand(4), labels[rows], r=r[0].expand(4)))


def test_a_flow_map_remembers_that_it_is_one(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "plain")
    flow_map().save_pretrained(tmp_path / "map")
    plain, of_map = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "map"))
    assert of_map == plain | {"meanflow_blocks": 1}
    again = SiT.from_pretrained(tmp_path / "map")
    x, t, r, y = inputs(again)
    assert again(x, t, y, r=r).equal(flow_map()(x, t, y, r=r))
    write_model_card(tmp_path, "me/map", again)
    card = (tmp_path / "README.md").read_text()
    assert 'guidance_scale=1.0, num_inference_steps=4, solver="meanflow"' in card and "in one to four steps" in card


@pytest.mark.parametrize("blocks", [0, 3])
def test_a_flow_map_has_as_many_blocks_as_it_says(blocks: int) -> None:
    with pytest.raises(InputError, match="meanflow_blocks must be from 1 to the depth, 2"):
        flow_map(blocks)


def test_only_a_flow_map_takes_two_times() -> None:
    model = tiny_model()
    x, t, r, y = inputs(model)
    with pytest.raises(InputError, match="is no flow map"):
        model(x, t, y, r=r)
    with pytest.raises(InputError, match=r"needs a model that was trained with flow\.objective meanflow"):
        Drawing(model, SamplerSettings("meanflow", 2))


@pytest.mark.parametrize("num_classes", [0, 3])
def test_drawing_by_average_velocities(num_classes: int) -> None:
    model = flow_map(num_classes=num_classes)
    noise = torch.randn(4, 1, 8, 6)
    labels = torch.tensor([0, 2, 2, 1]) if num_classes else None
    drawn = Drawing(model, SamplerSettings("meanflow", 2)).integrate(noise, labels)
    x = noise.double()
    for t, r in ((1.0, 0.5), (0.5, 0.0)):
        ends = torch.full((4,), t), torch.full((4,), r)
        x = x - (t - r) * model(x.float(), ends[0], labels, r=ends[1]).double()
    torch.testing.assert_close(drawn, x.float(), rtol=1e-5, atol=1e-5)
    assert [count_calls(model, SamplerSettings("meanflow", n)).total for n in (1, 2, 4)] == [1, 2, 4]


def test_other_solvers_see_the_velocity_of_equal_times() -> None:
    settings = SamplerSettings("heun", 3)
    assert (images_of(flow_map(), [0, 1], settings) == images_of(tiny_model(), [0, 1], settings)).all()


def test_the_pipeline_draws_by_average_velocities_and_guides_no_flow_map() -> None:
    pipeline, noise = SiTPipeline(flow_map(), None), torch.randn(2, 1, 8, 6)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    drawn = pipeline(
        [0, 1],
        num_inference_steps=2,
        solver="meanflow",
        latents=noise,
        output_type="latent",
        callback_on_step_end=lambda pipeline, step, t, given: seen.append(t),
    ).images
    assert pipeline.guidance_scale == 1 and seen == [0.5, 0.0]
    expected = Drawing(flow_map(), SamplerSettings("meanflow", 2)).integrate(noise, torch.tensor([0, 1]))
    torch.testing.assert_close(drawn, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 1.5}, "takes no guidance, which is in the model's weights"),
        ({"atol": 0.1}, "atol would do nothing with the solver meanflow"),
        ({"diffusion": "linear"}, "diffusion would do nothing"),
    ],
)
def test_settings_that_average_velocities_do_not_take(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplerSettings("meanflow", 2, **options)
    with pytest.raises(InputError, match="Inversion follows the ODE"):
        invert_latents(flow_map(), torch.zeros(1, 1, 8, 6), torch.tensor([0]), SamplerSettings("meanflow", 2))


@pytest.mark.parametrize("name", list_mixers())
def test_every_mixer_has_the_derivative(name: str) -> None:
    config = tiny_config("--flow.objective meanflow").flow
    require_trainable(tiny_model(mixer_pattern=name), config)


class _Doubled(torch.autograd.Function):
    """Has a gradient and no forward-mode derivative."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return 2 * dy


class WithoutDerivative(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return _Doubled.apply(x)


class WrongDerivative(WithoutDerivative):
    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x + 2 * x.detach()


@pytest.mark.parametrize(
    ("mixer", "reason"),
    [(WithoutDerivative, "fails"), (WrongDerivative, "is wrong: it differs from differences")],
)
def test_mixers_without_it_are_refused_by_name(mixer: type, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_MIXERS", dict(registry._MIXERS))
    register_mixer("theirs")(mixer)
    config = tiny_config("--flow.objective meanflow").flow
    with pytest.raises(InputError, match=f"that of 'theirs' {reason}"):
        require_trainable(tiny_model(mixer_pattern=["attention", "theirs"]), config)

"""Generation: what a sample depends on, what is computed for it, and labels."""

import math
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sampling_fixtures import PIXELS, images_of, require_same_images, tiny_model
from torch import nn

from sit_atconv.autoencoder import load_autoencoder
from sit_atconv.classes import Classes
from sit_atconv.errors import InputError
from sit_atconv.flow import NonFiniteError, guided_velocity
from sit_atconv.sampling import SamplerSettings, generate
from sit_atconv.sampling.arguments import add_sampling_arguments
from sit_atconv.sampling.draw import Drawing
from sit_atconv.sampling.labels import choose_labels

SETTINGS = [
    SamplerSettings("euler", 4),
    SamplerSettings("heun", 4, guidance=2.0, interval=(0.2, 0.8)),
    SamplerSettings("midpoint", 4, guidance=1.5, guidance_channels=1, shift=2.0),
    SamplerSettings("sde", 6, guidance=1.5),
    SamplerSettings("sde", 6, diffusion="linear", last_step="tweedie"),
    SamplerSettings("sde-heun", 6, guidance=1.5, interval=(0.0, 0.5)),
    SamplerSettings("dopri5", guidance=2.0, interval=(0.2, 0.8)),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.solver}-{s.guidance}")
def test_a_sample_depends_on_seed_and_index_alone(settings: SamplerSettings) -> None:
    model = tiny_model()
    whole = images_of(model, list(range(7)), settings, batch_size=7, seed=5)
    assert whole.shape == (7, 3, 8, 6)
    for size in (1, 3):
        require_same_images(images_of(model, list(range(7)), settings, batch_size=size, seed=5), whole)
    require_same_images(images_of(model, [6, 2], settings, seed=5), whole[[6, 2]])
    assert np.abs(images_of(model, list(range(7)), settings, seed=6) - whole).max() > 1


def test_guidance_one_equals_the_conditional_model() -> None:
    model = tiny_model()
    plain = images_of(model, [0, 1, 2], SamplerSettings("heun", 4))
    guided = images_of(model, [0, 1, 2], SamplerSettings("heun", 4, guidance=3.0))
    assert np.abs(plain - guided).max() > 1


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.solver}-{s.guidance}")
@pytest.mark.parametrize("num_classes", [3, 0])
def test_shared_conditions_give_the_plain_forward(settings: SamplerSettings, num_classes: int) -> None:
    if num_classes == 0:
        settings = replace(settings, guidance=1.0, interval=(0.0, 1.0), guidance_channels=None)
    model = tiny_model(num_classes)
    labels = torch.tensor([2, 0, 2, 2]) if num_classes else None
    noise = torch.randn(4, 1, 8, 6, generator=torch.Generator().manual_seed(3))
    steps = torch.randn(6, 4, 1, 8, 6, generator=torch.Generator().manual_seed(4))
    drawing = Drawing(model, settings)
    velocity = guided_velocity(
        model,
        labels,
        settings.guidance,
        null_label=3,
        interval=settings.interval,
        channels=settings.guidance_channels,
    )
    with torch.inference_mode():
        drawn = drawing.integrate(noise, labels, steps.__getitem__)
        drawing.velocity = lambda *_: velocity  # the same solver, every condition computed for itself
        plain = drawing.integrate(noise, labels, steps.__getitem__)
    torch.testing.assert_close(drawn, plain, rtol=1e-5, atol=1e-5)


def test_a_condition_is_computed_once_a_step_and_label() -> None:
    model = tiny_model()
    conditions, times = [], []
    model.blocks[0].modulation.register_forward_hook(lambda *call: conditions.append(len(call[2])))
    model.time_embed.register_forward_hook(lambda *call: times.append(len(call[2])))
    settings = SamplerSettings("heun", 3, guidance=2.0)
    images_of(model, list(range(12)), settings, labels="1,2", batch_size=6)
    assert conditions == [3] * 2 * 5  # two batches of five evaluations; labels 1, 2 and null, not 2·6 samples
    assert times == [1] * 2 * 5


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.solver != "dopri5"], ids=lambda s: s.solver)
def test_no_step_waits_for_the_device(settings: SamplerSettings, monkeypatch) -> None:
    # On the meta device a tensor has no values: whatever asked for one would fail.
    monkeypatch.setattr("sit_atconv.flow.finite.FiniteGuard.check", lambda *_: None)  # asks once, at the end
    model, noise = tiny_model().to("meta"), torch.empty(3, 1, 8, 6, device="meta")
    drawing = Drawing(model, settings)
    with torch.inference_mode():
        drawn = drawing.integrate(noise, torch.tensor([2, 0, 2]), lambda _: noise)
    assert drawn.shape == noise.shape
    with pytest.raises(RuntimeError, match="meta"):
        drawn.sum().item()


def test_autoguidance_pushes_away_from_the_weak_model() -> None:
    model, weak = tiny_model(), tiny_model()
    nn.init.normal_(weak.final.proj.weight, std=0.3)
    settings = SamplerSettings("euler", 1, guidance=2.5)
    labels, noise = torch.tensor([1, 2]), torch.randn(2, 1, 8, 6)
    with torch.inference_mode():
        drawn = Drawing(model, settings, weak).integrate(noise, labels)
        t = torch.ones(2)
        v, v_weak = model(noise, t, labels), weak(noise, t, labels)
    torch.testing.assert_close(drawn, noise - (v_weak + 2.5 * (v - v_weak)), rtol=1e-5, atol=1e-5)


def test_a_weak_model_of_another_space_is_refused_before_any_call() -> None:
    model = tiny_model()
    model.forward = None  # a call would fail
    other = tiny_model()
    other.register_to_config(latents={**PIXELS.to_dict(), "scale": 0.5})
    for weak, message in [(tiny_model(4), "num_classes is 4"), (other, "scale"), (tiny_model(), "without guidance")]:
        settings = SamplerSettings(guidance=1.0 if message == "without guidance" else 2.0)
        with pytest.raises(InputError, match=message):
            next(generate(model, load_autoencoder(PIXELS), [0], settings, weak=weak))


def test_balanced_labels_are_balanced_unsorted_and_independent_of_the_rest() -> None:
    labels = choose_labels("balanced", range(50), Classes(10), seed=0)
    assert labels.bincount().tolist() == [5] * 10
    for start in range(0, 50, 10):
        assert sorted(labels[start : start + 10].tolist()) == list(range(10))
    assert not torch.equal(labels, labels.sort().values)
    assert choose_labels("balanced", [31, 7], Classes(10), seed=0).tolist() == labels[[31, 7]].tolist()


def test_random_and_listed_labels() -> None:
    labels = choose_labels("random", range(3000), Classes(3), seed=0)
    assert labels.bincount().min() > 900
    assert choose_labels("random", [17], Classes(3), seed=0).item() == labels[17]
    assert choose_labels("2,0", range(5), Classes(3), seed=0).tolist() == [2, 0, 2, 0, 2]
    assert choose_labels("cat, 1", range(2), Classes(3, ["dog", "mouse", "cat"]), 0).tolist() == [2, 1]
    assert choose_labels("balanced", range(5), Classes(0), seed=0) is None


@pytest.mark.parametrize(("rule", "classes"), [("3", 3), ("1,x", 3), ("-1", 3), ("", 3), ("1", 0)])
def test_unknown_labels_are_named(rule: str, classes: int) -> None:
    with pytest.raises(InputError, match=r"Unknown label|unconditional"):
        choose_labels(rule, range(2), Classes(classes), seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk4"}, "Unknown solver 'rk4'"),
        ({"precision": "fp8"}, "Unknown precision"),
        ({"interval": (0.0, 0.7)}, "interval would do nothing without guidance"),
        ({"guidance_channels": 3}, "guidance_channels would do nothing without guidance"),
        ({"solver": "heun", "diffusion": "linear"}, "diffusion would do nothing with the ODE solver heun"),
        ({"solver": "sde", "shift": 2.0}, "shift would do nothing with the solver sde"),
        ({"solver": "heun", "rtol": 1e-4}, "rtol would do nothing"),
        ({"steps": 0}, "at least one step, not 0"),
        ({"solver": "sde", "last_step": "last"}, "Unknown last step"),
        (
            {"solver": "sde", "last_step": "none", "last_step_size": 0.1},
            "last_step_size would do nothing with the last",
        ),
        *(({"guidance": scale}, f"finite number >= 0, not {scale}") for scale in (-1.0, math.nan, math.inf)),
        *(({"guidance": 2.0, "interval": i}, "low <= high <= 1") for i in ((0.7, 0.2), (-0.1, 1.0), (0.0, math.nan))),
        ({"interval": (0.7, 0.2)}, "low <= high <= 1, not 0.7 0.2"),
        *(({"shift": shift}, "positive and finite") for shift in (0.0, -1.0, math.nan, math.inf)),
        *(({"solver": "sde", "diffusion_scale": s}, "diffusion scale must be") for s in (-1.0, math.nan, math.inf)),
        *(({"solver": "sde", "last_step_size": size}, "between 0 and 1") for size in (0.0, 1.0, math.nan)),
        *(({"solver": "dopri5", "atol": tolerance}, "tolerances") for tolerance in (-1e-6, math.nan, math.inf)),
        ({"solver": "dopri5", "rtol": -1.0}, "tolerances"),
        ({"solver": "dopri5", "atol": 0.0, "rtol": 0.0}, "one of them positive"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplerSettings(**options)


@hypothesis_settings(deadline=None)
@given(scale=st.floats(), interval=st.tuples(st.floats(-0.5, 1.5), st.floats(-0.5, 1.5)))
def test_settings_allow_the_guidance_that_the_field_allows(scale: float, interval: tuple[float, float]) -> None:
    def allowed(make: Callable[[], object]) -> bool:
        try:
            make()
        except InputError:
            return False
        return True

    scale = 2.0 if scale == 1 else scale  # with which an interval would do nothing
    field = partial(guided_velocity, None, torch.zeros(1, dtype=torch.int64), scale, null_label=1, interval=interval)
    assert allowed(field) == allowed(lambda: SamplerSettings(guidance=scale, interval=interval))


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 0.0},
        {"guidance": 2.0, "interval": (0.3, 0.3)},
        {"solver": "sde", "diffusion_scale": 0.0},
        {"solver": "sde", "last_step": "none"},
        {"solver": "dopri5", "atol": 0.0},
        {"solver": "dopri5", "rtol": 0.0},
    ],
)
def test_the_ends_of_the_ranges_can_be_drawn_with(options: dict) -> None:
    assert images_of(tiny_model(), [0], SamplerSettings(steps=2, **options)).shape == (1, 3, 8, 6)


@pytest.mark.parametrize("word", ["-1", str(2**64), "1.5", "x"])
def test_seeds_that_are_none_end_at_the_command_line(word: str, capsys) -> None:
    parser = ArgumentParser()
    add_sampling_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--seed", word])
    assert f"argument --seed: '{word[:40]}" in capsys.readouterr().err
    for fine in (0, 2**64 - 1):
        assert parser.parse_args(["--seed", str(fine)]).seed == fine
    choose_labels("random", [0], Classes(3), seed=2**64 - 1)


def test_guidance_that_the_model_cannot_have_is_refused_before_any_call() -> None:
    for classes, settings, message in [
        (0, SamplerSettings(guidance=2.0), "unconditional"),
        (3, SamplerSettings(guidance=2.0, guidance_channels=3), "3 channels cannot be guided"),
    ]:
        model = tiny_model(classes)
        model.forward = None
        with pytest.raises(InputError, match=message):
            images_of(model, [0], settings)


def test_broken_weights_are_noticed() -> None:
    model = tiny_model()
    nn.init.constant_(model.final.proj.bias, float("nan"))
    for settings in (SamplerSettings("euler", 2), SamplerSettings("sde", 2)):
        with pytest.raises(NonFiniteError, match=r"step 1, from t = 1, for samples 4 to 5"):
            images_of(model, [4, 5], settings)


def test_one_drawing_is_differentiated_twice() -> None:
    """An embedding of time that is kept for later steps would hold a graph that the first backward pass frees."""
    model, x, t = tiny_model(), torch.randn(2, 1, 8, 6), torch.tensor(0.3)
    velocity = Drawing(model, SamplerSettings("heun", 3)).velocity(torch.tensor([0, 2]), x.device)
    for _ in range(2):
        velocity(x, t).sum().backward()
    assert model.time_embed[0].weight.grad is not None

"""What every mixer of the package promises, checked for each, with its defaults and with other options."""

from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch.autograd import gradgradcheck

from sit_atconv import create_model
from sit_atconv.models.check.checks import (
    CHECKS,
    GRIDS,
    Subject,
    compiles,
    failure,
    unfused_forward_derivative,
)
from sit_atconv.models.mixers import list_mixers
from sit_atconv.models.mixers.attend import choose_attention

OTHER_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("acmix", {"neighbourhood": 7}),
    ("acmix", {"window": 3, "shift": 1, "shift_module": "fixed", "rates": "tied"}),
    ("acmix", {"neighbourhood": 3, "shift_module": "tensor", "rates": "fixed"}),
    ("atconv", {"pool": "raster", "activation": "silu", "kernel_size": 5}),
    ("atconv", {"kernels": "static", "value": False, "inhibition": "softmax"}),
    ("atconv", {"out": False, "inhibition": "difference"}),
    ("attention", {"qk_norm": True, "rope": True}),
    ("dwconv", {"kernel_size": 7, "projections": True}),
    ("inline", {"lepe": False, "qkv_bias": True}),
    ("linear", {"kernel_size": 0, "qk_norm": True, "qkv_bias": False}),
    ("strided", {"stride": 3, "logits": "dot"}),
    ("window", {"window": 3, "shift": 1}),
    ("window", {"window": 4, "shift": 2, "relative_bias": False}),
    ("window", {"window": 3, "shift": 1, "qk_norm": True, "rope": True}),
]
DEFAULTS = [pytest.param(Subject(name, {}, dim=32, num_heads=2), id=name) for name in list_mixers()]
ALL = DEFAULTS + [
    pytest.param(Subject(name, options, dim=32, num_heads=2), id=f"{name} {options}") for name, options in OTHER_OPTIONS
]


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "torch.compile"])
@pytest.mark.parametrize("subject", ALL)
def test_the_checks_of_the_command(subject: Subject, check: str) -> None:
    assert failure(CHECKS[check], subject) is None


@pytest.mark.parametrize("subject", DEFAULTS)
def test_it_is_compiled_without_a_break(subject: Subject) -> None:
    """Traced, forward and backward, for sizes that vary; the code is generated in the next test."""
    assert failure(partial(compiles, backend="aot_eager"), subject) is None


@pytest.mark.long
@pytest.mark.parametrize("subject", ALL)
def test_the_compiled_code_computes_the_same(subject: Subject) -> None:
    assert failure(compiles, subject) is None


@pytest.mark.parametrize("subject", ALL)
def test_forward_mode_derivatives(subject: Subject) -> None:
    """Of attention, where it is not fused."""
    assert failure(unfused_forward_derivative, subject) is None


@pytest.mark.parametrize("subject", ALL)
def test_second_derivatives(subject: Subject) -> None:
    grid = GRIDS[2]
    mixer = subject.build(torch.float64)
    choose_attention(mixer, AttentionBackendName._NATIVE_MATH)
    x = subject.tokens(grid, dtype=torch.float64).requires_grad_()
    assert gradgradcheck(lambda x: mixer(x, grid), x, fast_mode=True)


@pytest.mark.parametrize("subject", ALL)
def test_a_training_step_through_inference(subject: Subject) -> None:
    """Nothing that a model makes in inference mode is left over for training, which could not use it."""
    mixer, x = subject.build(), subject.tokens((4, 6))
    with torch.inference_mode():
        expected = mixer(x, (4, 6))
    y = mixer(x.requires_grad_(), (4, 6))
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert all(parameter.ndim and parameter.grad is not None for parameter in mixer.parameters())


@pytest.mark.parametrize("name", list_mixers())
def test_options_do_not_depend_on_the_grid(name: str) -> None:
    """Shapes of weights are the same for every size: a model can be trained further at another."""
    models = [
        create_model("SiT-S/2", hidden_size=32, num_heads=2, depth=1, input_size=size, mixer_pattern=name).blocks
        for size in (8, (20, 6))
    ]
    assert models[0].load_state_dict(models[1].state_dict())

"""The checks that every token mixer passes: functions that raise an exception if a mixer fails.

`sit_atconv.models.check` runs them for any mixer; the tests run them for all mixers of this package.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.models.mixers.attend import choose_attention
from sit_atconv.models.mixers.registry import mixer_flops
from sit_atconv.models.sit import SiT
from sit_atconv.runtime.measuring.timing import median_milliseconds

GRIDS = ((4, 4), (2, 6), (5, 3), (1, 1))  # square, rectangular, odd, and a single token
COSTS = ((16, 16), (32, 32))


@dataclass(frozen=True)
class Subject:
    """The mixer to check: its registered name, its options, and the size of the model around it."""

    name: str
    options: dict[str, Any]
    dim: int = 64
    num_heads: int = 4

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The mixer as a model initialises it, plus small random numbers, so that no parameter is zero."""
        torch.manual_seed(0)
        mixer = self.model().blocks[0].mixer.to(dtype)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return mixer

    def model(self) -> SiT:
        """A SiT of one block."""
        entry = {"name": self.name, **self.options}
        shape = {"depth": 1, "hidden_size": self.dim, "num_heads": self.num_heads, "num_classes": 0}
        return SiT(input_size=8, mixer_pattern=[entry], **shape)

    def tokens(self, grid: tuple[int, int], batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random tokens (B, N, C)."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, grid[0] * grid[1], self.dim, generator=generator, dtype=dtype)


def shapes(subject: Subject) -> None:
    """Square, rectangular and odd grids, and a single token, give tokens of the same shape."""
    mixer = subject.build()
    for grid in GRIDS:
        x = subject.tokens(grid)
        y = mixer(x, grid)
        if y.shape != x.shape or y.dtype != x.dtype:
            raise AssertionError(f"{tuple(x.shape)} became {tuple(y.shape)}, {y.dtype} on the grid {grid}")


def gradients(subject: Subject) -> None:
    """Gradients of tokens and weights agree with finite differences, in fp64."""
    mixer = subject.build(torch.float64)
    weights = dict(mixer.named_parameters())
    for grid in GRIDS[1:3]:
        x = subject.tokens(grid, dtype=torch.float64).requires_grad_()

        def function(x: Tensor, *values: Tensor, grid: tuple[int, int] = grid) -> Tensor:
            return torch.func.functional_call(mixer, dict(zip(weights, values, strict=True)), (x, grid))

        gradcheck(function, (x, *weights.values()), fast_mode=True)


def separate_samples(subject: Subject) -> None:
    """Samples are independent: permuting or splitting a batch does not change results. Nothing is random."""
    mixer, grid = subject.build(torch.float64), GRIDS[2]
    x = subject.tokens(grid, batch=4, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(mixer(x[order], grid), mixer(x, grid)[order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mixer(x[:1], grid), mixer(x, grid)[:1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mixer.eval()(x, grid), mixer.train()(x, grid), rtol=0, atol=0)


def autocast(subject: Subject) -> None:
    """Under bf16 autocast, outputs and gradients are close to those in fp32."""
    mixer, grid = subject.build(), GRIDS[0]
    x = subject.tokens(grid).requires_grad_()
    exact = mixer(x, grid)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mixer(x, grid)
    pairs = [(rounded, exact)]
    pairs += zip(torch.autograd.grad(rounded.float().sum(), [x]), torch.autograd.grad(exact.sum(), [x]), strict=True)
    for found, expected in pairs:
        error = float((found.float() - expected).detach().norm() / expected.detach().norm())
        if not error < 0.05:
            raise AssertionError(f"differs from fp32 by {100 * error:.1f} %")


def compiles(subject: Subject, backend: str = "inductor") -> None:
    """torch.compile compiles it without graph breaks, once for all batch sizes, and gives the same results."""
    mixer, grid = subject.build(), GRIDS[0]
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend=backend)
    for batch in (2, 5):
        x = subject.tokens(grid, batch).requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        found, expected = compiled(x, grid), mixer(x, grid)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        pair = [torch.autograd.grad(y.sum(), [x])[0] for y in (found, expected)]
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)


def saves(subject: Subject) -> None:
    """A model with this mixer gives the same results after saving and loading; FSDP can split its parameters."""
    model, x, t = subject.model(), torch.randn(1, 4, 8, 8), torch.rand(1)
    torch.nn.init.normal_(model.final.proj.weight)
    for block in model.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        torch.testing.assert_close(SiT.from_pretrained(folder)(x, t), model(x, t))
    scalars = [name for name, parameter in model.blocks[0].mixer.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise AssertionError(f"{', '.join(scalars)} is a scalar, which FSDP cannot split: give it an axis of length 1")


def _convolution_gradients(dy: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, **_: Any) -> int:
    """Operations of a convolution's gradients, from shapes: each costs what the convolution costs.

    torch's own count ignores groups. `rest` ends with which of the gradients of x, weight and bias are computed.
    """
    return 2 * math.prod(dy) * math.prod(weight[1:]) * sum(rest[-1][:2])


_CORRECTED = {torch.ops.aten.convolution_backward: _convolution_gradients}


def counts(subject: Subject) -> None:
    """`flops` agrees with torch's count of matrix products and convolutions; the mixer runs on the "meta" device."""
    with torch.device("meta"):
        mixer = subject.model().blocks[0].mixer
        for grid in GRIDS:
            with FlopCounterMode(display=False, custom_mapping=_CORRECTED) as counter:
                mixer(torch.empty(1, grid[0] * grid[1], subject.dim), grid)
            if (own := mixer_flops(mixer, grid, subject.dim)) != counter.get_total_flops():
                raise AssertionError(f"flops{grid} is {own:,}, torch counts {counter.get_total_flops():,}")


def forward_derivative(subject: Subject) -> None:
    """torch.func.jvp agrees with finite differences, in fp64."""
    _compare_with_differences(subject, subject.build(torch.float64))


def unfused_forward_derivative(subject: Subject) -> None:
    """The same after `SiT.set_attention_backend("_native_math")`: torch's fused attention has no such derivative."""
    mixer = subject.build(torch.float64)
    choose_attention(mixer, AttentionBackendName._NATIVE_MATH)
    _compare_with_differences(subject, mixer)


def _compare_with_differences(subject: Subject, mixer: nn.Module) -> None:
    grid = GRIDS[2]
    x, direction = subject.tokens(grid, dtype=torch.float64), subject.tokens(grid, dtype=torch.float64).flip(0)
    _, found = torch.func.jvp(lambda x: mixer(x, grid), (x,), (direction,))
    step = 1e-5
    expected = (mixer(x + step * direction, grid) - mixer(x - step * direction, grid)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def costs(subject: Subject) -> str:
    """Time relative to attention at 256 and 1024 tokens, forward | with gradients: medians, on this machine."""
    words = []
    for grid in COSTS:
        contenders = {}
        for who, each in (("ours", subject), ("theirs", Subject("attention", {}, subject.dim, subject.num_heads))):
            mixer, x = each.build(), each.tokens(grid).requires_grad_()
            contenders[f"{who}, forward"] = partial(_forward, mixer, x, grid)
            contenders[f"{who}, with gradients"] = partial(_gradients, mixer, x, grid)
        forward, gradients, *theirs = median_milliseconds(contenders, torch.device("cpu"), 15).values()
        words.append(f"{grid[0] * grid[1]} tokens {forward / theirs[0]:.2f} | {gradients / theirs[1]:.2f}")
    return "; ".join(words)


@torch.no_grad()
def _forward(mixer: nn.Module, x: Tensor, grid: tuple[int, int]) -> None:
    mixer(x, grid)


def _gradients(mixer: nn.Module, x: Tensor, grid: tuple[int, int]) -> None:
    torch.autograd.grad(mixer(x, grid).sum(), [x, *mixer.parameters()])


CHECKS: dict[str, Callable[[Subject], None]] = {
    "shapes on every grid": shapes,
    "gradients in fp64": gradients,
    "samples kept apart": separate_samples,
    "bf16 autocast": autocast,
    "torch.compile": compiles,
    "save and load": saves,
    "operations counted": counts,
}
REPORTED: dict[str, Callable[[Subject], None]] = {
    "forward-mode derivative": forward_derivative,
    "the same, attention not fused": unfused_forward_derivative,
}


def failure(check: Callable[[Subject], None], subject: Subject) -> str | None:
    """The reason for a failure, in one line; None when the check passes."""
    try:
        check(subject)
    except Exception as error:  # a mixer may raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {' '.join(lines)[:160]}" if lines else type(error).__name__
    return None

"""What runs beneath: mixers transpose no tokens, and compilers see a convolution as one operation."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sit_atconv.models.mixers import ATConv, Attention
from sit_atconv.ops import per_sample_depthwise_conv2d


class Copies(TorchDispatchMode):
    """Collects the tensors of at least `size` numbers that are copied into another layout."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default) and args[-1].numel() >= self.size:
            self.found.append(args[-1])
        return func(*args, **(kwargs or {}))


def run(mixer: nn.Module, x: torch.Tensor, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        y = mixer(x, (16, 16))
    if gradients:
        torch.autograd.grad(y, [x, *mixer.parameters()], torch.ones_like(y))


@pytest.mark.parametrize(
    ("mixer", "gradients"),
    [(ATConv(64), False), (ATConv(64), True), (Attention(64, 4), False)],  # that of q, k and v is not square
    ids=["atconv", "atconv with gradients", "attention"],
)
@pytest.mark.parametrize("backend", ["folded", "separate"])
def test_no_tokens_are_transposed(
    mixer: nn.Module, gradients: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sit_atconv.ops.selection.FORCED", backend)
    x = torch.randn(2, 16 * 16, 64, requires_grad=gradients)
    with Copies(x.numel()) as copies:
        run(mixer, x, gradients)
    assert all(tensor.stride(-1) == 1 for tensor in copies.found)  # whole rows move, if anything does
    # Nothing is moved within torch's operations either, where one sample leaves nothing to move outside of them.
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        run(mixer, x[:1], gradients)
    copied = [event.input_shapes[0] for event in recorded.events() if event.name == "aten::clone"]
    assert all(torch.Size(shape).numel() < x[0].numel() for shape in copied)


@pytest.mark.parametrize("backend", ["folded", "separate"])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_convolution_is_closed_to_compilers(gradients: bool, backend: str) -> None:
    torch._dynamo.reset()
    x, kernels = torch.randn(2, 4, 4, 3, requires_grad=gradients), torch.randn(2, 3, 3, 3)
    compiled = torch.compile(partial(per_sample_depthwise_conv2d, backend=backend), fullgraph=True)
    compiled(x, kernels)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        y = compiled(x, kernels)
        if gradients:
            y.sum().backward()
    names = {event.name for event in recorded.events()}
    assert f"sit_atconv::depthwise_{backend}" in names
    assert (f"sit_atconv::depthwise_{backend}_backward" in names) == gradients

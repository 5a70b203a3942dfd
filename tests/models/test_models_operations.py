"""What a block does to whole tokens, operation by operation: which dtypes it computes in, and what it copies."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from fake_gpu import needs_fake_gpu
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sit_atconv.models.block import Block, add_gated, modulate
from sit_atconv.models.mixers import ATConv, Attention

B, SIDE, C = 2, 16, 32
TO_BF16, TO_FP32 = (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)
COPIES = {"clone", "copy_", "_to_copy", "cat", "stack", "contiguous"}


@dataclass
class Operations(TorchDispatchMode):
    """Records every operation that makes a tensor of at least `size` numbers: name, dtype of each input, its own."""

    size: int = B * SIDE**2 * C
    found: list[tuple[str, tuple[torch.dtype, ...], torch.dtype]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.numel() >= self.size]
        if made and not func.is_view and func.__name__ != "_unsafe_view.default":
            self.found.append((func.__name__.split(".")[0], tuple(x.dtype for x in inputs), made[0].dtype))
        return result

    def conversions(self) -> Counter[tuple[torch.dtype, torch.dtype]]:
        return Counter((inputs[0], made) for name, inputs, made in self.found if name == "_to_copy")

    def in_fp32(self) -> set[str]:
        return {name for name, _, made in self.found if made == torch.float32 and name != "_to_copy"}

    def copies(self) -> list[str]:
        return sorted(name for name, _, _ in self.found if name in COPIES)


def block_of(kind: str) -> Block:
    block = Block(C, ATConv(C) if kind == "atconv" else Attention(C, 2), 4.0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    return block


@pytest.fixture
def bare_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the convolution, whose backends have their own tests: one multiplication in values' dtype."""
    monkeypatch.setattr(
        "sit_atconv.models.mixers.atconv.per_sample_depthwise_conv2d",
        lambda values, kernels: values * kernels.mean((2, 3))[:, None, None],
    )


def record(kind: str, autocast: bool, samples: int = B) -> tuple[Operations, Operations]:
    """The forward and the backward operations of one block."""
    block = block_of(kind)
    x, c = torch.randn(samples, SIDE**2, C, requires_grad=True), torch.randn(samples, C)
    size = x.numel()
    with Operations(size) as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = block(x, c, (SIDE, SIDE))
    dy = torch.randn_like(y)
    with Operations(size) as backward:
        torch.autograd.grad(y, [x, *block.parameters()], dy)
    return forward, backward


@pytest.mark.parametrize("kind", ["attention", "atconv"])
@pytest.mark.usefixtures("bare_operator")
def test_autocast_converts_once_for_each_branch_and_way(kind: str) -> None:
    """The residual stream, its norms and their gradients are fp32 on purpose; all else is bf16."""
    forward, backward = record(kind, autocast=True)
    assert forward.conversions() == {TO_BF16: 2}  # what mixer and MLP take
    assert forward.in_fp32() == {"native_layer_norm", "addcmul", "add"}
    assert backward.conversions() == {TO_BF16: 2, TO_FP32: 2}  # into a branch at its gate, out of it at its norm
    assert backward.in_fp32() == {"native_layer_norm_backward", "mul", "add"}


@pytest.mark.parametrize("kind", ["attention", "atconv"])
@pytest.mark.usefixtures("bare_operator")
def test_without_autocast_nothing_is_converted_or_copied(kind: str) -> None:
    forward, backward = record(kind, autocast=False)
    assert forward.conversions() == backward.conversions() == {}
    assert forward.copies() == []
    assert backward.copies() == (["cat"] if kind == "attention" else [])  # the gradients of q, k and v, side by side


@pytest.mark.parametrize("backend", ["folded", "separate"])
def test_one_sample_passes_through_the_convolution_without_a_copy(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sit_atconv.ops.selection.FORCED", backend)
    forward, backward = record("atconv", autocast=False, samples=1)
    assert forward.copies() == backward.copies() == []


@pytest.fixture
def cuda_autocast() -> Iterator[None]:
    """As `torch.autocast("cuda")`, which turns itself off where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@needs_fake_gpu
@pytest.mark.usefixtures("cuda_autocast")
def test_on_a_gpu_triton_takes_what_the_projections_make(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sit_atconv.ops.selection.FORCED", "triton")
    with FakeTensorMode(), torch.device("cuda"):
        block = block_of("atconv")
        x, c = torch.randn(B, SIDE**2, C, requires_grad=True), torch.randn(B, C)
        with Operations() as forward:
            block(x, c, (SIDE, SIDE))
    assert forward.conversions() == {TO_BF16: 2}
    assert set(forward.copies()) == {"_to_copy"}
    assert forward.in_fp32() == {"native_layer_norm", "addcmul", "add"}
    assert "depthwise_triton" in {name for name, _, made in forward.found if made == torch.bfloat16}


def test_modulation_and_gate_are_their_formulas() -> None:
    x, y = torch.randn(2, B, 5, C, dtype=torch.float64)
    shift, scale, gate = torch.randn(3, B, C, dtype=torch.float64)
    torch.testing.assert_close(modulate(x, shift, scale), x * (1 + scale[:, None]) + shift[:, None])
    torch.testing.assert_close(add_gated(x, gate, y), x + gate[:, None] * y)
    short = add_gated(x.float(), gate.bfloat16(), y.bfloat16())  # eight bits
    torch.testing.assert_close(short.double(), x + gate[:, None] * y, rtol=0.02, atol=0.02)


def test_a_scale_that_bf16_cannot_add_to_one_is_not_lost() -> None:
    x, scale = torch.randn(1, 4096, C), torch.full((1, C), 2**-10)
    with torch.autocast("cpu", torch.bfloat16):
        modulated = modulate(x, torch.zeros(1, C).bfloat16(), scale.bfloat16())
    assert modulated.dtype == torch.bfloat16
    assert ((modulated * x).sum() / x.square().sum()).item() - 1 == pytest.approx(2**-10, rel=0.1)


@pytest.mark.parametrize("kind", ["attention", "atconv"])
def test_a_block_in_bf16_is_near_the_one_in_fp32(kind: str) -> None:
    block, x, c = block_of(kind), torch.randn(B, SIDE**2, C), torch.randn(B, C)
    with torch.no_grad():
        exact = block(x, c, (SIDE, SIDE))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = block(x, c, (SIDE, SIDE))
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() <= 0.01 * (exact - x).norm()

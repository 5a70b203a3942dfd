"""The Triton backend under its interpreter, run by tests/ops/test_ops_triton.py in a process of its own:
the interpreter is chosen before Triton is imported.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_truth import assert_same, random_arguments, unfolded_convolution, value_and_gradients
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from sit_atconv.ops import fused, per_sample_depthwise_conv2d, selection, triton_kernels

FORWARD, BACKWARD = triton_kernels.FORWARD_CONFIGURATIONS, triton_kernels.BACKWARD_CONFIGURATIONS


def convolve(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    return per_sample_depthwise_conv2d(x, kernels, "triton")


@pytest.fixture(autouse=True)
def _nothing_to_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels.forward_kernel, "configs", FORWARD[:1])
    monkeypatch.setattr(triton_kernels.backward_kernel, "configs", BACKWARD[:1])


def compare(shape: tuple[int, ...], tolerance: float = 1e-13) -> None:
    x, kernels = random_arguments(*shape)
    weights = torch.randn_like(x)
    expected = value_and_gradients(unfolded_convolution, x, kernels, weights)
    assert_same(value_and_gradients(convolve, x, kernels, weights), expected, tolerance)


@pytest.mark.parametrize("number", range(len(FORWARD)))
def test_every_configuration(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels.forward_kernel, "configs", [FORWARD[number]])
    monkeypatch.setattr(triton_kernels.backward_kernel, "configs", [BACKWARD[number % len(BACKWARD)]])
    compare((1, 6, 2, 70, 3))  # whole and broken strips and channel blocks


@pytest.mark.parametrize(("H", "C", "forward", "backward"), [(1, 1, 2, 2), (5, 33, 8, 8), (16, 1152, 12, 8)])
def test_what_is_tuned_leaves_nothing_idle(H: int, C: int, forward: int, backward: int) -> None:
    fitting = triton_kernels.FITTING["early_config_prune"]
    assert [len(fitting(each, {}, H=H, W=3, C=C)) for each in (FORWARD, BACKWARD)] == [forward, backward]


@settings(max_examples=6, deadline=None)
@given(B=st.integers(1, 2), H=st.integers(1, 6), W=st.integers(1, 20), C=st.integers(1, 40), K=st.sampled_from([1, 3]))
def test_any_shape(B: int, H: int, W: int, C: int, K: int) -> None:
    compare((B, H, W, C, K))


def test_several_column_blocks_and_a_kernel_larger_than_the_image() -> None:
    compare((1, 3, 50, 4, 3))
    compare((1, 2, 2, 3, 7))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (None, 2**-21)])
def test_short_dtypes_are_summed_in_fp32(dtype: torch.dtype | None, rounding: float) -> None:
    x, kernels = random_arguments(1, 12, 12, 8, 3, dtype or torch.float32)
    weights = torch.randn(1, 12, 12, 8).to(x.dtype)
    doubles = (x.detach().double().requires_grad_(), kernels.detach().double().requires_grad_())
    expected = value_and_gradients(unfolded_convolution, *doubles, weights)
    assert_same(value_and_gradients(convolve, x, kernels, weights), expected, rounding)  # the interpreter truncates


def test_strides_of_the_arguments_do_not_matter() -> None:
    x, kernels = (tensor.detach() for tensor in random_arguments(2, 3, 4, 6, 3))
    strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    taps_first = kernels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    transposed = kernels.transpose(2, 3).contiguous().transpose(2, 3)  # K×K is no view of K²
    torch.testing.assert_close(convolve(strided, transposed), unfolded_convolution(x, kernels))
    weights = torch.randn_like(x).transpose(1, 2).contiguous().transpose(1, 2)
    arguments = strided.requires_grad_(), taps_first.requires_grad_()
    expected = value_and_gradients(unfolded_convolution, *arguments, weights)
    assert_same(value_and_gradients(convolve, *arguments, weights), expected, 1e-13)


def test_the_same_input_gives_the_same_bits() -> None:
    x, kernels = random_arguments(2, 6, 20, 8, 3, torch.float32)
    weights = torch.randn_like(x)
    first, second = (value_and_gradients(convolve, x, kernels, weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_gradients() -> None:
    x, kernels = random_arguments(1, 2, 3, 2, 3)
    weights, *directions = (torch.randn_like(t) for t in (x, x, kernels))
    results = []
    for function in (convolve, unfolded_convolution):
        y = function(x, kernels).square()  # not linear any more, so that every second derivative is there
        first = torch.autograd.grad((y * weights).sum(), (x, kernels), create_graph=True)
        slope = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        results.append(torch.autograd.grad(slope, (x, kernels)))
    assert_same(*results, 1e-13)


@pytest.mark.parametrize("name", ["depthwise_triton", "depthwise_triton_backward"])
def test_the_operator_passes_torchs_own_check(name: str) -> None:
    arguments = random_arguments(2, 4, 3, 5, 3, torch.float32)
    gradient = (torch.randn(2, 4, 3, 5, requires_grad=True),) if name.endswith("backward") else ()
    checks = torch.library.opcheck(getattr(torch.ops.sit_atconv, name).default, (*gradient, *arguments))
    assert set(checks.values()) == {"SUCCESS"}
    results = torch.ops.sit_atconv.depthwise_triton_backward(arguments[0], *arguments)
    assert all(tensor.is_contiguous() for tensor in results)  # as compilers are told


def test_compiled_without_a_graph_break() -> None:
    x, kernels = random_arguments(2, 4, 3, 5, 3)
    compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager")
    weights = torch.randn_like(x)
    expected = value_and_gradients(unfolded_convolution, x, kernels, weights)
    assert_same(value_and_gradients(compiled, x, kernels, weights), expected, 1e-13)


@pytest.fixture
def _short_numbers() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_short_numbers")
@pytest.mark.parametrize("surroundings", [torch.inference_mode, torch.no_grad, FakeTensorMode])
def test_it_is_found_right(surroundings: Callable[[], AbstractContextManager]) -> None:
    with surroundings():
        assert selection.is_triton_right.__wrapped__(torch.device("cpu"))


@pytest.mark.parametrize("problem", ["does not compile", "gives something else"])
def test_it_is_found_wrong(problem: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    if problem == "does not compile":
        monkeypatch.setattr(triton_kernels, "backward_kernel", None)
    else:
        monkeypatch.setattr(fused, "MAX_COLUMNS", 2)
        monkeypatch.setattr(fused, "_cdiv", lambda a, b: 1)  # three columns of four are missing
    assert not selection.is_triton_right.__wrapped__(torch.device("cpu"))
    assert "torch's takes its place" in caplog.text


def test_transforms_of_functions() -> None:
    """Of which custom operators know nothing."""
    x, kernels = (tensor.detach() for tensor in random_arguments(2, 4, 3, 5, 3))

    def slope(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: convolve(x, kernels).square().sum())(x)

    def expected_slope(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: unfolded_convolution(x, kernels).square().sum())(x)

    torch.testing.assert_close(slope(x), expected_slope(x))
    one_by_one = torch.func.vmap(lambda x, kernels: convolve(x[None], kernels[None])[0])(x, kernels)
    torch.testing.assert_close(one_by_one, unfolded_convolution(x, kernels))
    torch.testing.assert_close(torch.func.jvp(slope, (x,), (x,)), torch.func.jvp(expected_slope, (x,), (x,)))
    with forward_ad.dual_level():
        y = convolve(forward_ad.make_dual(x, x), kernels)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, unfolded_convolution(x, kernels))


@pytest.mark.parametrize("create_graph", [False, True])
def test_forward_derivatives_of_gradients(create_graph: bool) -> None:
    x, kernels = random_arguments(2, 4, 3, 5, 3)
    derivatives = []
    for function in (convolve, unfolded_convolution):
        y = function(x, kernels)
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y).cumsum(1))
            gradients = torch.autograd.grad(y, (x, kernels), dy, create_graph=create_graph)
            derivatives.append([forward_ad.unpack_dual(g).tangent for g in gradients])
    assert_same(*derivatives, 1e-13)

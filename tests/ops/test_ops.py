"""The per-sample depthwise convolution: every backend computes its definition, in every dtype, compiled or not."""

import json
import runpy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_truth import assert_same, random_arguments, unfolded_convolution, value_and_gradients
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from sit_atconv.errors import InputError
from sit_atconv.ops import BACKENDS, per_sample_depthwise_conv2d, selection
from sit_atconv.ops.pooling import pool_tokens

EVERYWHERE = [name for name in BACKENDS if name != "triton"]  # that one has tests/ops/test_ops_triton.py


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 4),
    H=st.integers(1, 7),
    W=st.integers(1, 7),
    C=st.integers(1, 5),
    K=st.sampled_from([1, 3, 5, 7]),
)
def test_backends_compute_the_definition(B: int, H: int, W: int, C: int, K: int) -> None:
    x, kernels = random_arguments(B, H, W, C, K)
    weights = torch.randn(B, H, W, C, dtype=torch.float64)
    expected = value_and_gradients(unfolded_convolution, x, kernels, weights)
    for backend in ("auto", *EVERYWHERE):
        actual = value_and_gradients(partial(per_sample_depthwise_conv2d, backend=backend), x, kernels, weights)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_first_and_second_gradients(backend: str) -> None:
    arguments = random_arguments(1, 3, 2, 2, 3)
    function = partial(per_sample_depthwise_conv2d, backend=backend)
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_short_dtypes_are_summed_in_fp32(backend: str, dtype: torch.dtype, rounding: float) -> None:
    # Against fp64 on the same numbers, only the rounding of the results is left, at most half a unit each.
    x, kernels = random_arguments(2, 24, 24, 8, 5, dtype)
    weights = torch.randn(2, 24, 24, 8).to(dtype)
    actual = value_and_gradients(partial(per_sample_depthwise_conv2d, backend=backend), x, kernels, weights)
    assert all(tensor.dtype == dtype for tensor in actual)
    expected = value_and_gradients(
        unfolded_convolution,
        x.detach().double().requires_grad_(),
        kernels.detach().double().requires_grad_(),
        weights,
    )
    assert_same(actual, expected, rounding / 2)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_memory_formats_do_not_matter(backend: str) -> None:
    x, kernels = (tensor.detach() for tensor in random_arguments(2, 5, 4, 6, 3))
    expected = unfolded_convolution(x, kernels)
    channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    taps_first = kernels.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    torch.testing.assert_close(per_sample_depthwise_conv2d(channels_first, taps_first, backend), expected)


@pytest.mark.parametrize("way", ["", "_backward"])
@pytest.mark.parametrize("backend", ["folded", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_passes_torchs_own_check(dtype: torch.dtype, backend: str, way: str) -> None:
    x, kernels = random_arguments(2, 4, 3, 5, 3, dtype)
    gradient = (torch.randn(2, 4, 3, 5).to(dtype).requires_grad_(),) if way else ()
    checks = torch.library.opcheck(
        getattr(torch.ops.sit_atconv, f"depthwise_{backend}{way}").default,
        (*gradient, x, kernels),
        rtol=0.02 if dtype == torch.bfloat16 else None,
        atol=0.02 if dtype == torch.bfloat16 else None,
    )
    assert set(checks.values()) == {"SUCCESS"} and len(checks) >= 4


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("backend", ["folded", "separate"])
def test_results_are_laid_out_as_compilers_are_told(backend: str, B: int) -> None:  # torch's own check ignores strides
    x, kernels = (tensor.detach() for tensor in random_arguments(B, 4, 3, 5, 3))
    taps_first = kernels.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    forward, backward = (getattr(torch.ops.sit_atconv, f"depthwise_{backend}{way}") for way in ("", "_backward"))
    assert all(tensor.is_contiguous() for tensor in (forward(x, taps_first), *backward(x, x, taps_first)))


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_shapes_on_the_meta_device(backend: str) -> None:
    x, kernels = torch.empty(2, 4, 3, 5, device="meta"), torch.empty(2, 5, 3, 3, device="meta")
    y = per_sample_depthwise_conv2d(x, kernels, backend)
    assert y.shape == x.shape and y.device.type == "meta" and y.dtype == x.dtype


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_compiled_without_a_graph_break_and_once_for_all_batches(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(partial(per_sample_depthwise_conv2d, backend=backend), fullgraph=True, backend=counter)
    for B in (2, 3, 5, 7):
        x, kernels = random_arguments(B, 4, 3, 5, 3)
        weights = torch.randn_like(x)
        expected = value_and_gradients(unfolded_convolution, x, kernels, weights)
        assert_same(value_and_gradients(compiled, x, kernels, weights), expected, 1e-12)
    assert counter.frame_count == 2  # for one batch size, then for all others


def test_autocast_casts_both_arguments_but_not_fp64() -> None:
    x, kernels = torch.randn(1, 4, 4, 2), torch.randn(1, 2, 3, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = per_sample_depthwise_conv2d(x, kernels)
        assert per_sample_depthwise_conv2d(x.double(), kernels.double()).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, per_sample_depthwise_conv2d(x.bfloat16(), kernels), rtol=0, atol=0)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 7), (16, 16)])
@pytest.mark.parametrize("bins", [(3, 3), (5, 5), (2, 1)])
def test_the_pooling_product_is_the_fused_reduction(grid: tuple[int, int], bins: tuple[int, int]) -> None:
    x = torch.randn(2, grid[0] * grid[1], 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, bins[0] * bins[1], 6, dtype=torch.float64)
    results = []
    for backend in ("reduction", "product"):
        pooled = pool_tokens(x, grid, bins, backend)
        results.append((pooled, *torch.autograd.grad((pooled * weights).sum(), x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_pooling_product_rounds_no_weight_and_overflows_nowhere(dtype: torch.dtype) -> None:
    x = torch.full((1, 21 * 21, 2), 1000.0, dtype=dtype)  # 49 of them sum to more than fp16 holds
    torch.testing.assert_close(pool_tokens(x, (21, 21), (3, 3), "product"), x[:, :9], rtol=2**-7, atol=0)


def test_the_fastest_measured_backend_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"device": "cpu", "dtype": "float32", "compiled": False, "gradients": True}
    rows = [
        {**case, "numbers": 4096, "milliseconds": {"grouped": 2.0, "folded": 1.0}},
        {**case, "numbers": 1024, "milliseconds": {"grouped": 1.0, "folded": 2.0}},
    ]
    monkeypatch.setattr(selection, "RULES", selection.load_rules(json.dumps({"rows": rows})))
    monkeypatch.setattr(selection, "FORCED", "auto")

    def chosen(H: int, C: int, grad: bool = True) -> str:
        x = torch.empty(2, H, H, C, requires_grad=grad)
        return selection.choose_backend(x, torch.empty(2, C, 3, 3))

    assert [chosen(8, 16), chosen(8, 17), chosen(64, 64)] == ["grouped", "folded", "folded"]
    assert chosen(8, 16, grad=False) == "folded"  # not measured
    with torch.no_grad():
        assert chosen(8, 16) == "folded"


@pytest.mark.parametrize(("there", "right", "expected"), [(1, 1, "triton"), (1, 0, "grouped"), (0, 1, "grouped")])
def test_on_a_gpu_triton_is_chosen_where_it_works(
    there: bool, right: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "RULES", {})
    monkeypatch.setattr(selection, "FORCED", "auto")
    monkeypatch.setattr(selection, "TRITON_INSTALLED", True)
    monkeypatch.setattr(selection, "is_triton_right", lambda device: right)
    with FakeTensorMode(), torch.device("cuda"):
        x, kernels = torch.empty(2, 4, 4, 8), torch.empty(2, 8, 3, 3)
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    assert selection.choose_backend(x, kernels) == expected
    with torch.autograd.forward_ad.dual_level():  # of which custom operators know nothing
        assert selection.choose_backend(x, kernels) == "grouped"
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert selection.choose_backend(x, kernels) == "shifted"


def test_what_a_compiler_cannot_differentiate_is_not_chosen() -> None:
    case = {"device": "cpu", "dtype": "float32", "compiled": True, "gradients": True}
    rows = [{**case, "numbers": 8, "milliseconds": {"grouped": 1.0, "folded": 2.0, "shifted": 3.0}}]
    assert list(selection.load_rules(json.dumps({"rows": rows})).values()) == [[(8, "folded")]]


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_a_batch_of_nothing(backend: str) -> None:
    x, kernels = torch.empty(0, 4, 3, 5, requires_grad=True), torch.empty(0, 5, 3, 3, requires_grad=True)
    y = per_sample_depthwise_conv2d(x, kernels, backend)
    gradients = torch.autograd.grad(y.sum(), (x, kernels))
    assert [tensor.shape for tensor in (y, *gradients)] == [x.shape, x.shape, kernels.shape]


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_compiled_transforms_of_functions(backend: str) -> None:
    """Of which custom operators know nothing."""
    torch._dynamo.reset()
    x, kernels = (tensor.detach() for tensor in random_arguments(2, 4, 3, 5, 3))

    def derivative(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.func.jvp(lambda x: per_sample_depthwise_conv2d(x, kernels, backend).sin(), (x,), (x,))

    for a, b in zip(torch.compile(derivative, backend="aot_eager")(x), derivative(x), strict=True):
        torch.testing.assert_close(a, b)


def test_the_measurements_in_the_package_name_backends_that_there_are() -> None:
    chosen = {backend for rules in selection.RULES.values() for _, backend in rules}
    assert chosen and chosen <= set(BACKENDS)


def test_an_environment_variable_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernels = torch.zeros(1, 2, 2, 1), torch.zeros(1, 1, 3, 3)
    monkeypatch.setenv("SIT_ATCONV_DEPTHWISE", "shifted")
    assert runpy.run_path(selection.__file__)["choose_backend"](x, kernels) == "shifted"
    monkeypatch.setattr(selection, "FORCED", "gruoped")
    with pytest.raises(InputError, match="SIT_ATCONV_DEPTHWISE 'gruoped': did you mean 'grouped'"):
        per_sample_depthwise_conv2d(x, kernels)


@pytest.mark.parametrize(
    ("x", "kernels", "backend", "message"),
    [
        (torch.zeros(1, 4, 4, 2), torch.zeros(1, 3, 3, 3), "auto", "do not match"),
        (torch.zeros(1, 4, 4, 2), torch.zeros(1, 2, 4, 4), "auto", "K odd"),
        (torch.zeros(1, 16, 2), torch.zeros(1, 2, 3, 3), "auto", "3 and 4 axes"),
        (torch.zeros(1, 4, 4, 2), torch.zeros(1, 2, 3, 3).double(), "auto", "the same floating dtype"),
        (torch.zeros(1, 4, 4, 2).int(), torch.zeros(1, 2, 3, 3).int(), "auto", "the same floating dtype"),
        (torch.zeros(1, 4, 4, 2), torch.zeros(1, 2, 3, 3), "group", "did you mean 'grouped'"),
        (torch.zeros(1, 4, 4, 2), torch.zeros(1, 2, 3, 3), "triton", "triton"),
    ],
)
def test_what_does_not_fit_is_refused(x, kernels, backend, message) -> None:
    with pytest.raises(InputError, match=message):
        per_sample_depthwise_conv2d(x, kernels, backend)

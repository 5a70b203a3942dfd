"""Linear layers by oneDNN compute what torch's do, whatever is asked of them: gradients, transforms, compilers."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv.models.layers import Linear, Mlp
from sit_atconv.ops import linear, linear_gelu

needs_both_libraries = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()),
    reason="oneDNN is preferred to MKL, where torch has both",
)


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """In eager mode small products stay torch's."""
    monkeypatch.setattr("sit_atconv.ops.dense._SMALL", 0)


def arguments(*shape: int, out: int = 5, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(out, shape[-1], requires_grad=True)
    return x, weight, torch.randn(out, requires_grad=True) if bias else None


def operations(run: Callable[[], object]) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    return {event.name for event in recorded.events()}


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    inputs=st.integers(1, 9),
    out=st.integers(1, 9),
    bias=st.booleans(),
)
def test_values_and_gradients_are_those_of_torch(shape: list[int], inputs: int, out: int, bias: bool) -> None:
    given = arguments(*shape, inputs, out=out, bias=bias)
    wanted = [each for each in given if each is not None]
    dy = torch.randn(*shape, out)
    ours, theirs = linear(*given), F.linear(*given)
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(y, wanted, dy, materialize_grads=True) for y in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    with torch.inference_mode():
        torch.testing.assert_close(linear_gelu(*given), F.gelu(F.linear(*given), approximate="tanh"))


@pytest.mark.parametrize("compiled", [False, True])
def test_any_strides_of_the_bias(compiled: bool) -> None:
    x, weight, _ = arguments(3, 4)
    function = torch.compile(linear, backend="aot_eager") if compiled else linear
    for bias in (torch.randn(5, 3)[:, 1], torch.randn(1).expand(5)):
        torch.testing.assert_close(function(x, weight, bias), F.linear(x, weight, bias))
        with torch.inference_mode():
            expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
            torch.testing.assert_close(linear_gelu(x, weight, bias), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("out", [4, 5])
def test_batched_gradients(out: int) -> None:
    x, weight, bias = arguments(2, 3, 4, out=out)
    directions = torch.randn(6, 2, 3, out)
    results = (
        torch.autograd.grad(function(x, weight, bias), (x, weight, bias), directions, is_grads_batched=True)
        for function in (linear, F.linear)
    )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("out", [4, 5])
def test_second_gradients(out: int) -> None:
    x, weight, bias = arguments(3, 4, out=out)

    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(x, weight, bias).sin().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.sin().sum(), (x, weight, bias))

    for a, b in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_forward_derivatives(wanted: tuple[int, ...]) -> None:
    primals = arguments(2, 3, 4)
    moving = tuple(primals[i] for i in wanted)

    def derivative(function: Callable[..., Tensor]) -> Tensor:
        def of_moving(*values: Tensor) -> Tensor:
            return function(*(dict(zip(wanted, values, strict=True)).get(i, primals[i]) for i in range(3)))

        return torch.func.jvp(of_moving, moving, tuple(torch.ones_like(each) for each in moving))[1]

    torch.testing.assert_close(derivative(linear), derivative(F.linear))


@pytest.mark.parametrize("inside", ["all of it", "its gradient"])
@pytest.mark.parametrize("out", [4, 5])
def test_forward_derivatives_of_gradients(out: int, inside: str) -> None:
    x, weight, bias = arguments(3, 4, out=out)
    direction = torch.randn(3, 4)

    def derivatives(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(x, weight, bias).sin().sum()
        with forward_ad.dual_level():
            if inside == "all of it":
                y = function(forward_ad.make_dual(x, direction), weight, bias).sin().sum()
            dy = forward_ad.make_dual(torch.tensor(1.0), torch.tensor(1.0))
            return [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(y, (x, weight, bias), dy)]

    for a, b in zip(derivatives(linear), derivatives(F.linear), strict=True):
        torch.testing.assert_close(a, b)


def test_samples_are_mapped_over() -> None:
    x, weight, bias = arguments(3, 2, 4)
    torch.testing.assert_close(torch.func.vmap(linear, (0, None, None))(x, weight, bias), F.linear(x, weight, bias))
    jacobian = torch.func.jacrev(linear)(x, weight, bias)
    torch.testing.assert_close(jacobian, torch.func.jacrev(F.linear)(x, weight, bias))


@needs_both_libraries
@pytest.mark.parametrize(("gradients", "out"), [(False, 5), (True, 5), (True, 4)])
def test_compiled_without_breaks_and_left_to_onednn(gradients: bool, out: int) -> None:
    torch._dynamo.reset()
    x, weight, bias = arguments(6, 4, out=out)
    compiled = torch.compile(linear, fullgraph=True)

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(gradients):
            y = function(x, weight, bias)
        return (y, *torch.autograd.grad(y.sum(), (x, weight, bias))) if gradients else (y,)

    for a, b in zip(run(compiled), run(F.linear), strict=True):
        torch.testing.assert_close(a, b)
    assert "mkldnn::_linear_pointwise" in operations(lambda: run(compiled))
    assert "aten::mm" not in operations(lambda: run(compiled))
    with torch.inference_mode():
        expected = F.gelu(F.linear(x, weight, bias), approximate="tanh")
        torch.testing.assert_close(torch.compile(linear_gelu, fullgraph=True)(x, weight, bias), expected)


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
def test_compiled_transforms_of_functions(transform: str) -> None:
    torch._dynamo.reset()
    x, weight, bias = (tensor.detach() for tensor in arguments(6, 4))

    def run(x: Tensor) -> tuple[Tensor, ...]:
        if transform == "jvp":
            return torch.func.jvp(lambda x: linear(x, weight, bias).sin(), (x,), (x,))
        if transform == "grad":
            return (torch.func.grad(lambda x: linear(x, weight, bias).sin().sum())(x),)
        return (torch.func.vmap(torch.func.grad(lambda x: linear(x[None], weight, bias).sin().sum()))(x),)

    for a, b in zip(torch.compile(run, backend="aot_eager")(x), run(x), strict=True):
        torch.testing.assert_close(a, b)


def test_transforms_of_compiled_functions() -> None:
    torch._dynamo.reset()
    x, weight, bias = (tensor.detach() for tensor in arguments(6, 4))

    def slope(function: Callable[..., Tensor]) -> Tensor:
        return torch.func.grad(torch.compile(lambda w: function(x, w, bias).sin().sum()))(weight)

    torch.testing.assert_close(slope(linear), slope(F.linear))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_traced() -> None:
    x, weight, bias = (tensor.detach() for tensor in arguments(6, 4))
    torch.testing.assert_close(torch.jit.trace(linear, (x, weight, bias))(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("out", [4, 5])
def test_torch_counts_the_operations(out: int) -> None:
    x, weight, bias = arguments(2, 3, 4, out=out)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 3 * 4 * out)


@needs_both_libraries
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_the_choice_of_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = arguments(6, 4)
    onednn = "mkldnn::_linear_pointwise"
    assert onednn in operations(lambda: linear(x, weight, bias))
    with torch.backends.mkldnn.flags(enabled=False):
        assert onednn not in operations(lambda: linear(x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn not in operations(lambda: linear(x, weight, bias))
    assert onednn not in operations(lambda: linear(x.double(), weight.double(), bias.double()))
    monkeypatch.setattr("sit_atconv.ops.dense._SMALL", 6 * 4 * 5 + 1)
    assert onednn not in operations(lambda: linear(x, weight, bias))


def test_operator_registration() -> None:
    torch.library.opcheck(torch.ops.sit_atconv.linear.default, arguments(3, 4))
    torch.library.opcheck(torch.ops.sit_atconv.linear.default, arguments(2, 3, 4, bias=False))
    rows = (torch.randn(3, 4), torch.randn(3, 5), torch.randn(4, 5))
    torch.library.opcheck(torch.ops.sit_atconv.linear_weight_gradient.default, rows)


@pytest.mark.parametrize(("shape", "out"), [((2, 3), 5), ((2, 4), 6), ((), 5)])
def test_shapes_that_do_not_belong_together_are_torchs_errors(shape: tuple[int, ...], out: int) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(5, 4), torch.randn(out)
    with pytest.raises(RuntimeError) as theirs:
        F.linear(x, weight, bias)
    with pytest.raises(RuntimeError) as ours:
        linear(x, weight, bias)
    assert str(ours.value) == str(theirs.value)


def test_modules_are_torchs_under_the_same_names() -> None:
    ours, theirs = Mlp(4, 8), nn.Sequential()
    theirs.fc1, theirs.act, theirs.fc2 = nn.Linear(4, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(Linear(2, 3, bias=False), nn.Linear)


@pytest.mark.parametrize("how", ["replaced", "hooked", "its forward replaced"])
def test_inference_calls_layers_that_do_more(how: str) -> None:
    """As LoRA, hooks of users, and accelerate's offloading change layers."""
    mlp, x = Mlp(4, 8), torch.randn(2, 3, 4)
    expected = mlp.fc2(F.gelu(2 * mlp.fc1(x), approximate="tanh"))
    if how == "replaced":
        doubled = nn.Linear(4, 8)
        doubled.load_state_dict({name: 2 * tensor for name, tensor in mlp.fc1.state_dict().items()})
        mlp.fc1 = nn.Sequential(doubled)
    elif how == "hooked":
        mlp.fc1.register_forward_hook(lambda layer, inputs, y: 2 * y)
    else:
        forward = mlp.fc1.forward
        mlp.fc1.forward = lambda x: 2 * forward(x)
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x), expected)

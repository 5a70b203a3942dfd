"""Linear layers, x · weightᵀ + bias, by the library that computes them fastest.

On x86 torch hands products of fp32 matrices to MKL, which leaves AVX-512 unused on processors that are not Intel's;
oneDNN, which comes with torch too, uses it everywhere. On other devices and in other dtypes torch's own choice stands.
`torch.backends.mkldnn.flags(enabled=False)` gives MKL's products back.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from sit_atconv.ops.registration import closed_to_compiler, is_transformed

_BOTH_LIBRARIES = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
_SMALL = 2**21  # multiply-adds, below which a call costs more than oneDNN saves
_PLAIN = (Tensor, nn.Parameter)  # subclasses, such as sharded or quantised weights, know better


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x (..., in), weight (out, in), bias (out,) -> (..., out).

    Differentiable as often as wanted, forwards and backwards.
    """
    if not _is_onednn_faster(x, weight, bias):
        return F.linear(x, weight, bias)
    if closed_to_compiler():  # it would go back to MKL
        return _operator(x, weight, bias)
    return F.linear(x, weight, bias) if torch.compiler.is_compiling() else _Product.apply(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU, approximated by tanh, of a linear layer, without gradients: one pass over memory on oneDNN."""
    if _is_onednn_faster(x, weight, bias) and not torch.compiler.is_compiling():
        return _product(x, weight, bias, "gelu", "tanh")
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _is_onednn_faster(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        _BOTH_LIBRARIES
        and not torch.jit.is_tracing()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in _PLAIN
        and x.ndim > 1
        and (torch.compiler.is_compiling() or x.numel() * len(weight) >= _SMALL)  # a program serves all batch sizes
        and x.numel() > 0
        and x.shape[-1:] == weight.shape[1:]  # else torch's own error is the better one
        and (bias is None or (bias.shape, bias.dtype) == (weight.shape[:1], torch.float32))
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


@torch.compiler.disable  # a transform around a compiled function leads compilers here, and Inductor knows no way on
def _product(x: Tensor, weight: Tensor, bias: Tensor | None, after: str = "none", algorithm: str = "") -> Tensor:
    if bias is not None:
        bias = bias.contiguous()  # oneDNN takes it to be, unasked
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], algorithm)


def _differentiated_again() -> bool:
    """Whether what a backward pass computes is to have derivatives of its own, backwards or forwards."""
    return torch.is_grad_enabled() or is_transformed()


def _gradients(linear: Callable[[Tensor, Tensor, None], Tensor], ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias, those that are wanted: `linear` layers as well."""
    x, weight = ctx.saved_tensors
    dy = dy.contiguous()  # for all three at once: tokens from `folded` come in another order
    rows, inputs = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (dy, x))  # vmap has no rule for flatten
    dx = linear(dy, weight.t(), None) if ctx.needs_input_grad[0] else None
    dweight = None
    if ctx.needs_input_grad[1]:
        again = _differentiated_again()
        dweight = linear(rows.t(), inputs.t(), None) if again else _weight_gradient(rows, inputs, weight)
    return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None


@torch.library.custom_op("sit_atconv::linear_weight_gradient", mutates_args=())
def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dyᵀ · x of rows dy (rows, out) and x (rows, in), not differentiable: (out, in), as the weight.

    oneDNN's product transposes dy; its inner product does not, and copies the result. For square weights, those of
    token mixers, that costs a few per cent, for others more (docs/performance.md), and for few rows memory.
    """
    outputs, inputs = weight.shape
    if outputs == inputs < 4 * len(dy):
        return torch.ops.aten.mkldnn_linear_backward_weights(dy.to_mkldnn(), x.to_mkldnn(), weight, False)[0]
    return _product(dy.t(), x.t(), None)


@_weight_gradient.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


class _Product(torch.autograd.Function):
    """oneDNN's product in eager mode."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(linear if _differentiated_again() else _product, ctx, dy)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        terms = [linear(dx, weight)] if dx is not None else []
        terms += [linear(x, dweight)] if dweight is not None else []
        if dbias is not None:
            terms.append(dbias.expand(*x.shape[:-1], -1))
        return sum(terms[1:], terms[0])

    @staticmethod
    def vmap(info: Any, axes: tuple[int | None, ...], *inputs: Tensor | None) -> tuple[Tensor, int]:
        return torch.vmap(F.linear, axes)(*inputs), 0


@torch.library.custom_op("sit_atconv::linear", mutates_args=())
def _operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's product under torch.compile."""
    return _product(x, weight, bias)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


_operator.register_autograd(
    partial(_gradients, _operator),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
)


def _count(x_shape: torch.Size, weight_shape: torch.Size, *others: Any, **options: Any) -> int:
    """Floating-point operations, for torch's `FlopCounterMode`: a multiply-add is two."""
    return 2 * prod(x_shape) * weight_shape[0]


def _count_weight_gradient(dy_shape: torch.Size, x_shape: torch.Size, *others: Any, **options: Any) -> int:
    return 2 * prod(dy_shape) * x_shape[1]


register_flop_formula(torch.ops.sit_atconv.linear_weight_gradient)(_count_weight_gradient)
if _BOTH_LIBRARIES:
    register_flop_formula([torch.ops.mkldnn._linear_pointwise, torch.ops.sit_atconv.linear])(_count)

"""A torch operator from a forward and a backward function, with second derivatives, compilation and fake tensors."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sit_atconv.ops.shifted import shifted_sums

Forward = Callable[[Tensor, Tensor], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active.

    Custom operators support neither: forward derivatives would silently be zero or missing, other transforms fail.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def closed_to_compiler() -> bool:
    """Whether the custom operator is to be used, which a compiler cannot look into."""
    return torch.compiler.is_compiling() and not is_transformed()


def is_exported() -> bool:
    """Whether torch.export or an ONNX exporter is tracing.

    While torch.compile traces, torch says so of itself, too (2.11), and also that it compiles.
    """
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return exporting or torch.onnx.is_in_onnx_export()


def register_operator(name: str, forward: Forward, backward: Backward) -> Forward:
    """Register `sit_atconv::<name>` and `sit_atconv::<name>_backward`; returns the first, differentiable twice.

    Args:
        forward: y(x, kernels), linear in each; x and y (B, H, W, C), kernels (B, C, K, K).
            Both functions return contiguous tensors: compilers rely on it.
        backward: (gradient of y, x, kernels) -> the gradients of x and of the kernels.
    """
    operator = torch.library.custom_op(f"sit_atconv::{name}", forward, mutates_args=())
    gradient = torch.library.custom_op(f"sit_atconv::{name}_backward", backward, mutates_args=())
    operator.register_fake(lambda x, kernels: x.new_empty(x.shape))
    gradient.register_fake(lambda dy, x, kernels: (x.new_empty(x.shape), kernels.new_empty(kernels.shape)))

    def save_inputs(ctx, inputs: tuple[Tensor, ...], output: object) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        if is_transformed():
            return torch.func.vjp(shifted_sums, *ctx.saved_tensors)[1](dy)
        return gradient(dy, *ctx.saved_tensors)

    def differentiate_twice(ctx, ddx: Tensor, ddkernels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The convolution is linear in x and in the kernels, so its gradients are sums of the same two functions.
        dy, x, kernels = ctx.saved_tensors
        return operator(ddx, kernels) + operator(x, ddkernels), *gradient(dy, ddx, ddkernels)

    operator.register_autograd(differentiate, setup_context=save_inputs)
    gradient.register_autograd(differentiate_twice, setup_context=save_inputs)
    return operator

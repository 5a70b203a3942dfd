"""The Triton backend: right under the interpreter, and code for GPUs that its compiler accepts. No GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sit_atconv.ops import per_sample_depthwise_conv2d

triton = pytest.importorskip("triton")


@pytest.mark.slow
def test_under_the_interpreter() -> None:
    # A process of its own: the interpreter is chosen before Triton is imported.
    checks = str(Path(__file__).parents[1] / "triton_interpreter.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", checks]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("capability", "dtype", "number"), [(90, "bf16", 0), (90, "bf16", 7), (80, "fp32", 3)])
def test_compiles_for_gpus_without_atomics(direction: str, capability: int, dtype: str, number: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sit_atconv.ops import triton_kernels

    kernel = getattr(triton_kernels, f"{direction}_kernel")
    configuration = kernel.configs[number]
    constants = {"H": 16, "W": 16, "C": 1152, "K": 3, "BLOCK_W": 16, "dtype": triton.language.float32}
    constants |= configuration.kwargs
    types = dict.fromkeys(("x", "y", "dy", "dx", "kernels"), f"*{dtype}") | {"dkernels": "*fp32"}
    names = kernel.fn.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    compiled = triton.compile(
        ASTSource(kernel.fn, signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": configuration.num_warps},
    )
    assert len(compiled.asm["cubin"]) > 1000
    assert "atom" not in compiled.asm["ptx"]  # no program adds to another's result
    assert compiled.asm["ptx"].count("fma.rn.f32") >= 9 * configuration.kwargs["ROWS"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 16, 16, 1152, 3), (3, 5, 7, 40, 5), (1, 64, 48, 384, 3), (2, 1, 1, 8, 7)])
def test_on_the_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from operator_truth import assert_same, random_arguments, unfolded_convolution, value_and_gradients

    x, kernels = (tensor.detach().cuda().requires_grad_() for tensor in random_arguments(*shape, dtype))
    weights = torch.randn_like(x)
    doubles = (x.detach().double().requires_grad_(), kernels.detach().double().requires_grad_())
    expected = value_and_gradients(unfolded_convolution, *doubles, weights)
    actual = value_and_gradients(lambda a, b: per_sample_depthwise_conv2d(a, b, "triton"), x, kernels, weights)
    assert_same(actual, expected, {torch.float64: 1e-13, torch.float32: 2**-20}.get(dtype, torch.finfo(dtype).eps))

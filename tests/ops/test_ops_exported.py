"""Exported programs hold the shifted form of the convolution; compiled and eager ones the backend that was measured."""

import torch
from torch import Tensor, nn

from sit_atconv.ops import per_sample_depthwise_conv2d
from sit_atconv.ops.selection import RULES, choose_backend

BATCH = torch.export.Dim("batch", min=1, max=64)


class Convolve(nn.Module):
    def forward(self, x: Tensor, kernels: Tensor) -> Tensor:
        return per_sample_depthwise_conv2d(x, kernels)


def arguments(side: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, side, side, 32), torch.randn(batch, 32, 3, 3)


def test_exported_programs_need_no_operator_of_ours_at_any_size() -> None:
    for side in (8, 56):
        program = torch.export.export(Convolve(), arguments(side), dynamic_shapes=({0: BATCH}, {0: BATCH}))
        targets = {str(node.target) for node in program.graph.nodes}
        assert not [target for target in targets if "sit_atconv" in target or "conv" in target]
        one = arguments(side, 1)
        torch.testing.assert_close(program.module()(*one), Convolve()(*one))


def test_compiled_programs_keep_their_backend() -> None:
    """While torch.compile traces, `torch.compiler.is_exporting` is true as well."""
    found = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x, kernels = arguments(56)
    with torch.no_grad():
        torch.compile(Convolve(), backend=backend)(x, kernels)
        rules = RULES["cpu", torch.float32, True, False]
        expected = next(name for numbers, name in rules if x[0].numel() <= numbers)
    assert [target for target in found if f"depthwise_{expected}" in target]


def test_eager_programs_keep_their_backend() -> None:
    for (device, dtype, compiled, gradients), rules in RULES.items():
        if device == "cpu" and not compiled:
            for numbers, backend in rules:
                x = torch.empty(1, 1, 1, numbers, dtype=dtype, requires_grad=gradients)
                assert choose_backend(x, x) == backend

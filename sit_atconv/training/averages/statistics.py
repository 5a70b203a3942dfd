"""Statistics of a network: what its forward pass changes and its state dict holds, as of BatchNorm."""

from collections.abc import Iterable

from torch import Tensor, nn


def statistics_of(network: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """The buffers of a network that are part of its state dict, by name."""
    for name, module in network.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                yield f"{name}.{key}" if name else key, buffer

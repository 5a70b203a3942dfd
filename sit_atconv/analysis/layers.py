"""The operators that mix positions in a network, each with the maps that it sees."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sit_atconv.errors import InputError
from sit_atconv.models import SiT
from sit_atconv.models.mixers import ATConv
from sit_atconv.zoo.mixing import MixingBlock
from sit_atconv.zoo.pvt import TokenBlock
from sit_atconv.zoo.resnet import Bottleneck as ResNetBottleneck
from sit_atconv.zoo.san import Bottleneck as SANBottleneck

# Where a block of each network holds its operator
_PLACES = {MixingBlock: "mixer", TokenBlock: "attn", ResNetBottleneck: "conv2", SANBottleneck: "sa"}


@dataclass(frozen=True)
class Layer:
    """An operator and what it was given in one pass.

    Args:
        name: of the block.
        module: the operator, of maps or of tokens and their grid.
        maps: its input (B, C, H, W).
        extra: tokens (B, E, C) before those of the map, such as a class token; None for a module of maps.
    """

    name: str
    module: nn.Module
    maps: Tensor
    extra: Tensor | None

    def operator(self, sample: int) -> Callable[[Tensor], Tensor]:
        """The operator of one sample, maps (1, C, H, W) -> (1, C', H, W), whose other tokens stay as they were."""
        return lambda maps: self._apply(maps, None if self.extra is None else self.extra[sample : sample + 1])

    @torch.no_grad()
    def output(self) -> Tensor:
        """Its output for the maps that it was given: (B, C', H, W)."""
        return self._apply(self.maps, self.extra)

    def _apply(self, maps: Tensor, extra: Tensor | None) -> Tensor:
        if extra is None:
            return self.module(maps)
        grid = tuple(maps.shape[-2:])
        tokens = self.module(torch.cat([extra, maps.flatten(2).mT], 1), grid)
        return tokens[:, extra.shape[1] :].mT.unflatten(2, grid)


def operators(model: nn.Module) -> dict[str, nn.Module]:
    """The operators of a SiT or of a network of the zoo, by the names of their blocks, in order.

    Raises `InputError` for other networks.
    """
    if isinstance(model, SiT):
        return {f"block {number}": block.mixer for number, block in enumerate(model.blocks, start=1)}
    found = {}
    for name, module in model.named_modules():
        place = _PLACES.get(type(module))
        if place is not None:
            found[name] = getattr(module, place)
    if not found:
        raise InputError(f"{type(model).__name__} is neither a SiT nor a network of sit_atconv.zoo.")
    return found


@torch.no_grad()
def layers(model: nn.Module, run: Callable[[], Any]) -> list[Layer]:
    """The operators of `model` with what they are given while `run` calls the model."""
    given: dict[str, tuple[Any, ...]] = {}
    named = operators(model)

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: given.update({name: inputs})

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in named.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [_layer(name, module, *given[name]) for name, module in named.items()]


def _layer(name: str, module: nn.Module, x: Tensor, grid: tuple[int, int] | None = None) -> Layer:
    x = x.detach().float()
    if grid is None:
        return Layer(name, module, x, None)
    extra = x.shape[1] - grid[0] * grid[1]
    return Layer(name, module, x[:, extra:].mT.unflatten(2, grid).contiguous(), x[:, :extra])


@contextmanager
def without_inhibition(model: nn.Module) -> Iterator[None]:
    """Every ATConv of the model without lateral inhibition, λ = 0. Raises `InputError` when none has it."""
    inhibited = [each for each in model.modules() if isinstance(each, ATConv) and each.inhibited_by == "dkm"]
    if not inhibited:
        raise InputError("The model has no ATConv with lateral inhibition, so there is nothing to switch off.")
    try:
        for each in inhibited:
            each.inhibited_by = "none"
        yield
    finally:
        for each in inhibited:
            each.inhibited_by = "dkm"

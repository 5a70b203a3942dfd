"""Tensors that may be sharded across processes (DTensors of FSDP2): local shards and full tensors."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """A view of this process's shard of a tensor, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The complete tensor. All processes call it when the tensor is sharded."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def gather_whole(tensors: Iterable[tuple[str, Tensor]], main: bool) -> dict[str, Tensor]:
    """Complete tensors on the main process, none on the others; sharded ones are moved to the CPU one by one.

    All processes call it.
    """
    gathered = {}
    for name, tensor in tensors:
        complete = whole(tensor)
        if main:
            gathered[name] = complete if local(tensor) is tensor else complete.cpu()
    return gathered


def split_like(values: Tensor, model: Tensor) -> Tensor:
    """A complete tensor, placed and sharded like `model`. All processes call it, with the same values."""
    values = values.to(local(model).device)
    if not isinstance(model, DTensor):
        return values
    return distribute_tensor(values, model.device_mesh, model.placements)


def share_of(values: Tensor, model: Tensor) -> Tensor:
    """This process's part of a complete tensor that all processes have, if `model` is sharded; nothing is sent."""
    if not isinstance(model, DTensor):
        return values
    return distribute_tensor(values, model.device_mesh, model.placements, src_data_rank=None).to_local()


@torch.no_grad()
def copy_whole(target: Tensor, values: Tensor) -> None:
    """Fill `target`, sharded or not, with a complete tensor of its shape."""
    local(target).copy_(local(split_like(values, target)))

"""Which weights of a SiT are hidden matrices, for an optimizer such as Muon that treats a matrix as a whole."""

from collections.abc import Iterator

from torch import nn

from sit_atconv.errors import InputError
from sit_atconv.models.sit import SiT


def hidden_matrices(model: SiT) -> dict[str, tuple[int, ...]]:
    """The weights of the linear layers in mixers and MLPs, by the model's names, each with its division into rows.

    A fused weight holds several matrices, one below the other, such as those of q, k and v: (C, C, C) for one of
    (3C, C). A module says so in its attribute `matrices`, by the name of its linear layer: how many equal matrices the
    weight holds, or a tuple of their rows; 0 if it is no hidden matrix, such as ATConv's generator of kernels. A layer
    that is not named holds one. Embeddings, modulations, the final layer, convolutions and tables are not included.

    Raises `InputError` for a number that does not divide the rows of a weight, and for rows that do not add up to them.
    """
    found = {}
    for number, block in enumerate(model.blocks):
        for part in ("mixer", "mlp"):
            prefix = f"blocks.{number}.{part}"
            found |= {f"{prefix}.{name}": rows for name, rows in _within(getattr(block, part))}
    return found


def _within(root: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path, module in root.named_modules():
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                rows, held = layer.weight.shape[0], getattr(module, "matrices", {}).get(name, 1)
                if held == 0:
                    continue
                parts = held if isinstance(held, tuple) else (rows // held,) * held
                if sum(parts) != rows:
                    kind = type(module).__name__
                    raise InputError(f"{kind}.matrices divides {name} into {held}, but its weight has {rows} rows.")
                yield ".".join(filter(None, (path, name, "weight"))), parts

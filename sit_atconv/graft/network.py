"""A trained network with new mixers, and the losses by which these learn what the old ones compute."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sit_atconv.errors import InputError
from sit_atconv.graft.settings import LOSSES
from sit_atconv.models import SiT
from sit_atconv.models.mixers.pattern import Pattern, describe_pattern, expand_pattern, mixer_names
from sit_atconv.models.mixers.plugins import import_offered


def changed_blocks(model: SiT, pattern: Pattern) -> list[int]:
    """The blocks, counted from 1, whose mixer is another one in `pattern`: its name or the value of an option differs.

    Raises `InputError` for a pattern that is invalid, too long, or the model's own.
    """
    depth = len(model.blocks)
    new, old = expand_pattern(pattern, depth), expand_pattern(model.config.mixer_pattern, depth)
    import_offered(mixer_names(new))
    changed = [
        i for i, (one, other) in enumerate(zip(new, old, strict=True), start=1) if one.resolve() != other.resolve()
    ]
    if not changed:
        raise InputError(
            f"The network has the mixers {describe_pattern(pattern)} already, so there is nothing to graft: choose "
            "another --mixer-pattern, or --self to fit new mixers of the same kinds, as a test of the fit."
        )
    return changed


def with_new_mixers(teacher: SiT, pattern: Pattern, blocks: Sequence[int], seed: int, fresh: bool = False) -> SiT:
    """A copy of `teacher` with the mixers of `pattern`, those of `blocks` (from 1) with new weights drawn from `seed`.

    A new mixer whose weights have the names and shapes of the old one's begins with these, as attention in windows does
    in place of attention; not if `fresh`.
    """
    torch.manual_seed(seed)  # on the CPU, so that all processes and devices begin with the same weights
    model = SiT.from_config({**teacher.config, "mixer_pattern": pattern})
    state = teacher.state_dict()
    for block in blocks:
        new, old = (network.blocks[block - 1].mixer.state_dict() for network in (model, teacher))
        if fresh or _shapes(new) != _shapes(old):
            prefix = f"blocks.{block - 1}.mixer."
            state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
            state |= {prefix + name: tensor for name, tensor in new.items()}
    model.load_state_dict(state)
    return model.eval()


class Graft(nn.Module):
    """A frozen network and the new mixers of some of its blocks, each trained to compute what the old one does.

    A new mixer is given the input of the old one, the modulated norm of the frozen network's tokens, so blocks do not
    influence one another (2506.05340, §3.2).

    Args:
        teacher: the trained network; its weights are frozen.
        mixers: the new mixer of each block that gets one, by the block's number from 1.
        loss: a name in `LOSSES`.
    """

    def __init__(self, teacher: SiT, mixers: dict[int, nn.Module], loss: str) -> None:
        super().__init__()
        self.teacher, self._loss = teacher.requires_grad_(False), LOSSES[loss]
        self.mixers = nn.ModuleDict({str(block): mixer for block, mixer in mixers.items()})

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Losses and squares of the K new mixers at x (B, C, H, W), times t (B,) and labels y (B,): (K,) and (K, 2).

        One pass of the teacher serves all blocks. The squares, without gradient, are the sums of the squared error and
        of the squared output of the old mixer.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [
            self.teacher.blocks[int(block) - 1].mixer.register_forward_hook(partial(self._compare, found, block))
            for block in self.mixers
        ]
        try:
            with torch.no_grad():
                self.teacher(x, t, y)
        finally:
            for hook in hooks:
                hook.remove()
        losses, squares = zip(*(found[block] for block in self.mixers), strict=True)
        return torch.stack(losses), torch.stack(squares)

    def _compare(
        self, found: dict[str, tuple[Tensor, Tensor]], block: str, _: nn.Module, inputs: tuple, output: Tensor
    ) -> None:
        """Right after the old mixer of `block`: give its inputs to the new one, and keep loss and squares."""
        wanted = output.float()
        with torch.enable_grad():
            given = self.mixers[block](*inputs).float()
            loss = self._loss(given, wanted)
        squares = torch.stack([(given.detach() - wanted).square().sum(), wanted.square().sum()])
        found[block] = loss, squares


def relative_error(squares: Tensor) -> Tensor:
    """‖error‖ / ‖output‖ from the sums of squares (..., 2) of `Graft`: (...). Not finite where the output is 0."""
    return (squares[..., 0] / squares[..., 1]).sqrt()


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}

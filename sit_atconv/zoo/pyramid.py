"""What timm's users expect of a network of stages: features of each stage, a replaceable head, parameter groups."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from sit_atconv.zoo.registration import require_fitting, weights_in


class Stage(nn.Module):
    """Downsampling, then blocks: (B, C_in, H, W) -> (B, C, H', W'). Blocks see and return (B, H', W', C)."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1).contiguous()
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


class Pyramid(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes): a stem, stages, a norm of the last map, and a head.

    Subclasses call `assemble`. Maps are (B, C, H, W), those of the stages are not normalised.
    """

    def assemble(self, stem: nn.Module, stages: Sequence[Stage], norm: nn.Module, reductions: Sequence[int]) -> None:
        """Set the parts, and describe the stages for timm: widths are those of the last block."""
        self.stem, self.stages, self.norm = stem, nn.Sequential(*stages), norm
        widths = zip(self.dims, reductions, strict=True)
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{number}"}
            for number, (width, reduction) in enumerate(widths)
        ]
        self.num_features = self.dims[-1]
        self.head_hidden_size = self.num_features

    @torch.jit.ignore
    def convert(self, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weights under our names, from a checkpoint with our names or with those of a release."""
        return weights_in(checkpoint)

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> NamedTuple:
        """As torch's, for all that `convert` takes. With `strict`, other weights raise `InputError`."""
        weights = self.convert(state_dict)
        if strict:
            require_fitting(self, weights)
        return super().load_state_dict(weights, strict, assign)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backward pass recomputes the blocks."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for `num_classes` (0: none); `global_pool` "" leaves the maps as they are."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        like = next(self.parameters())
        self.head.to(like.device, like.dtype).train(self.training)

    def remove_head(self) -> None:
        """Leave the last map."""
        self.head.norm = nn.Identity()
        self.head.in_features = self.head.num_features = self.num_features
        self.reset_classifier(0, "")

    def normalise(self, x: Tensor) -> Tensor:
        """The final norm of a map (B, C, H, W)."""
        return self.norm(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map (B, C, H', W'), normalised where the network has a norm before its head."""
        return self.normalise(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of a map, or with `pre_logits` what the last layer sees."""
        x = x.contiguous()  # through pool and norm of channels-last maps torch.compile (2.11, CPU) gives gradients of 0
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last map and those of the stages `indices` (the last n if int, all if None), as timm defines it."""
        if output_fmt != "NCHW":
            raise ValueError(f"Maps are NCHW, not {output_fmt}.")
        taken, last_taken = feature_take_indices(len(self.stages), indices)
        x, intermediates, last = self.stem(x), [], len(self.stages) - 1
        for number, stage in enumerate(self.stages):
            if stop_early and number > last_taken:
                break
            x = stage(x)
            if number in taken:
                intermediates.append(self.normalise(x) if norm and number == last else x)
        if intermediates_only:
            return intermediates
        return (self.normalise(x) if number == last else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the stages `indices` do not need; returns their numbers."""
        taken, last_taken = feature_take_indices(len(self.stages), indices)
        shorter = last_taken < len(self.stages) - 1
        self.stages = self.stages[: last_taken + 1]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if shorter:
            self.num_features = self.head_hidden_size = self.dims[last_taken]
        if prune_head or shorter:
            self.remove_head()
        return taken

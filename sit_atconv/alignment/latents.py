"""The clean latents as teacher: no second network (SRA 2, arXiv 2601.17830)."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LATENTS = "latents"  # the teacher's name in a configuration
_BETA = 0.05  # errors below it are squared


class LatentTeacher:
    """Takes the place of a `Teacher`: its tokens are the patches of the normalised latents that are trained on.

    Args:
        patch_size: of the model, p.
        channels: of the latents, C.
    """

    key = LATENTS  # the entry of a batch that it needs

    def __init__(self, patch_size: int, channels: int) -> None:
        self.patch_size, self.dim = patch_size, patch_size**2 * channels

    def targets(self, batch: dict[str, Tensor], grid: tuple[int, int]) -> Tensor:
        """Patches (B, h·w, C·p²) fp32 on `grid` (h, w), in the order of the model's input, from batch[key]."""
        h, w = grid
        return rearrange(batch[self.key].float(), "b c (h p) (w q) -> b (h w) (c p q)", h=h, w=w)


class LatentProjector(nn.Module):
    """Five Linears with SiLU between them (SRA 2): tokens (B, N, dim) -> patches (B, N, patch_channels).

    The paper gives five layers and not their widths: here all hidden ones are `dim`.
    """

    def __init__(self, dim: int, patch_channels: int) -> None:
        super().__init__()
        hidden = [module for _ in range(4) for module in (nn.Linear(dim, dim), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(dim, patch_channels))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


def latent_loss(projected: Tensor, patches: Tensor) -> Tensor:
    """Smooth L1 with β = 0.05, in fp32, averaged over each sample's elements: (B, N, D) twice -> (B,).

    An error e costs e²/(2β) below β and |e| − β/2 above. The paper does not say whether it sums or averages.
    """
    return F.smooth_l1_loss(projected.float(), patches.float(), reduction="none", beta=_BETA).mean((1, 2))

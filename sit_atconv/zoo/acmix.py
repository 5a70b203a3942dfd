"""ACmix that TorchScript can compile: there in torch's plain operators, which keep all scores; otherwise unchanged."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor

from sit_atconv.models.mixers import ACmix, Window
from sit_atconv.models.mixers.acmix.neighbourhood import mirrored
from sit_atconv.models.mixers.acmix.shifts import ShiftedSum
from sit_atconv.models.mixers.attend import Attend
from sit_atconv.models.mixers.local_attention.groups import RelativeBias

for _part in (Window, Attend, RelativeBias):
    torch.jit.ignore(_part.forward)  # TorchScript would compile them, although nothing there calls them


class ImageShiftedSum(ShiftedSum):
    """`ShiftedSum` with learned kernels: q, k, v (B, H, W, …) -> (B, H, W, C)."""

    def __init__(self, dim: int, num_heads: int, bias: bool) -> None:
        super().__init__(dim, num_heads, bias, "learned")

    def forward(self, qkv: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            maps = qkv.unflatten(3, (self.fc.weight.shape[1], self.head_dim)).transpose(3, 4)  # (B, H, W, d, pieces)
            return self.shift(self.fc(maps).flatten(3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:  # TorchScript compiles the whole function unless this is a branch
            return ShiftedSum.forward(self, qkv)


@register_notrace_module
class ImageACmix(ACmix):
    """`ACmix` with free rates and learned shifts, in windows or neighbourhoods (the forms of the release)."""

    def __init__(self, dim: int, num_heads: int, neighbourhood: int = 0, window: int = 0, shift: int = 0) -> None:
        super().__init__(dim, num_heads, neighbourhood, window, shift)
        self.convolution = ImageShiftedSum(dim, num_heads, bias=not neighbourhood)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if torch.jit.is_scripting():
            return self._scripted(x, grid[0], grid[1])
        else:
            return ACmix.forward(self, x, grid)

    def _scripted(self, x: Tensor, height: int, width: int) -> Tensor:
        """`forward`, with the scores of all pairs of tokens (windows) or with copies of all neighbourhoods."""
        qkv = self.attention.qkv(x)
        if hasattr(self.attention, "position"):
            attention = self._in_neighbourhoods(qkv, height, width)
            rows, columns = 0, 0
        else:
            attention = self._in_windows(qkv, height, width)
            rows = self.shift if height > self.window else 0
            columns = self.shift if width > self.window else 0
        maps = torch.roll(qkv.unflatten(1, (height, width)), (-rows, -columns), (1, 2))
        convolution = torch.roll(self.convolution(maps), (rows, columns), (1, 2)).flatten(1, 2)
        return self.alpha * self.attention.out_proj(attention) + self.beta * convolution

    def _in_windows(self, qkv: Tensor, height: int, width: int) -> Tensor:
        """Attention of all tokens to all, with those of other windows hidden: (B, N, 3C) -> (B, N, C)."""
        device = qkv.device
        side_h, side_w = min(self.window, height), min(self.window, width)
        shift_h = self.shift if height > self.window else 0
        shift_w = self.shift if width > self.window else 0
        row = torch.arange(height, device=device).unsqueeze(1).expand(height, width).flatten()
        column = torch.arange(width, device=device).expand(height, width).flatten()
        window = torch.div(row - shift_h, side_h, rounding_mode="floor") * (width + 2)
        window = window + torch.div(column - shift_w, side_w, rounding_mode="floor")
        together = window.unsqueeze(1) == window
        table = self.attention.bias.table
        place = row * (2 * self.window - 1) + column
        offset = (place.unsqueeze(1) - place).masked_fill(~together, 0) + (table.shape[0] - 1) // 2
        bias = table[offset].permute(2, 0, 1).masked_fill(~together, float("-inf"))
        parts = qkv.unflatten(2, (3, self.attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=bias.unsqueeze(0).to(qkv.dtype))
        return y.transpose(1, 2).flatten(2)

    def _in_neighbourhoods(self, qkv: Tensor, height: int, width: int) -> Tensor:
        """Attention within neighbourhoods, as `NeighbourhoodAttention` defines it: (B, N, 3C) -> (B, N, C)."""
        heads, reach, batch = self.attention.num_heads, self.attention.reach, qkv.shape[0]
        side = 2 * reach + 1
        y = torch.linspace(-1.0, 1.0, height, dtype=qkv.dtype, device=qkv.device).unsqueeze(1).expand(height, width)
        x = torch.linspace(-1.0, 1.0, width, dtype=qkv.dtype, device=qkv.device).expand(height, width)
        positions = self.attention.position(torch.stack([x, y], -1)).flatten(0, 1)  # (N, d)
        q, k, v = qkv.unflatten(2, (3, heads, -1)).unbind(2)  # (B, N, h, d) each
        k = k - positions.unsqueeze(1)
        rows = mirrored(torch.arange(-reach, height + reach, device=qkv.device), height)
        columns = mirrored(torch.arange(-reach, width + reach, device=qkv.device), width)
        both = torch.stack([k, v]).flatten(0, 1).flatten(2).transpose(1, 2).reshape(2 * batch, -1, height, width)
        both = F.unfold(both.index_select(2, rows).index_select(3, columns), (side, side))
        both = both.reshape(2, batch, heads, -1, side * side, height * width)
        q = q.permute(0, 2, 3, 1).unsqueeze(3)  # (B, h, d, 1, N)
        weights = ((q * both[0]).sum(2, keepdim=True) * q.shape[2] ** -0.5).softmax(3)
        return (weights * both[1]).sum(3).flatten(1, 2).transpose(1, 2)

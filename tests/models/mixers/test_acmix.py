"""ACmix against loops over positions and neighbours (arXiv 2111.14556, Eq. 7-13, 19-21), and released weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.acmix import ReleasedACmix
from sit_atconv import create_model
from sit_atconv.errors import InputError
from sit_atconv.models.check.checks import CHECKS, Subject, failure
from sit_atconv.models.mixers import create_mixer
from sit_atconv.models.mixers.acmix import ACmix, convert_acmix
from sit_atconv.models.mixers.acmix.neighbourhood import NeighbourhoodAttention, mirrored

FORMS = {
    "global": {},
    "window": {"window": 3},
    "shifted window": {"window": 3, "shift": 1},
    "local": {"neighbourhood": 7},
    "local 3": {"neighbourhood": 3},
}
GRIDS = [(4, 4), (2, 6), (5, 3), (1, 1), (1, 5), (9, 10)]  # the last has four tiles of neighbourhoods
DIM, HEADS = 8, 2


def random_mixer(**options: object) -> ACmix:
    torch.manual_seed(0)
    mixer = ACmix(DIM, HEADS, **options).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer


def random_tokens(grid: tuple[int, int], dim: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, grid[0] * grid[1], dim, generator=generator, dtype=torch.float64, requires_grad=True)


def mirror(position: int, length: int) -> int:
    """Walk back into [0, length) by reflections at its ends."""
    if length == 1:
        return 0
    while not 0 <= position < length:
        position = -position if position < 0 else 2 * (length - 1) - position
    return position


def literal_attention(mixer: ACmix, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """F_att, one query at a time: q, k, v (B, H, W, h, d) -> (B, H, W, C)."""
    _, H, W, _, d = q.shape
    local = mixer.attention if isinstance(mixer.attention, NeighbourhoodAttention) else None
    rows = []
    for i in range(H):
        for j in range(W):
            seen, extra = [], []
            if local is not None:
                for u in range(-local.reach, local.reach + 1):
                    for w in range(-local.reach, local.reach + 1):
                        seen.append((mirror(i + u, H), mirror(j + w, W)))
                there = torch.tensor([coordinates(*place, H, W) for place in seen], dtype=q.dtype)
                here = torch.tensor(coordinates(i, j, H, W), dtype=q.dtype)
                extra = local.position(here) - local.position(there)  # (neighbours, d)
            else:
                seen = [(a, b) for a in range(H) for b in range(W) if window(mixer, (H, W), a, b, i, j)]
            keys, values = (torch.stack([part[:, a, b] for a, b in seen], dim=2) for part in (k, v))  # (B, h, n, d)
            query = q[:, i, j].unsqueeze(2) * d**-0.5
            scores = (query * (keys + (extra if local is not None else 0))).sum(-1)
            if mixer.window:
                side = 2 * mixer.window - 1
                at = [(i - a + mixer.window - 1) * side + j - b + mixer.window - 1 for a, b in seen]
                scores = scores + mixer.attention.bias.table[at].T
            rows.append((scores.softmax(-1).unsqueeze(-1) * values).sum(2).flatten(1))
    y = torch.stack(rows, dim=1).unflatten(1, (H, W))
    return y if local is not None else F.linear(y, mixer.attention.out_proj.weight, mixer.attention.out_proj.bias)


def coordinates(i: int, j: int, H: int, W: int) -> tuple[float, float]:
    """(x, y), each in [−1, 1]."""
    return (-1 + 2 * j / (W - 1) if W > 1 else -1.0, -1 + 2 * i / (H - 1) if H > 1 else -1.0)


def window(mixer: ACmix, grid: tuple[int, int], *positions: int) -> bool:
    """Whether the positions (a, b) and (i, j) are in the same window."""
    a, b, i, j = positions
    same = True
    for length, one, other in zip(grid, (a, b), (i, j), strict=True):
        if mixer.window and length > mixer.window:
            same = same and (one - mixer.shift) // mixer.window == (other - mixer.shift) // mixer.window
    return same


def literal_convolution(mixer: ACmix, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """F_conv by shifts and sums, on the map as shifted by windows."""
    B, H, W, _, d = q.shape
    path, heads = mixer.convolution, mixer.convolution.num_heads
    down, right = (mixer.shift if mixer.window and length > mixer.window else 0 for length in (H, W))
    maps = torch.cat([q, k, v], dim=3)
    mixed = torch.einsum("tm,bijmd->bijdt", path.fc.weight, maps)
    if path.fc.bias is not None:
        mixed = mixed + path.fc.bias
    if path.shift_module in ("learned", "random"):
        kernels = path.shift.weight.view(d, heads, 9, 3, 3)
    else:
        kernels = torch.zeros(d, heads, 9, 3, 3, dtype=q.dtype)
        for u in range(3):
            for w in range(3):
                kernels[:, :, 3 * u + w, u, w] = 1
    rows = []
    for i in range(H):
        for j in range(W):
            total = torch.zeros(B, d, heads, dtype=q.dtype)
            for u in range(3):
                for w in range(3):
                    a, b = (i - down) % H + u - 1, (j - right) % W + w - 1  # on the shifted map
                    if 0 <= a < H and 0 <= b < W:
                        there = mixed[:, (a + down) % H, (b + right) % W]
                        total = total + torch.einsum("bdt,dnt->bdn", there, kernels[..., u, w])
            rows.append(total.flatten(1))  # channel · h + head
    return torch.stack(rows, dim=1).unflatten(1, (H, W))


def literal_acmix(mixer: ACmix, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    projected = F.linear(tokens, mixer.attention.qkv.weight, mixer.attention.qkv.bias).unflatten(1, grid)
    q, k, v = (part.unflatten(-1, (mixer.attention.num_heads, -1)) for part in projected.chunk(3, dim=-1))
    alpha = 1 if mixer.alpha is None else mixer.alpha
    beta = mixer.beta if mixer.rates == "free" else 1 - mixer.alpha if mixer.rates == "tied" else 1
    return (alpha * literal_attention(mixer, q, k, v) + beta * literal_convolution(mixer, q, k, v)).flatten(1, 2)


def assert_same_function(mixer: ACmix, grid: tuple[int, int]) -> None:
    """Values, and gradients of tokens and all weights."""
    tokens = random_tokens(grid)
    wanted = [tokens, *mixer.parameters()]
    ours, literal = mixer(tokens, grid), literal_acmix(mixer, tokens, grid)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weights).sum(), wanted) for y in (ours, literal)]
    for a, b in zip((ours, *gradients[0]), (literal, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_papers_function(form: str, grid: tuple[int, int]) -> None:
    assert_same_function(random_mixer(**FORMS[form]), grid)


@pytest.mark.parametrize("rates", ["free", "tied", "alpha", "fixed"])
@pytest.mark.parametrize("shift_module", ["learned", "random", "fixed", "tensor"])
@pytest.mark.parametrize("form", ["global", "shifted window", "local"])
def test_rates_and_shift_modules(form: str, shift_module: str, rates: str) -> None:
    assert_same_function(random_mixer(**FORMS[form], shift_module=shift_module, rates=rates), (4, 3))


def test_mirrors() -> None:
    positions = torch.arange(-7, 9)
    for length in range(1, 10):
        assert mirrored(positions, length).tolist() == [mirror(int(i), length) for i in positions]
    row = torch.arange(5.0).view(1, 1, 5)
    assert row[0, 0, mirrored(torch.arange(-3, 8), 5)].tolist() == F.pad(row, (3, 3), mode="reflect").flatten().tolist()


@pytest.mark.parametrize("grid", [(4, 4), (5, 9), (12, 17)])
def test_weights_of_the_released_resnets(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    released = ReleasedACmix(12, 4).double()
    for parameter in released.parameters():
        nn.init.normal_(parameter, std=0.5)
    mixer = ACmix(12, 4, neighbourhood=7).double()
    mixer.load_state_dict(convert_acmix(released.state_dict()))
    tokens = random_tokens(grid, 12)
    ours, theirs = mixer(tokens, grid), released(tokens.mT.contiguous().unflatten(2, grid)).flatten(2).mT
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(y.square().sum(), tokens)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-9)


class ReleasedWindowACmix(nn.Module):
    """The attention of the released Swin transformers with the block's shift, for grids that the window divides.

    Transcribed from a description; names and shapes of parameters are the release's.
    """

    def __init__(self, dim: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift, d = heads, window, shift, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.fc = nn.Conv2d(3 * heads, 9, 1)
        self.dep_conv = nn.Conv2d(9 * d, dim, 3, padding=1, groups=d, bias=False)
        self.rate1, self.rate2 = (nn.Parameter(torch.full((1,), 0.5)) for _ in range(2))
        places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        offsets = places[:, :, None] - places[:, None] + window - 1
        self.register_buffer("relative_position_index", offsets[0] * (2 * window - 1) + offsets[1])

    def windows(self, x: Tensor) -> Tensor:
        """(B, H, W, c) -> (B, windows, w², c)."""
        B, H, W, c = x.shape
        w = self.window
        return x.view(B, H // w, w, W // w, w, c).transpose(2, 3).reshape(B, -1, w * w, c)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        w, s, h, d = self.window, self.shift, self.heads, C // self.heads
        qkv = self.qkv(torch.roll(x, (-s, -s), (1, 2)))
        q, k, v = self.windows(qkv).view(B, -1, w * w, 3, h, d).permute(3, 0, 1, 4, 2, 5)
        scores = d**-0.5 * q @ k.mT + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if s:
            region = torch.zeros(1, H, W, 1)
            for i, rows in enumerate((slice(-w), slice(-w, -s), slice(-s, None))):
                for j, columns in enumerate((slice(-w), slice(-w, -s), slice(-s, None))):
                    region[:, rows, columns] = 3 * i + j
            region = self.windows(region)
            scores = scores - 100.0 * (region != region.mT).unsqueeze(2)
        y = (scores.softmax(-1) @ v).transpose(2, 3).reshape(B, H // w, W // w, w, w, C)
        attention = self.proj(y.transpose(2, 3).reshape(B, H, W, C))
        maps = qkv.view(B, H, W, 3 * h, d).permute(0, 3, 4, 1, 2).reshape(B, 3 * h, d * H, W)
        mixed = self.fc(maps).view(B, 9, d, H, W).transpose(1, 2).reshape(B, 9 * d, H, W)
        y = self.rate1 * attention + self.rate2 * self.dep_conv(mixed).permute(0, 2, 3, 1)
        return torch.roll(y, (s, s), (1, 2))


@pytest.mark.parametrize("shift", [0, 1])
def test_weights_of_the_released_swin_transformers(shift: int) -> None:
    torch.manual_seed(0)
    released = ReleasedWindowACmix(12, 3, 3, shift).double()
    for parameter in released.parameters():
        nn.init.normal_(parameter, std=0.5)
    mixer = ACmix(12, 3, window=3, shift=shift).double()
    mixer.load_state_dict(convert_acmix(released.state_dict()))
    tokens = random_tokens((6, 9), 12)
    ours, theirs = mixer(tokens, (6, 9)), released(tokens.unflatten(1, (6, 9))).flatten(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_weights_of_something_else_are_refused() -> None:
    state = ReleasedACmix(8, 2).state_dict()
    with pytest.raises(InputError, match=r"dep_conv\.bias is not a weight of a released ACmix module"):
        convert_acmix({**state, "dep_conv.bias": torch.zeros(8)})


def count(mixer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in mixer.parameters())


@pytest.mark.parametrize(("dim", "expected"), [(64, 17_822), (128, 60_110), (256, 218_414), (512, 829_934)])
def test_parameters_of_the_released_resnets(dim: int, expected: int) -> None:
    d = dim // 4
    assert count(ACmix(dim, 4, neighbourhood=7)) == expected == 3 * (dim**2 + dim) + 3 * d + 27 * 4 + 81 * dim + 2


def test_parameters() -> None:
    C, h = 24, 3
    whole = 4 * C**2 + 4 * C + 27 * h + 9 + 81 * C + 2
    assert count(ACmix(C, h)) == whole
    assert count(ACmix(C, h, window=7)) == count(ACmix(C, h, window=7, shift=3)) == whole + 13**2 * h
    assert count(ACmix(C, h, shift_module="random")) == whole
    for shift_module in ("fixed", "tensor"):
        assert count(ACmix(C, h, shift_module=shift_module)) == whole - 81 * C
    for rates, fewer in (("tied", 1), ("alpha", 1), ("fixed", 2)):
        assert count(ACmix(C, h, rates=rates)) == whole - fewer


def test_operations() -> None:
    """Per position 3C² + 27C + 81C, and 2C for each pair of a query and a key, hidden ones included."""
    C, N = 24, 64
    shared = 3 * C**2 + 27 * C + 81 * C
    assert ACmix(C, 3).flops((8, 8)) == 2 * N * (shared + C**2 + 2 * N * C)
    assert ACmix(C, 3, window=4).flops((8, 8)) == 2 * N * (shared + C**2 + 2 * 16 * C)
    assert ACmix(C, 3, shift_module="tensor").flops((8, 8)) == 2 * N * (shared - 81 * C + C**2 + 2 * N * C)
    local = ACmix(C, 3, neighbourhood=7)  # 2 · C/h for the coordinates; a tile of 8×8 queries covers 14×14 keys
    assert local.flops((8, 8)) == 2 * N * (shared + 2 * 14**2 * C + 2 * 8)
    assert local.flops((16, 16)) == 4 * local.flops((8, 8))


def saved_bytes(module: nn.Module, *inputs: object) -> int:
    """Memory that the forward pass keeps for the backward pass, weights not included."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(*inputs)  # must live: it holds what is counted
    assert result.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_no_neighbourhood_is_kept_in_memory() -> None:
    ours, released = ACmix(384, 6, neighbourhood=7), ReleasedACmix(384, 6)
    x = torch.randn(1, 384, 32, 32, requires_grad=True)
    kept = saved_bytes(ours, x.flatten(2).mT.contiguous(), (32, 32))
    assert kept < saved_bytes(released, x) / 3
    assert kept < 25 * x.nbytes  # 98 for the neighbours' keys and values alone


def test_kernels_start_as_shifts_in_a_model() -> None:
    shape = {"input_size": 8, "hidden_size": 16, "num_heads": 2, "depth": 2, "num_classes": 0}
    model = create_model("SiT-S/2", **shape, mixer_pattern=["acmix", {"name": "acmix", "shift_module": "random"}])
    learned, random = (block.mixer for block in model.blocks)
    assert not torch.equal(random.convolution.shift.weight, learned.convolution.shift.weight)
    fixed = create_mixer("acmix", 16, 2, shift_module="tensor")
    state = {name: weight for name, weight in learned.state_dict().items() if "shift" not in name}
    fixed.load_state_dict(state)
    tokens = torch.randn(2, 12, 16)
    torch.testing.assert_close(learned(tokens, (3, 4)), fixed(tokens, (3, 4)))


@pytest.mark.slow
def test_the_local_form_is_compiled_without_a_break() -> None:
    assert failure(CHECKS["torch.compile"], Subject("acmix", FORMS["local"], dim=16, num_heads=2)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbourhood": 6}, "must be odd and positive"),
        ({"neighbourhood": -1}, "must be odd and positive"),
        ({"neighbourhood": 7, "window": 7}, "not both"),
        ({"window": -1}, "window must be positive"),
        ({"window": 4, "shift": 4}, "less than window"),
        ({"shift": 1}, "shift is for windows"),
        ({"shift_module": "tensors"}, "did you mean 'tensor'"),
        ({"rates": "beta"}, "Unknown rates"),
    ],
)
def test_options_that_are_not_allowed(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ACmix(8, 2, **options)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(InputError, match="not a multiple of the 3 attention heads"):
        ACmix(8, 3)

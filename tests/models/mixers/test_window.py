"""Window attention against its definition, token by token, and against Swin's order of operations where w divides."""

import pytest
import torch
from mixer_truths import assert_same_function, linear, parameters, randomised
from torch import Tensor

from sit_atconv import create_model
from sit_atconv.errors import InputError
from sit_atconv.models.mixers import Window, create_mixer, mixer_flops

GRIDS = [(8, 8), (4, 8), (5, 7), (1, 1)]


def literal_window(mixer: Window, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """For every token: softmax over the tokens whose two bins are its own. No padding, rolling or masking."""
    (H, W), w, h = grid, mixer.window, mixer.num_heads
    d = mixer.dim // h
    q, k, v = linear(x, mixer.qkv).chunk(3, dim=-1)
    shifts = [mixer.shift if length > w else 0 for length in grid]
    places = [(i, j) for i in range(H) for j in range(W)]
    bins = [tuple((at - shift) // w for at, shift in zip(place, shifts, strict=True)) for place in places]
    heads = []
    for head in range(h):
        part = slice(head * d, (head + 1) * d)
        rows = []
        for here, (i, j) in enumerate(places):
            seen = [there for there in range(H * W) if bins[there] == bins[here]]
            scores = torch.stack([(q[:, here, part] * k[:, there, part]).sum(-1) / d**0.5 for there in seen], dim=-1)
            if mixer.bias is not None:
                offsets = [(i - places[there][0], j - places[there][1]) for there in seen]
                numbers = [(row + w - 1) * (2 * w - 1) + column + w - 1 for row, column in offsets]
                scores = scores + mixer.bias.table[numbers, head]
            rows.append((scores.softmax(-1)[..., None] * v[:, seen, part]).sum(1))
        heads.append(torch.stack(rows, dim=1))
    return linear(torch.cat(heads, dim=-1), mixer.out_proj)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 4},
        {"window": 4, "shift": 2},
        {"window": 3, "shift": 1, "relative_bias": False},
        {"window": 2, "shift": 1},
        {"window": 1},
    ],
)
def test_a_token_attends_to_its_bins(grid: tuple[int, int], options: dict[str, object]) -> None:
    assert_same_function(randomised(Window(8, 2, **options)), literal_window, grid, dim=8)


def test_opposite_borders_do_not_meet() -> None:
    """A shifted window holds tokens of two borders; on a side of 5 it also holds padding."""
    mixer = randomised(Window(8, 2, window=4, shift=2))
    for side in (5, 8):
        x = torch.randn(1, side * side, 8, dtype=torch.float64, requires_grad=True)
        mixer(x, (side, side))[0, 0].sum().backward()
        influence = x.grad[0].abs().sum(-1).view(side, side)
        assert influence[:2, :2].all() and not influence[2:].any() and not influence[:, 2:].any()


def test_parameters_and_operations() -> None:
    C, h, w = 384, 6, 8
    with torch.device("meta"):
        mixer, plain = create_mixer("window", C, h), create_mixer("window", C, h, relative_bias=False)
    assert parameters(plain) == 4 * C**2 + 4 * C
    assert parameters(mixer) == 4 * C**2 + 4 * C + (2 * w - 1) ** 2 * h
    for (H, W), padded, tokens in (((16, 16), 256, 64), ((9, 4), 64, 32), ((1, 1), 1, 1), ((20, 13), 24 * 16, 64)):
        assert mixer_flops(mixer, (H, W)) == 2 * (4 * H * W * C**2 + 2 * padded * tokens * C)


@pytest.mark.parametrize(("name", "millions"), [("SiT-S/2", 32.88), ("SiT-XL/2", 674.92)])
def test_size_of_whole_models(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_model(name, mixer_pattern="window")
    assert round(model.num_parameters() / 1e6, 2) == millions


def test_the_table_starts_small_and_not_at_zero() -> None:
    assert 0.01 < Window(64, 4).bias.table.std() < 0.03


def test_options_out_of_range_are_refused() -> None:
    for options, message in (
        ({"window": 0}, "window must be positive"),
        ({"window": 4, "shift": 4}, "less than window, not window 4, shift 4"),
        ({"window": 4, "shift": -1}, "shift at least 0"),
        ({"window": "8"}, "does not accept window"),
        ({"shfit": 4}, "did you mean 'shift'"),
    ):
        with pytest.raises(InputError, match=message):
            create_mixer("window", 8, 2, **options)
    with pytest.raises(InputError, match="not a multiple of the 3 attention heads"):
        create_mixer("window", 8, 3)

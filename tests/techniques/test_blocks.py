"""RMSNorm, SwiGLU, qk-norm and RoPE against their definitions written out, and what the model does with them."""

import copy
from pathlib import Path

import pytest
import torch
from mixer_truths import GRIDS, linear, randomised
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv import SiT, create_model
from sit_atconv.errors import InputError
from sit_atconv.models.checkpoint import load_model
from sit_atconv.models.flops import forward_flops
from sit_atconv.models.mixers import Attention, Window
from sit_atconv.models.mixers.queries import grid_angles
from sit_atconv.models.norms import block_norm, head_norm
from sit_atconv.models.swiglu import SwiGLU

ALL = {"norm": "rms", "mlp": "swiglu", "qk_norm": True, "rope": True}
SHAPE = {"hidden_size": 16, "depth": 2, "num_heads": 2}


def model_with(name: str = "SiT-Hybrid-S/2", random: bool = True, **options: object) -> SiT:
    torch.manual_seed(0)
    model = create_model(name, **{"input_size": 8, "num_classes": 5, **SHAPE, **options})
    for parameter in model.parameters() if random else ():
        nn.init.normal_(parameter, std=0.3)
    return model


def batch(count: int = 2, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(count, 4, height, width), torch.rand(count), torch.arange(count) % 6


def normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    """Each kind of norm by its formula."""
    if norm is None:
        return x
    if isinstance(norm, nn.RMSNorm):
        return norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    centred = x - x.mean(-1, keepdim=True)
    return norm.weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + norm.bias


def rotated(x: Tensor, row: int, column: int) -> Tensor:
    """Pairs (2i, 2i+1) of the first half of x (B, d) turned by row · 10000^(−4i/d), of the second by column."""
    d = x.shape[-1]
    y = torch.empty_like(x)
    for half, place in ((0, row), (1, column)):
        for i in range(d // 4):
            angle = torch.tensor(place * 10_000.0 ** (-4 * i / d), dtype=x.dtype)
            a, b = x[:, half * d // 2 + 2 * i], x[:, half * d // 2 + 2 * i + 1]
            y[:, half * d // 2 + 2 * i] = a * angle.cos() - b * angle.sin()
            y[:, half * d // 2 + 2 * i + 1] = a * angle.sin() + b * angle.cos()
    return y


def literal_attention(mixer: Attention | Window, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Token by token and head by head; a token of a window sees those of its two bins."""
    (H, W), h = grid, mixer.num_heads
    d = x.shape[-1] // h
    q, k, v = linear(x, mixer.qkv).chunk(3, dim=-1)
    w = getattr(mixer, "window", None) or max(grid)
    shifts = [getattr(mixer, "shift", 0) if length > w else 0 for length in grid]
    places = [(i, j) for i in range(H) for j in range(W)]
    bins = [tuple((at - shift) // w for at, shift in zip(place, shifts, strict=True)) for place in places]
    heads = []
    for head in range(h):
        part = slice(head * d, (head + 1) * d)
        ready = []
        for each, norm in ((q, mixer.q_norm), (k, mixer.k_norm)):
            tokens = normed(each[..., part], norm).unbind(1)
            turned = [rotated(x, *place) if mixer.rope else x for x, place in zip(tokens, places, strict=True)]
            ready.append(torch.stack(turned, dim=1))
        scores = ready[0] @ ready[1].mT / d**0.5
        hidden = torch.tensor([[one != other for other in bins] for one in bins])
        heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[..., part])
    return linear(torch.cat(heads, dim=-1), mixer.out_proj)


@pytest.mark.parametrize("grid", [*GRIDS, (7, 5)])
@pytest.mark.parametrize("options", [{"qk_norm": True}, {"rope": True}, {"qk_norm": True, "rope": True}])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_queries_and_keys_by_their_definition(grid: tuple[int, int], options: dict[str, bool], kind: str) -> None:
    """Within shifted windows too: their turns differ from those by the place in the image, their scores do not."""
    x = torch.randn(2, grid[0] * grid[1], 16, dtype=torch.float64)
    windows = {"window": 4, "shift": 1, "relative_bias": False}
    for mixer in (Attention(16, 2, **options, block_norm=kind), Window(16, 2, **windows, **options, block_norm=kind)):
        randomised(mixer)
        torch.testing.assert_close(mixer(x, grid), literal_attention(mixer, x, grid), rtol=1e-10, atol=1e-10)


def test_scores_with_rope_depend_on_offsets_alone() -> None:
    """Also far out: the last of these places are beyond the integers that bf16 can tell apart."""
    q, k = torch.randn(2, 8, dtype=torch.float64).unbind()
    angles = grid_angles((301, 3), 8, q).view(301, 3, 4)

    def turned(x: Tensor, place: tuple[int, int]) -> Tensor:
        pairs = torch.view_as_complex(x.view(-1, 2)) * torch.polar(torch.ones(4, dtype=x.dtype), angles[place])
        return torch.view_as_real(pairs).flatten()

    for row in (1, 300):
        near = turned(q, (row, 2)) @ turned(k, (row - 1, 0))
        torch.testing.assert_close(near, turned(q, (1, 2)) @ turned(k, (0, 0)))
    torch.testing.assert_close(angles[300, 2], torch.tensor([300.0, 3.0, 2.0, 0.02], dtype=torch.float64))


def test_rms_norm_by_its_definition_and_in_fp32() -> None:
    norm, x = block_norm("rms", 32), 1e3 + torch.randn(4, 32)
    assert norm.weight.equal(torch.ones(32))
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 1, 32))
    exact = normed(x.double(), copy.deepcopy(norm).double())
    for model, given, rtol in ((copy.deepcopy(norm), x, 1e-6), (norm.bfloat16(), x.bfloat16(), 2e-2)):
        with torch.autocast("cpu", torch.bfloat16):
            found = model(given)
        assert found.dtype == given.dtype  # squares of 1000 are summed in fp32: bf16 would lose them
        torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=rtol)
    assert [head_norm(kind, 8).eps for kind in ("rms", "layer")] == [1e-6, 1e-5]


def test_swiglu_by_its_definition_and_initialised_as_one_matrix() -> None:
    mlp = randomised(SwiGLU(8, 12))
    w1, w2 = mlp.w12.weight.chunk(2)
    b1, b2 = mlp.w12.bias.chunk(2)
    x = torch.randn(3, 8, dtype=torch.float64)
    gate = x @ w1.T + b1
    expected = (gate / (1 + (-gate).exp()) * (x @ w2.T + b2)) @ mlp.w3.weight.T + mlp.w3.bias
    torch.testing.assert_close(mlp(x), expected)
    assert mlp.w3.in_features == 8
    w12 = model_with("SiT-S/2", random=False, hidden_size=64, mlp="swiglu").blocks[1].mlp.w12
    assert not w12.bias.any()
    limit = (6 / (64 + 2 * 170)) ** 0.5  # Xavier: of the matrix (340, 64); one of its halves would have a larger one
    assert 0.98 * limit < w12.weight.abs().max() <= limit


@pytest.mark.parametrize(("size", "inner"), [("S", 1024), ("B", 2048), ("L", 2730), ("XL", 3072)])
def test_widths_and_numbers_of_parameters(size: str, inner: int) -> None:
    with torch.device("meta"):
        plain, gated, all_ = (create_model(f"SiT-{size}/2", **options) for options in ({}, {"mlp": "swiglu"}, ALL))
    C, depth, d = plain.config.hidden_size, plain.config.depth, plain.config.hidden_size // plain.config.num_heads
    assert gated.blocks[0].mlp.w3.in_features == inner
    mlps = [sum(p.numel() for p in model.blocks[0].mlp.parameters()) for model in (plain, gated)]
    assert abs(mlps[1] / mlps[0] - 1) < 5e-4
    norms = (2 * depth + 1) * C + depth * 2 * d
    assert all_.num_parameters() == gated.num_parameters() + norms


@pytest.mark.parametrize("name", ["SiT-S/2", "SiT-Window-S/2", "SiT-Hybrid-S/2"])
def test_all_other_weights_and_the_names_of_them_stay(name: str, tmp_path: Path) -> None:
    plain = model_with(name, random=False)
    for options in ({"mlp": "swiglu"}, {"norm": "rms"}, {"qk_norm": True}, {"rope": True}, ALL):
        states = [model.state_dict() for model in (plain, model_with(name, random=False, **options))]
        shared = states[0].keys() & states[1].keys()
        assert all(states[0][key].equal(states[1][key]) for key in shared)
        assert all(".mlp." in key for key in states[0].keys() - shared)
        assert all(".mlp.w" in key or "norm" in key for key in states[1].keys() - shared)


def test_off_is_todays_model_and_its_files() -> None:
    off = model_with(random=False, norm="layer", mlp="gelu", qk_norm=False, rope=False)
    today = model_with(random=False)
    assert off.to_json_string() == today.to_json_string()
    assert not {"norm", "mlp", "qk_norm", "rope"} & set(today.to_json_string().replace('"', " ").split())
    assert today.config.mixer_pattern == "hybrid"
    assert all(a.equal(b) for a, b in zip(off.state_dict().values(), today.state_dict().values(), strict=True))


@pytest.mark.parametrize("options", [{"norm": "rms"}, {"mlp": "swiglu"}, {"qk_norm": True}, {"rope": True}, ALL])
def test_each_changes_the_function_and_survives_a_file(options: dict[str, object], tmp_path: Path) -> None:
    model, (x, t, y) = model_with(**options), batch(height=12, width=4)  # a grid that it is not built for
    model.save_pretrained(tmp_path)
    for opened in (SiT.from_pretrained(tmp_path), load_model(tmp_path)):
        assert opened(x, t, y).equal(model(x, t, y))
    plain = model_with()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(plain(x, t, y), model(x, t, y), rtol=1e-2)


def test_in_bf16_and_under_autocast_it_stays_close() -> None:
    model, (x, t, y) = model_with(**ALL).eval(), batch(height=16)
    exact = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x, t, y)
    short = model.bfloat16()(x.bfloat16(), t, y)
    assert short.dtype == torch.bfloat16
    for found in (rounded, short):
        assert (found.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("what", ["mixers", "blocks"])
def test_recomputation_and_compilation_change_nothing(what: str) -> None:
    model, given = model_with("SiT-S/2", **ALL), batch()
    results = []
    for step in ("plain", "recomputed", "compiled"):
        if step == "recomputed":
            model.recompute(what)
        if step == "compiled":
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("aot_eager")
            model.compile_repeated_blocks(fullgraph=what == "mixers", backend=counter)
        velocity = model(*given)
        results.append([velocity, *torch.autograd.grad(velocity.square().sum(), list(model.parameters()))])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count >= 1


def test_the_operations_are_counted() -> None:
    for options in ({}, ALL):
        with torch.device("meta"):
            model = create_model("SiT-S/2", input_size=8, num_classes=0, **options)
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 4, 8, 8), torch.empty(1))
        assert forward_flops(model, (4, 8, 8)) == counter.get_total_flops()


def test_options_of_the_model_and_of_an_entry_meet() -> None:
    """The model's options are for the entries that do not set them; nothing happens to other mixers."""
    pattern = [
        "attention",
        {"name": "attention", "rope": False},
        {"parallel": ["atconv", {"name": "window", "window": 4}]},
        {"name": "linear", "qk_norm": True},
    ]
    model = model_with(mixer_pattern=pattern, depth=4, norm="rms", rope=True, qk_norm=True)
    plain, without, parallel, other = (block.mixer for block in model.blocks)
    window = parallel.mixers[1]
    assert [plain.rope, without.rope, window.rope] == [True, False, True]
    assert all(isinstance(mixer.q_norm, nn.RMSNorm) for mixer in (plain, without, window, other))
    assert (other.q_norm.weight.numel(), plain.q_norm.weight.numel()) == (16, 8)
    by_entry = model_with(mixer_pattern=[{"name": "attention", "qk_norm": True}])
    assert by_entry.config.mixer_pattern == model_with("SiT-S/2", qk_norm=True).config.mixer_pattern
    assert isinstance(by_entry.blocks[0].mixer.k_norm, nn.LayerNorm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "SiT-ATConv-S/2", "rope": True}, r"^rope is for .* attention and window, .* no mixer .* \(atconv\)"),
        ({"name": "SiT-Linear-S/2", "qk_norm": True}, r"in mixer_pattern: \[{name: linear, qk_norm: true}\]"),
        ({"name": "SiT-Strided-S/2", "rope": True}, "rope is for"),
        ({"mixer_pattern": [{"name": "window", "rope": False}], "rope": True}, "is on in no mixer"),
        ({"name": "SiT-S/2", "num_heads": 8, "rope": True}, "each of the 8 heads has 2 of 16 channels"),
        ({"name": "SiT-Window-S/2", "num_heads": 8, "rope": True}, "each of the 8 heads has 2 of 16 channels"),
        ({"norm": "rmsnorm"}, "Unknown norm 'rmsnorm': did you mean 'rms'"),
        ({"mlp": "glu"}, "Unknown MLP 'glu'"),
        ({"mlp": "swiglu", "mlp_ratio": 0.1}, "raise mlp_ratio"),
        ({"mixer_pattern": [{"name": "attention", "block_norm": "rms"}]}, "has no option 'block_norm'"),
        ({"mixer_pattern": [{"name": "attention", "num_heads": 4}]}, "has no option 'num_heads'"),
        ({"name": "SiT-S/2", "rope": "yes"}, "does not accept rope = 'yes'"),
    ],
)
def test_what_would_do_nothing_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_with(**options)

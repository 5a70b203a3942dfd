"""Recomputation in the backward pass: the same loss and gradients, alone and under wrappers, from less memory."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from sit_atconv import SiT, create_model
from sit_atconv.config import TrainingConfig, load_config
from sit_atconv.errors import InputError

FAMILIES = ["SiT-S/2", "SiT-ATConv-S/2"]
RECOMPUTED = ["mixers", "blocks"]


def tiny(name: str = "SiT-Hybrid-S/2", **overrides: object) -> SiT:
    options = {"hidden_size": 16, "depth": 3, "num_heads": 2, "input_size": 8, "num_classes": 5, **overrides}
    model = create_model(name, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def batch(B: int = 4, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, 4, side, side), torch.rand(B), torch.arange(B) % 5


def loss_and_gradients(model: nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    loss = call().square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("what", RECOMPUTED)
@pytest.mark.parametrize("autocast", [False, True])
def test_neither_loss_nor_gradients_change(what: str, autocast: bool) -> None:
    model, inputs = tiny(), batch()

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            return model(*inputs)

    plain = loss_and_gradients(model, call)
    model.recompute(what)
    for ours, theirs in zip(loss_and_gradients(model, call), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    model.recompute("none")
    calls = count_mixer_calls(model)
    loss_and_gradients(model, call)
    assert len(calls) == 3


def count_mixer_calls(model: SiT) -> list[None]:
    calls: list[None] = []
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda *_: calls.append(None))
    return calls


def test_diffusers_switch_stays_usable_and_adds_up() -> None:
    model, inputs = tiny(), batch()
    plain = loss_and_gradients(model, lambda: model(*inputs))
    model.recompute("mixers")
    model.enable_gradient_checkpointing()
    both = loss_and_gradients(model, lambda: model(*inputs))
    for ours, theirs in zip(both, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    model.recompute("none")
    assert not model.is_gradient_checkpointing


def test_mixers_run_plainly_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    model.recompute("mixers")
    monkeypatch.setattr("sit_atconv.models.block.checkpoint", None)
    with torch.no_grad():
        model(*batch())


def kept_numbers(model: SiT, inputs: tuple[Tensor, ...]) -> int:
    """How many numbers a forward pass keeps for the backward pass, each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*inputs)
    return sum(t.untyped_storage().nbytes() // t.element_size() for at, t in kept.items() if at not in parameters)


# Tokens (B, N, C) that a block keeps. MLP: x, its norm, the input, 4 + 4 hidden, the output. Mixers: x, its norm, the
# input; queries, keys, values and attention's output, or values and the convolution's output; the projected output.
# With "mixers", x and the projected output remain of these; with "blocks", x alone.
KEPT = {
    ("SiT-S/2", "none"): 8 + 12,
    ("SiT-S/2", "mixers"): 2 + 12,
    ("SiT-S/2", "blocks"): 1,
    ("SiT-ATConv-S/2", "none"): 6 + 12,
    ("SiT-ATConv-S/2", "mixers"): 2 + 12,
    ("SiT-ATConv-S/2", "blocks"): 1,
}


@pytest.mark.parametrize(("name", "what"), KEPT)
def test_what_a_block_keeps(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sit_atconv.ops.selection.FORCED", "folded")
    B, side, C = 2, 32, 64
    inputs = batch(B, side)
    kept = []
    for depth in (2, 4):
        model = tiny(name, hidden_size=C, depth=depth, input_size=side)
        model.recompute(what)
        kept.append(kept_numbers(model, inputs))
    tokens = (kept[1] - kept[0]) / 2 / (B * (side // 2) ** 2 * C)
    assert tokens == pytest.approx(KEPT[name, what], rel=0.03)  # besides: statistics, kernels, modulation


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_blocks_recompute_too(name: str) -> None:
    x, t, y = batch(2, 32)
    model, inputs = tiny(name, hidden_size=64, input_size=32).double(), (x.double(), t.double(), y)
    plain = loss_and_gradients(model, lambda: model(*inputs))
    kept = []
    for what in ("none", "mixers"):
        torch._dynamo.reset()
        model.recompute(what)
        counter = CompileCounterWithBackend("aot_eager_decomp_partition")  # which decides what to keep as inductor does
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        for ours, theirs in zip(loss_and_gradients(model, lambda: model(*inputs)), plain, strict=True):
            assert (ours - theirs).norm() <= 1e-10 * theirs.norm()
        kept.append(kept_numbers(model, inputs))
        assert counter.frame_count == 1
    assert kept[1] <= 0.75 * kept[0]


@pytest.mark.parametrize("what", RECOMPUTED)
def test_a_static_graph_of_several_processes(what: str, tmp_path: Path) -> None:
    model, inputs = tiny(), batch()
    plain = loss_and_gradients(model, lambda: model(*inputs))
    model.recompute(what)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, static_graph=True)
        for _ in range(3):  # the first step records the graph, the second uses it
            for ours, theirs in zip(loss_and_gradients(wrapped, lambda: wrapped(*inputs)), plain, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("written", "meant"), [("true", "blocks"), ("false", "none"), ("mixers", "mixers")])
def test_earlier_files_said_it_with_a_boolean(written: str, meant: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"training:\n  gradient_checkpointing: {written}\n")
    config = load_config(tmp_path / "config.yaml")
    assert config.training.gradient_checkpointing == meant
    assert f"gradient_checkpointing: {meant}\n" in config.to_yaml()
    assert config == load_config(tmp_path / "config.yaml", ["--training.gradient_checkpointing", written])


def test_what_cannot_be_recomputed_is_named(tmp_path: Path) -> None:
    assert TrainingConfig().gradient_checkpointing == "none"
    with pytest.raises(InputError, match=r"'mixer'.*did you mean 'mixers'"):
        tiny().recompute("mixer")
    (tmp_path / "config.yaml").write_text("training:\n  gradient_checkpointing: mixer\n")
    with pytest.raises(InputError, match="'mixers'"):
        load_config(tmp_path / "config.yaml")

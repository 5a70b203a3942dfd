"""How often the repeated block is compiled: once for each kind of it, and again for sizes of a new kind."""

from dataclasses import replace

import pytest
import torch
from sampling_fixtures import images_of, require_same_images, tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sit_atconv import SiT, create_model
from sit_atconv.sampling import SamplerSettings

KINDS = 2  # of blocks in a hybrid


def compiled(model: SiT, backend: str, dynamic: bool | None = None) -> CompileCounterWithBackend:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    model.compile_repeated_blocks(fullgraph=True, backend=counter, dynamic=dynamic)
    return counter


@pytest.mark.parametrize(("name", "kinds"), [("SiT-S/2", 1), ("SiT-ATConv-S/2", 1), ("SiT-Hybrid-S/2", KINDS)])
def test_each_kind_of_block_is_compiled_for_the_first_batch_size_and_for_any(name: str, kinds: int) -> None:
    model = create_model(name, input_size=8, hidden_size=16, depth=4, num_heads=2, num_classes=5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    batches = [(torch.randn(B, 4, 8, 8), torch.rand(B), torch.arange(B) % 5) for B in (4, 3, 6, 2, 9)]
    with torch.no_grad():
        expected = [model(*batch) for batch in batches]
        counter = compiled(model, "eager")
        for batch, velocity in zip(batches, expected, strict=True):
            torch.testing.assert_close(model(*batch), velocity, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2 * kinds


@pytest.mark.parametrize("autocast", [False, True])
def test_training_compiles_each_kind_of_block_once(autocast: bool) -> None:
    model = tiny_model()
    counter, optimizer = compiled(model, "aot_eager"), torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        x, t, y = torch.randn(5, 1, 8, 6), torch.rand(5), torch.randint(0, 4, (5,))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            velocity, tokens = model.forward_intermediates(x, t, y, blocks=[1])
        (velocity.float().square().mean() + tokens[1].float().square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == KINDS


@pytest.mark.parametrize(
    ("dynamic", "programs"),
    [(None, 3), (True, 1)],  # by default the first batch has a program, then any batch, then any number of labels
)
def test_sampling_compiles_for_new_kinds_of_sizes_alone(dynamic: bool | None, programs: int) -> None:
    """Batches of 5 and 2 samples with and without guidance, which doubles them, and with 3 or 2 labels."""
    settings = SamplerSettings(solver="euler", steps=4, guidance=2.0, interval=(0.0, 0.6))
    model = tiny_model()
    expected = images_of(model, range(12), settings, batch_size=5)
    counter = compiled(model, "eager", dynamic)
    require_same_images(images_of(model, range(12), settings, batch_size=5), expected)
    assert counter.frame_count == KINDS * programs
    images_of(model, range(14), settings, batch_size=6)
    images_of(model, range(6), settings, batch_size=3, labels="1")
    assert counter.frame_count == KINDS * programs


def test_a_setting_compiles_what_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")  # in the place of a compiler, which takes a minute
    original = SiT.compile_repeated_blocks
    monkeypatch.setattr(
        SiT, "compile_repeated_blocks", lambda model, **given: original(model, backend=counter, **given)
    )
    settings = SamplerSettings(solver="euler", steps=2, guidance=2.0)
    expected = images_of(tiny_model(), range(7), settings, batch_size=4, weak=tiny_model())
    assert counter.frame_count == 0
    compiling = replace(settings, compile=True)
    images = images_of(tiny_model(), range(7), compiling, batch_size=4, weak=tiny_model())
    require_same_images(images, expected)
    assert counter.frame_count == KINDS  # one program for model and weak model, and for both batches

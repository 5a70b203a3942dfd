"""What benchmarks.memory counts, against closed forms and against a real step."""

import pytest
import torch
from fake_gpu import needs_fake_gpu
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import activation_bytes, fake_gpu, inputs, kept_bytes
from sit_atconv import create_model
from sit_atconv.models.sit import RECOMPUTED

TINY = {"hidden_size": 128, "depth": 3, "num_heads": 2, "num_classes": 1000}


def test_each_storage_is_counted_once_and_weights_are_not() -> None:
    """Two Linears on one input and a product: the input once, both factors, no weights."""
    x = torch.randn(8, 4)
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    kept = kept_bytes(lambda: model[0](x) * model[1](x[:]), model)
    assert kept == 3 * x.nbytes


@pytest.mark.parametrize("mixer", ["attention", "atconv"])
@pytest.mark.parametrize("what", RECOMPUTED)
def test_the_count_without_numbers_is_that_of_a_real_step(mixer: str, what: str) -> None:
    def count() -> int:
        model = create_model("SiT-S/2", hidden_size=32, depth=3, num_heads=2, mixer_pattern=mixer)
        model.recompute(what)
        return kept_bytes(lambda: model(*inputs(model, 2, 8)), model)

    with FakeTensorMode():
        fake = count()
    assert fake == count() > 0


@needs_fake_gpu
@pytest.mark.parametrize("family", ["SiT", "SiT-ATConv"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_activations_are_linear_in_tokens_and_shrink_by_checkpointing(family: str, precision: str) -> None:
    """A count that held N×N scores would grow sixteenfold."""
    small, large = (activation_bytes(f"{family}-S/2", side, precision, **TINY) for side in (16, 32))
    for what in RECOMPUTED:
        assert large[what] / small[what] == pytest.approx(4, rel=0.05)
    assert large["blocks"] < large["mixers"] < large["none"]
    # Once for all images: matrices in bf16, but for those that no gradient passes through
    ends = ("label_embed.weight", "patch_embed.weight", "time_embed.0.weight")
    named = create_model(f"{family}-S/2", **TINY).named_parameters()
    matrices = sum(p.numel() for name, p in named if p.ndim == 2 and name not in ends)
    assert large["once"] == pytest.approx(2 * matrices if precision == "bf16" else 0, rel=0.01, abs=4e4)


def test_the_fake_gpu_leaves_no_trace() -> None:
    with fake_gpu("bf16"):
        assert torch.ones(1).is_cuda
        assert torch.is_autocast_enabled("cuda")
    assert not torch.is_autocast_enabled("cuda")
    assert torch.ones(1).device.type == "cpu"

"""The transcribed training steps of SiT and REPA against the trainer's: the same losses, weights and averages."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_runs import fresh_accelerate

from benchmarks.baselines import ReleasedSiT, alignment_by_samples
from benchmarks.training import SETTINGS, configuration, contenders, write_data
from sit_atconv import create_model
from sit_atconv.flow import alignment_loss

TINY = {"hidden_size": 16, "depth": 2, "num_heads": 2}
OPTIONS = Namespace(batch_size=3, precision="no", compile=False, teacher="test_vit")
STEPS = 4


def random_model(name: str, **options: object) -> nn.Module:
    """Narrow, and random where a fresh model is zero."""
    torch.manual_seed(1)
    model = create_model(name, input_size=8, **TINY, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("family", ["SiT", "SiT-Hybrid", "SiT-ATConv"])
def test_the_original_networks_compute_the_same(family: str) -> None:
    model = random_model(f"{family}-S/2").double()
    x, t, y = torch.randn(3, 4, 8, 8).double(), torch.rand(3).double(), torch.tensor([1, 1000, 7])
    theirs, projected = ReleasedSiT(model)(x, t.float(), y)
    assert projected == []
    torch.testing.assert_close(theirs, model(x, t.float(), y), rtol=1e-10, atol=1e-10)


def test_the_loop_over_samples_is_the_alignment_loss() -> None:
    projected, targets = torch.randn(2, 3, 5, 4).unbind(), torch.randn(2, 3, 5, 4).unbind()
    expected = torch.stack([alignment_loss(p, t).mean() for p, t in zip(projected, targets, strict=True)]).mean()
    torch.testing.assert_close(alignment_by_samples(projected, targets), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_original_steps_train_the_same(setting: str, tmp_path: Path) -> None:
    """A learning rate and a decay at which four steps move weights and averages far beyond the tolerance."""
    write_data(tmp_path, OPTIONS.batch_size, 8, OPTIONS.teacher)
    random_model("SiT-Hybrid-S/2").save_pretrained(tmp_path / "start")
    config = configuration("SiT-Hybrid-S/2", setting, tmp_path, OPTIONS)
    config = replace(
        config,
        model=replace(config.model, init_from=str(tmp_path / "start"), **TINY),
        alignment=config.alignment and replace(config.alignment, block=1, projector_width=16),
        optimizer=replace(config.optimizer, lr=1e-2),
        training=replace(config.training, ema_decay=0.9),
    )
    fresh_accelerate()
    _, found = contenders(config)
    ours, theirs = found.values()
    start = {name: p.detach().clone() for name, p in theirs.trained.named_parameters()}
    for _ in range(STEPS):
        expected = theirs.step()
        terms = {name: float(value) for name, value in ours.step().items() if name in expected}
        assert terms == pytest.approx(expected, rel=1e-5)

    weights = {name.removeprefix("model."): p for name, p in ours.trained.named_parameters()}
    assert weights.keys() == start.keys()
    for name, p in theirs.trained.named_parameters():
        torch.testing.assert_close(trained(weights[name], name), trained(p, name), rtol=1e-5, atol=1e-5)
        assert (p - start[name]).abs().max() > 1e-2
    averages = theirs.average()
    for name, average in ours.average().items():
        torch.testing.assert_close(trained(average, name), trained(averages[name], name), rtol=1e-5, atol=1e-5)
        assert (average - start[name]).abs().max() > 1e-3


def trained(p: Tensor, name: str) -> Tensor:
    """Without attention's bias of the keys: softmax does not see it, and Adam takes steps along rounding errors."""
    if not name.endswith("qkv.bias"):
        return p
    queries, _, values = p.chunk(3)
    return torch.cat([queries, values])

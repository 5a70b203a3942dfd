"""The dispersive loss (arXiv 2506.09027): its definition, groups that no split changes, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from stopped_runs import require_same_when_stopped, terms
from torch import nn
from training_runs import NO_PREVIEW, run_tiny

from sit_atconv.alignment import dispersive_loss
from sit_atconv.config import AlignmentConfig, FlowConfig, TeacherConfig
from sit_atconv.errors import InputError
from sit_atconv.models import create_model
from sit_atconv.training.session.objective import Objective, draw

DISPERSED = "--flow.dispersion 0.5 --flow.dispersion_group 4"


def literally(tokens: torch.Tensor, group: int, tau: float) -> float:
    """log mean over all pairs of exp(−|hᵢ − hⱼ|²/(Dτ)), averaged over groups, in Python's floats."""
    losses = []
    for first in range(0, len(tokens), group):
        h = tokens[first : first + group].double().flatten(1)
        pairs = [math.exp(-float((a - b).square().sum()) / (h.shape[1] * tau)) for a in h for b in h]
        losses.append(math.log(sum(pairs) / len(pairs)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("group", "tau"), [(2, 0.5), (3, 1.0), (6, 0.1)])
def test_it_is_the_log_of_the_mean_over_all_pairs_with_the_diagonal(group: int, tau: float) -> None:
    tokens = torch.randn(6, 4, 5)
    assert dispersive_loss(tokens, group, tau).item() == pytest.approx(literally(tokens, group, tau), rel=1e-5)


def test_known_values_and_the_gradient_drives_apart() -> None:
    assert dispersive_loss(torch.ones(4, 2, 3), 4, 0.5).item() == 0.0  # all the same: log 1
    far = torch.diag(torch.full((4,), 1e3)).unsqueeze(1)
    assert dispersive_loss(far, 4, 0.5).item() == pytest.approx(-math.log(4))  # only the diagonal is left
    pair = torch.tensor([[[0.0]], [[1.0]]], requires_grad=True)  # log((1 + exp(−d²/τ))/2), D = 1
    dispersive_loss(pair, 2, 0.5).backward()
    slope = -4 * math.exp(-2) / (1 + math.exp(-2))  # by the distance
    torch.testing.assert_close(pair.grad.flatten(), torch.tensor([-slope, slope]))


def test_tokens_with_a_large_common_part_keep_their_digits_also_under_autocast() -> None:
    tokens = torch.randn(4, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = dispersive_loss(tokens + 1000, 4, 0.5)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(literally(tokens, 4, 0.5), rel=1e-3)
    half = dispersive_loss(tokens.bfloat16(), 4, 0.5)
    assert half.item() == pytest.approx(literally(tokens.bfloat16(), 4, 0.5), rel=1e-5)


def test_the_objective_adds_it_at_its_block_beside_the_alignment() -> None:
    model = create_model("SiT-S/2", input_size=4, num_classes=2, hidden_size=16, depth=3, num_heads=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    alignment = AlignmentConfig(block=2, projector_width=8, teachers=[TeacherConfig()])
    latents, labels, targets = torch.randn(4, 4, 4, 4), torch.tensor([0, 1, 1, 0]), [torch.randn(4, 4, 6)]
    for block, expected in ((None, 1), (2, 2), (3, 3)):  # a quarter of three blocks is the first
        flow = FlowConfig(label_dropout=0.0, dispersion=0.3, dispersion_block=block, dispersion_group=2)
        draws = draw(torch.arange(4), (4, 4, 4), flow, seed=0)
        found = Objective(model, flow, alignment, (6,))(latents, labels, draws, targets)
        time = draws.times.view(4, 1, 1, 1)
        x_t = (1 - time) * latents + time * draws.noise
        tokens = model.forward_intermediates(x_t, draws.times, labels, [expected])[1][expected]
        assert found["dispersion"].item() == pytest.approx(literally(tokens.detach(), 2, 0.5), rel=1e-4)
        total = found["flow"] + 0.5 * found["alignment"] + 0.3 * found["dispersion"]
        torch.testing.assert_close(found["loss"].detach(), total)


def test_a_quarter_of_the_depth_is_the_papers_block() -> None:
    for depth, block in ((2, 1), (12, 3), (28, 7)):
        model = create_model("SiT-S/2", input_size=4, num_classes=0, hidden_size=8, depth=depth, num_heads=2)
        assert Objective(model, FlowConfig(dispersion=0.5), None)._dispersed == block


def test_a_stopped_run_in_bf16_by_micro_batches_continues_to_the_last_bit(tmp_path: Path, monkeypatch) -> None:
    lines = require_same_when_stopped(
        tmp_path, monkeypatch, f"{DISPERSED} --training.accumulation 2 --training.precision bf16"
    )
    for line in lines:
        assert line["loss"] == pytest.approx(line["flow"] + 0.5 * line["dispersion"], rel=1e-6)
        assert -math.log(4) <= line["dispersion"] < 0


def test_micro_batches_of_whole_groups_change_only_rounding(tmp_path: Path) -> None:
    for name, accumulation in (("full", 1), ("parts", 2)):
        extra = f"{NO_PREVIEW} --training.steps 3 {DISPERSED} --training.accumulation {accumulation}"
        run_tiny(tmp_path / name, extra)
    for full, parts in zip(terms(tmp_path / "full"), terms(tmp_path / "parts"), strict=True):
        for key in ("loss", "flow", "dispersion", "grad_norm"):
            assert full[key] == pytest.approx(parts[key], rel=1e-4)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--flow.dispersion 0.5", "groups of 32 samples, into which the 8 of a micro-batch"),
        (f"{DISPERSED} --training.accumulation 4", "into which the 2 of a micro-batch"),
        ("--flow.dispersion 0.5 --flow.dispersion_group 1", "2 at least"),
        ("--flow.dispersion_tau 1.0", "flow.dispersion_tau would do nothing"),
        ("--flow.dispersion_block 1", "flow.dispersion_block would do nothing"),
        (f"{DISPERSED} --flow.dispersion_block 3", "the model has 2 blocks"),
    ],
)
def test_what_does_nothing_or_does_not_divide_is_refused_before_anything_is_written(
    extra: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run_tiny(tmp_path / "run", extra)
    assert not (tmp_path / "run").exists()

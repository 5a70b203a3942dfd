"""Mean and standard deviation of logit-normal times, and LightningDiT's cosine term."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_runs import NO_PREVIEW, assert_same_checkpoint, losses, number_lines, run_tiny

from sit_atconv.config import FlowConfig
from sit_atconv.data.prepare.__main__ import main as prepare
from sit_atconv.errors import InputError
from sit_atconv.flow import VP, Cosine, Linear, direction_loss, times_from_uniform
from sit_atconv.flow.losses import SHORTEST
from sit_atconv.models import SiT, create_model
from sit_atconv.training.session.objective import Objective, draw
from sit_atconv.training.trainer import Trainer

BLOCKS = "--model.norm rms --model.mlp swiglu --model.qk_norm true --model.rope true"
TIMES = "--flow.times logit-normal --flow.times_mean -0.4 --flow.times_std 1.4"


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.4, 1.0), (1.2, 0.5)])
def test_times_are_logit_normal_with_this_mean_and_deviation(mean: float, std: float) -> None:
    """The share of times below t is Φ((logit t − m)/s); for the cosine path, log tan(πt/2) is the logit."""
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    for path, odds in ((Linear(), lambda t: t / (1 - t)), (Cosine(), lambda t: math.tan(math.pi / 2 * t))):
        times = times_from_uniform(u, "logit-normal", path, mean=mean, std=std)
        for t in (0.1, 0.4, 0.5, 0.8):
            share = 0.5 * math.erfc(-(math.log(odds(t)) - mean) / std / math.sqrt(2))
            assert (times < t).double().mean().item() == pytest.approx(share, abs=2e-4)
    assert times_from_uniform(torch.zeros(1), "logit-normal", mean=mean, std=std).item() == 0


def test_a_shift_is_a_mean_and_one_is_none() -> None:
    u = torch.rand(1000, dtype=torch.float64)
    shifted = times_from_uniform(u, "logit-normal", shift=2.5, std=0.7)
    torch.testing.assert_close(shifted, times_from_uniform(u, "logit-normal", mean=math.log(2.5), std=0.7))
    assert times_from_uniform(u, "logit-normal").equal(torch.sigmoid(torch.special.ndtri(u)))
    cosine = times_from_uniform(u, "logit-normal", Cosine())
    assert cosine.equal(torch.atan(torch.special.ndtri(u).exp()) * 2 / torch.pi)


def test_the_mean_of_a_run_moves_its_times() -> None:
    normal = FlowConfig(times="logit-normal")
    before, after = (
        draw(torch.arange(50), (2, 4, 4), config, seed=3)
        for config in (normal, replace(normal, times_mean=-1.0, times_std=0.5))
    )
    torch.testing.assert_close(after.times.logit(), 0.5 * before.times.logit() - 1, rtol=1e-4, atol=1e-4)
    assert after.noise.equal(before.noise) and after.dropout.equal(before.dropout)


def one_minus_cosine(predicted: Tensor, target: Tensor) -> Tensor:
    """Position by position."""
    B, _, H, W = predicted.shape
    total = torch.zeros(B, dtype=predicted.dtype)
    for i in range(H):
        for j in range(W):
            a, b = predicted[:, :, i, j], target[:, :, i, j]
            total += 1 - (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
    return total / (H * W)


@pytest.mark.parametrize("path", [Linear(), Cosine(), VP()])
def test_the_cosine_term_by_its_definition(path) -> None:
    x, noise, predicted = torch.randn(3, 4, 5, 3, 2, dtype=torch.float64).unbind()
    t = torch.rand(4, dtype=torch.float64) * 0.8 + 0.1
    target = torch.stack([path.velocity(x[i : i + 1], noise[i : i + 1], t[i : i + 1])[0] for i in range(4)])
    found = direction_loss(predicted, x, noise, t, path)
    torch.testing.assert_close(found, one_minus_cosine(predicted, target))
    torch.testing.assert_close(direction_loss(7 * target, x, noise, t, path), torch.zeros(4).double())
    torch.testing.assert_close(direction_loss(-target, x, noise, t, path), torch.full((4,), 2.0).double())


def test_the_cosine_term_has_bounded_slopes_and_is_in_fp32() -> None:
    x, noise, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.rand(2)
    predicted = torch.zeros(2, 4, 3, 3, requires_grad=True)
    loss = direction_loss(predicted, x, noise, t)
    torch.testing.assert_close(loss, torch.ones(2))
    (slope,) = torch.autograd.grad(loss.sum(), predicted)
    torch.testing.assert_close(9 * slope.norm(dim=1), torch.full((2, 3, 3), 1 / SHORTEST))
    rounded = torch.randn(2, 4, 3, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = direction_loss(rounded, x, noise, t)
    assert found.dtype == torch.float32 and found.equal(direction_loss(rounded.float(), x, noise, t))


def objective(flow: FlowConfig, channels: int = 3) -> Objective:
    torch.manual_seed(0)
    model = create_model("SiT-S/2", 4, channels, 0, hidden_size=16, depth=1, num_heads=2, prediction=flow.prediction)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Objective(model, flow, None)


def test_the_loss_is_the_sum_and_the_log_shows_both_terms() -> None:
    latents = torch.randn(6, 3, 4, 4)
    draws = draw(torch.arange(6), (3, 4, 4), FlowConfig(), seed=0)
    plain, weighted = (objective(FlowConfig(cosine=weight)) for weight in (0.0, 0.7))
    terms = [each(latents, torch.zeros(6).long(), draws, None) for each in (plain, weighted)]
    assert list(terms[0]) == ["loss", "flow"] and list(terms[1]) == ["loss", "flow", "cosine"]
    assert terms[0]["flow"].equal(terms[1]["flow"]) and terms[0]["loss"].equal(terms[0]["flow"])
    path = Linear()
    predicted = plain.model(path.interpolate(latents, draws.noise, draws.times), draws.times)
    expected = one_minus_cosine(predicted, path.velocity(latents, draws.noise, draws.times)).mean()
    torch.testing.assert_close(terms[1]["cosine"], expected.detach())
    torch.testing.assert_close(terms[1]["loss"], terms[1]["flow"] + 0.7 * expected)


@pytest.mark.parametrize(
    ("flow", "channels", "message"),
    [
        (FlowConfig(cosine=1.0), 1, "these data have only one"),
        (FlowConfig(cosine=1.0, prediction="data"), 3, "predicts data: set flow.cosine to 0"),
        (FlowConfig(times_mean=-0.4), 3, "times are uniform: set flow.times to logit-normal"),
        (FlowConfig(times_std=2.0), 3, "times_mean = 0 and times_std = 2"),
    ],
)
def test_what_would_do_nothing_is_refused(flow: FlowConfig, channels: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        objective(flow, channels)
    with pytest.raises(InputError, match="must be positive"):
        times_from_uniform(torch.rand(3), "logit-normal", std=0.0)


def stopped_in_step(monkeypatch: pytest.MonkeyPatch, run: Path, number: int, extra: str) -> None:
    original = Trainer.step

    def step(self: Trainer) -> None:
        if self.position.step == number - 1:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(run, extra)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits in three channels, whose velocities have directions, as words of train.py."""
    out = tmp_path_factory.mktemp("coloured") / "data"
    prepare(["digits:train@8", str(out), "--resolution", "8", "--vae", "identity", "--workers", "0"])
    return f"{NO_PREVIEW} {BLOCKS} {TIMES} --data.path {out} --flow.cosine 0.5"


def test_a_run_with_all_of_it_resumes_to_the_last_bit(tmp_path: Path, monkeypatch, coloured: str) -> None:
    extra = f"{coloured} --training.precision bf16 --training.gradient_checkpointing mixers"
    run_tiny(tmp_path / "whole", extra)
    assert all(0 < line["cosine"] < 2 for line in number_lines(tmp_path / "whole"))
    stopped_in_step(monkeypatch, tmp_path / "parts", 5, extra)
    run_tiny(tmp_path / "parts", extra)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    cosines = [[line["cosine"] for line in number_lines(tmp_path / run)] for run in ("parts", "whole")]
    assert cosines[0] == cosines[1]
    assert_same_checkpoint(*(tmp_path / run / "checkpoints" / "latest" for run in ("parts", "whole")))
    model = SiT.from_pretrained(tmp_path / "whole" / "checkpoints" / "latest" / "model")
    assert (model.config.norm, model.config.mlp) == ("rms", "swiglu")
    assert model.config.mixer_pattern == [{"name": "attention", "qk_norm": True, "rope": True}, "atconv"]
    with pytest.raises(InputError, match=r"begun with another configuration .*model.norm: rms -> layer"):
        run_tiny(tmp_path / "whole", extra.replace("--model.norm rms", ""))
    data, plain = (
        coloured.split("--data.path ")[1].split()[0],
        f"--model.init_from {tmp_path}/whole/checkpoints/latest/model",
    )
    with pytest.raises(InputError, match=r"norm: rms there, layer here; mlp: swiglu there, gelu here; mixer_pattern"):
        run_tiny(tmp_path / "tuned", f"{plain} --data.path {data}")
    assert not (tmp_path / "tuned").exists()


def test_micro_batches_make_the_same_steps(tmp_path: Path, coloured: str) -> None:
    for run, micro_batches in (("whole", 1), ("parts", 4)):
        run_tiny(tmp_path / run, f"{coloured} --training.steps 3 --training.accumulation {micro_batches}")
    for whole, parts in zip(number_lines(tmp_path / "whole"), number_lines(tmp_path / "parts"), strict=True):
        for name in ("loss", "flow", "cosine", "grad_norm"):
            assert parts[name] == pytest.approx(whole[name], rel=1e-5)


def test_off_writes_todays_files(tmp_path: Path) -> None:
    off = "--model.norm layer --model.qk_norm false --flow.times_mean 0 --flow.times_std 1.0 --flow.cosine 0"
    run_tiny(tmp_path / "off", f"{NO_PREVIEW} --training.steps 3 {off}")
    run_tiny(tmp_path / "today", f"{NO_PREVIEW} --training.steps 3")
    for file in ("config.yaml", "checkpoints/latest/model/config.json"):
        assert (tmp_path / "off" / file).read_bytes() == (tmp_path / "today" / file).read_bytes()
    assert_same_checkpoint(*(tmp_path / run / "checkpoints" / "latest" for run in ("off", "today")))

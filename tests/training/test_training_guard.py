"""Losses and gradients that are not finite: skipped without a trace, counted, and too many in a row stop the run."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from training_runs import (
    NO_PREVIEW,
    assert_same_checkpoint,
    checkpoint_tensors,
    fresh_accelerate,
    losses,
    number_lines,
    run_tiny,
)

from sit_atconv.config import Config, TrainingConfig
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.sampler import index_at
from sit_atconv.training import loop, trainer
from sit_atconv.training.run.guard import Guard, poisoned, step_unless_bad
from sit_atconv.training.run.integrity import read_position
from sit_atconv.training.run.stop import TrainingStopped
from sit_atconv.training.session import session as session_module


def spoil(monkeypatch: pytest.MonkeyPatch, what: str, steps: set[int]) -> None:
    """Make the latents or, after a finite loss, one gradient of these steps (1, 2, …) infinite or NaN."""
    prepare, accumulate = trainer.prepare_inputs, loop.poisoned

    def prepared(session, batch):
        spoilt.now = int(batch["position"].min()) // session.config.training.batch_size + 1 in steps
        latents, *others = prepare(session, batch)
        return (latents * torch.inf if spoilt.now and what == "loss" else latents, *others)

    def loss(value: torch.Tensor) -> torch.Tensor:
        if spoilt.now and what == "gradient":
            value.register_hook(lambda gradient: gradient * torch.nan)
        return accumulate(value)

    def spoilt() -> None: ...

    monkeypatch.setattr(trainer, "prepare_inputs", prepared)
    monkeypatch.setattr(loop, "poisoned", loss)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_bad_step_leaves_weights_optimizer_and_averages_alone(tmp_path: Path, monkeypatch, what, accumulation):
    extra = f"--training.accumulation {accumulation} --training.power_ema [0.1] {NO_PREVIEW} --log.checkpoint_every 1"
    with monkeypatch.context() as patched:
        spoil(patched, what, {3, 4})
        run_tiny(tmp_path / "run", f"{extra} --log.keep null --log.every 2")
    checkpoints = tmp_path / "run" / "checkpoints"
    for later in ("step-0000003", "step-0000004"):
        assert_same_checkpoint(checkpoints / "step-0000002", checkpoints / later)
    after, before = (checkpoint_tensors(checkpoints / f"step-000000{step}") for step in (5, 4))
    assert not any(torch.equal(after[name], before[name]) for name in after if "proj.weight" in name)
    assert [line[6] for line in losses(tmp_path / "run")] == [0, 2, 2]
    assert [line[1] is None for line in losses(tmp_path / "run")] == [False, True, False]


def test_a_skipped_step_is_left_out_of_the_logged_means(tmp_path: Path, monkeypatch) -> None:
    run_tiny(tmp_path / "plain", f"--training.steps 2 {NO_PREVIEW}")
    spoil(monkeypatch, "loss", {2})
    run_tiny(tmp_path / "run", f"--training.steps 2 --log.every 2 {NO_PREVIEW}")
    assert losses(tmp_path / "run")[0][1] == losses(tmp_path / "plain")[0][1]


def test_too_many_in_a_row_stop_the_run_with_a_file_that_names_them(tmp_path: Path, monkeypatch) -> None:
    run, extra = tmp_path / "run", f"--training.max_bad_steps 2 --log.checkpoint_every 1 {NO_PREVIEW}"
    with monkeypatch.context() as patched:
        spoil(patched, "loss", {1, 3, 4, 5})
        with pytest.raises(TrainingStopped, match=r"2 steps in a row .*not-finite-step-0000004\.json"):
            run_tiny(run, extra)
    length = len(open_dataset("digits:train@8"))
    report = json.loads((run / "not-finite-step-0000004.json").read_text())
    assert [entry["step"] for entry in report] == [3, 4]
    assert report[1]["samples"] == [index_at(position, length, 0) for position in range(24, 32)]
    assert report[0]["terms"][0]["loss"] in ("inf", "nan")
    assert [(line["step"], line["skipped"]) for line in number_lines(run)] == [(1, 1), (2, 1), (3, 2)]
    run_tiny(run, extra)  # with the fault gone, it goes on, and remembers
    assert losses(run)[-1][6] == 2


def test_bad_steps_in_a_row_are_counted_across_looks_and_restarts(tmp_path: Path) -> None:
    fresh_accelerate()
    guard, again = (Guard(3, lambda step: [step], tmp_path, Accelerator(cpu=True)) for _ in range(2))
    for step, finite in enumerate([False, True, False, True, True, False], start=1):
        guard.note(step, torch.tensor(finite), {"loss": torch.tensor(float(step))})
        assert guard.check() == (1, 1, 2, 2, 2, 3)[step - 1]
    again.restore(guard.state())
    again.note(7, torch.tensor(False), {"loss": torch.tensor(7.0)})
    assert again.check() == 4
    again.note(8, torch.tensor(False), {"loss": torch.tensor(torch.nan)})
    with pytest.raises(TrainingStopped, match="3 steps in a row"):
        again.check()
    report = json.loads((tmp_path / "not-finite-step-0000008.json").read_text())
    assert report == [
        {"step": 7, "terms": [{"loss": 7.0}], "samples": [7]},
        {"step": 8, "terms": [{"loss": "nan"}], "samples": [8]},
    ]


def test_the_poison_leaves_finite_losses_and_gradients_as_they_are() -> None:
    x = torch.tensor([1.3, -0.7], requires_grad=True)
    assert poisoned(x.square().sum()).item() == x.square().sum().item()
    (gradient,) = torch.autograd.grad(poisoned(x.square().sum()), x)
    assert torch.equal(gradient, 2 * x.detach())
    y = torch.tensor([1e30], requires_grad=True)  # the loss overflows, its gradient would not
    (gradient,) = torch.autograd.grad(poisoned(y.square().sum()), y)
    assert gradient.isnan().all()


def test_the_fused_optimizer_skips_on_the_device() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for gradient, finite in ((1.0, True), (torch.nan, False), (1.0, True)):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), gradient)
        step_unless_bad(optimizer, torch.tensor(finite))
        optimizer.step()
        assert torch.equal(weight, before) != finite
    assert optimizer.state[weight]["step"] == 2


def test_fp16_with_its_loss_scaler_is_continued_exactly(tmp_path: Path, monkeypatch) -> None:
    """Accelerate has fp16 on GPUs only; torch has it on CPUs too. The scale overflows, grows, and overflows again."""
    original = session_module.build_accelerator

    def half(config: Config, run: Path) -> Accelerator:
        accelerator = original(dataclasses.replace(config, training=TrainingConfig(precision="no")), run)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        return accelerator

    monkeypatch.setattr(session_module, "build_accelerator", half)
    extra = f"--training.precision fp16 {NO_PREVIEW}"
    for steps in (5, 9):
        run_tiny(tmp_path / "parts", f"{extra} --training.steps {steps}")
    run_tiny(tmp_path / "whole", f"{extra} --training.steps 9")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    skipped = [line[6] for line in losses(tmp_path / "whole")]
    assert 1 <= skipped[0] < skipped[-1] < 9
    positions = [read_position(tmp_path / run / "checkpoints" / "latest") for run in ("parts", "whole")]
    assert positions[0]["scaler"] == positions[1]["scaler"]
    assert 1 < positions[0]["scaler"]["scale"] < 2.0**20

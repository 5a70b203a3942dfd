"""Training: exact continuation, what a run leaves behind, and what is refused before anything is written."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

import train as train_command
from sit_atconv import SiT
from sit_atconv.alignment.projector import Projector
from sit_atconv.config import (
    AlignmentConfig,
    Config,
    FlowConfig,
    OptimizerConfig,
    TeacherConfig,
    TrainingConfig,
    load_config,
)
from sit_atconv.errors import InputError
from sit_atconv.flow import alignment_loss
from sit_atconv.models import create_model
from sit_atconv.training import train, trainer
from sit_atconv.training.ema import Ema
from sit_atconv.training.objective import Objective, draw
from sit_atconv.training.throughput import training_flops
from sit_atconv.training.trainer import learning_rate

ROOT = Path(__file__).parents[1]
TINY = (
    "--model.name SiT-Hybrid-S/2 --model.hidden_size 16 --model.depth 2 --model.num_heads 2 --data.path digits:train@8 "
    "--training.steps 6 --training.batch_size 8 --log.every 1 --log.checkpoint_every 3 --preview.every 6 "
    "--preview.classes 2 --preview.per_class 2 --preview.steps 2 --optimizer.warmup_steps 4"
)
ALIGNED = '--alignment {"block":1,"projector_width":16,"teachers":[{"name":"test_vit","weights":"random"}]}'


def tiny_config(extra: str = "") -> Config:
    return load_config(ROOT / "configs" / "quickstart.yaml", f"{TINY} {extra}".split())


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def losses(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["flow"], line.get("alignment"), line["grad_norm"]) for line in lines]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    trained = load_file(checkpoint / "model.safetensors")
    averaged = load_file(checkpoint / "model" / "diffusion_pytorch_model.safetensors")
    return {**trained, **{f"ema.{name}": value for name, value in averaged.items()}}


def interrupt_after(monkeypatch, micro_batches: int) -> None:
    """Let training fail, as a kill would, after so many micro-batches."""
    original, count = trainer.train_micro_batch, 0

    def failing(*args: object) -> None:
        nonlocal count
        count += 1
        if count > micro_batches:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(trainer, "train_micro_batch", failing)


def test_a_run_leaves_what_the_design_says(tmp_path: Path) -> None:
    train(tiny_config(), tmp_path / "run")
    run = tmp_path / "run"
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml", "log.jsonl", "samples"]
    assert load_config(run / "config.yaml") == tiny_config()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-0000003", "step-0000006"]
    assert (run / "checkpoints" / "latest").resolve().name == "step-0000006"
    assert [p.name for p in (run / "samples").iterdir()] == ["step-0000006.png"]
    position = json.loads((run / "checkpoints" / "latest" / "position.json").read_text())
    assert (position["step"], position["images"]) == (6, 48)
    record = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert {"step", "images", "epoch", "loss", "flow", "grad_norm", "lr", "images_per_second", "mfu"} <= set(record)
    assert record["memory_gib"] > 0
    model = SiT.from_pretrained(run / "checkpoints" / "latest" / "model")
    assert model.config.num_classes == 10
    assert model.config.latents["autoencoder"] == "identity"
    assert model.config.class_names[3] == "3"


@pytest.mark.parametrize(
    "extra", ["", "--training.accumulation 2 --log.every 2", f"--training.precision bf16 {ALIGNED}"]
)
def test_interrupted_and_continued_equals_uninterrupted(tmp_path: Path, monkeypatch, extra: str) -> None:
    config = tiny_config(extra)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt_after(patched, micro_batches=4 * config.training.accumulation + config.training.accumulation // 2)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoints" / "latest").resolve().name == "step-0000003"
    train(config, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    ours, theirs = (weights(tmp_path / name / "checkpoints" / "latest") for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    optimizers = [
        torch.load(tmp_path / name / "checkpoints" / "latest" / "optimizer.bin", weights_only=True)["state"]
        for name in ("parts", "whole")
    ]
    assert all(torch.equal(optimizers[0][i][k], optimizers[1][i][k]) for i in optimizers[0] for k in optimizers[0][i])
    grids = [(tmp_path / name / "samples" / "step-0000006.png").read_bytes() for name in ("parts", "whole")]
    assert grids[0] == grids[1]


@pytest.mark.parametrize("extra", ["--training.accumulation 4", "--training.gradient_checkpointing true"])
def test_accumulation_and_checkpointing_leave_the_losses(tmp_path: Path, extra: str) -> None:
    train(tiny_config("--training.steps 3"), tmp_path / "plain")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    train(tiny_config(f"--training.steps 3 {extra}"), tmp_path / "other")
    for ours, theirs in zip(losses(tmp_path / "other"), losses(tmp_path / "plain"), strict=True):
        assert ours[1] == pytest.approx(theirs[1], rel=1e-6)
        assert ours[4] == pytest.approx(theirs[4], rel=1e-4)


def test_a_complete_run_is_left_alone(tmp_path: Path) -> None:
    config = tiny_config("--training.steps 1")
    train(config, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    train(config, tmp_path / "run")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_training_learns(tmp_path: Path) -> None:
    extra = "--training.steps 60 --log.every 10 --log.checkpoint_every 60 --preview.every null --optimizer.lr 0.01"
    train(tiny_config(f"{extra} --training.batch_size 16"), tmp_path / "run")
    history = [line[1] for line in losses(tmp_path / "run")]
    assert history[-1] < 0.7 * history[0]


def test_only_the_newest_checkpoints_are_kept_and_leftovers_go(tmp_path: Path, monkeypatch) -> None:
    config = tiny_config("--log.checkpoint_every 1 --log.keep 2 --preview.every null")
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".unfinished-step-0000004").mkdir()
    (folder / "latest").unlink()  # as if killed between the two renames
    train(config, tmp_path / "run")
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-0000005", "step-0000006"]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path, monkeypatch) -> None:
    config = tiny_config("--preview.every null")
    with monkeypatch.context() as patched:
        interrupt_after(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    train(config, tmp_path / "run")
    assert [line[0] for line in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--model.num_classes 7", "has 10 classes, the model 7"),
        ("--model.name SiT-S/3", "Unknown model 'SiT-S/3'"),
        ("--model.name SiT-S/8 --data.path digits:train@12", "cannot be cut into patches of 8×8"),
        ("--training.accumulation 3", "does not divide"),
        ("--data.path nowhere", "nowhere"),
        ("--data.path digits:tests", "tests"),
        (ALIGNED.replace('"block":1', '"block":3'), "has 2 blocks"),
        (ALIGNED.replace("test_vit", "test_vitt"), "test_vitt"),
        ("--model.mixer_pattern [atconv]", "1 mixers for 2 blocks"),
        ("--model.num_heads 3", "not a multiple of the 3"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, extra: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        train(tiny_config(extra), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_configuration_or_directory_is_refused(tmp_path: Path) -> None:
    train(tiny_config("--training.steps 1"), tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(InputError, match=r"optimizer\.lr: 0\.\d+ -> 0\.1"):
        train(tiny_config("--training.steps 1 --optimizer.lr 0.1"), tmp_path / "run")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="is not a training run"):
        train(tiny_config(), tmp_path / "mine")


@pytest.mark.parametrize("victim", ["model.safetensors", "optimizer.bin", "position.json"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, victim: str) -> None:
    train(tiny_config("--training.steps 3"), tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-0000003" / victim
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="step-0000003 is damaged"):
        train(tiny_config("--training.steps 3"), tmp_path / "run")


def test_the_command_line_ends_with_code_2_on_mistakes(tmp_path: Path, capsys) -> None:
    config = ["--config", str(ROOT / "configs" / "quickstart.yaml")]
    for words, message in (
        (config, "--run"),
        ([*config, "--run", "/proc/nowhere/run", *TINY.split()], "/proc/nowhere"),
        ([*config, "--run", str(tmp_path / "run"), "--model.name", "SiT-Q/2"], "Unknown model 'SiT-Q/2'"),
    ):
        with pytest.raises(SystemExit) as exit_:
            train_command.main(words)
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_unconditional_models_train_on_labelled_data(tmp_path: Path) -> None:
    train(tiny_config("--training.steps 1 --model.num_classes 0"), tmp_path / "run")
    assert SiT.from_pretrained(tmp_path / "run" / "checkpoints" / "latest" / "model").label_embed is None


def test_ema_follows_its_formula() -> None:
    model = torch.nn.Linear(3, 2)
    ema = Ema(model, decay=0.9)
    old = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update(model)
    for average, before in zip(ema.model.parameters(), old, strict=True):
        torch.testing.assert_close(average, before + 0.1)
        assert not average.requires_grad


def test_the_warm_up_is_linear_and_the_rate_then_constant() -> None:
    config = Config(optimizer=OptimizerConfig(lr=0.4, warmup_steps=4), training=TrainingConfig(steps=10))
    assert [learning_rate(config, step) for step in (1, 2, 4, 10)] == pytest.approx([0.1, 0.2, 0.4, 0.4])
    assert learning_rate(Config(optimizer=OptimizerConfig(lr=0.4)), 1) == 0.4


def test_a_linear_schedule_falls_to_nothing_after_the_last_step() -> None:
    rates = OptimizerConfig(lr=0.4, warmup_steps=2, schedule="linear")
    config = Config(optimizer=rates, training=TrainingConfig(steps=10))
    assert [learning_rate(config, step) for step in (1, 2, 6, 10)] == pytest.approx([0.2, 0.36, 0.2, 0.04])


def test_draws_depend_on_seed_and_position_alone() -> None:
    together = draw(torch.tensor([5, 9, 2]), (1, 4, 4), FlowConfig(), seed=3)
    alone = draw(torch.tensor([9]), (1, 4, 4), FlowConfig(), seed=3)
    for name in ("times", "noise", "posterior_noise", "dropout"):
        assert torch.equal(getattr(together, name)[1:2], getattr(alone, name))
    assert not torch.equal(together.noise, together.posterior_noise)


def test_the_objective_adds_the_alignment_of_every_teacher() -> None:
    flow, alignment = FlowConfig(label_dropout=0.0), AlignmentConfig(coefficient=0.3, block=1, projector_width=8)
    alignment = dataclasses.replace(alignment, teachers=[TeacherConfig(), TeacherConfig()])
    model = create_model("SiT-S/2", input_size=4, num_classes=2, hidden_size=16, depth=2, num_heads=2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    objective = Objective(model, flow, alignment, (6, 5))
    assert [type(p) for p in objective.projectors] == [Projector, Projector]
    latents, labels = torch.randn(3, 4, 4, 4), torch.tensor([0, 1, 1])
    draws = draw(torch.arange(3), (4, 4, 4), flow, seed=0)
    targets = [torch.randn(3, 4, 6), torch.randn(3, 4, 5)]
    terms = objective(latents, labels, draws, targets)

    time = draws.times.view(3, 1, 1, 1)
    x_t = (1 - time) * latents + time * draws.noise
    velocity, tokens = model.forward_intermediates(x_t, draws.times, labels, [1])
    flow_term = (velocity - (draws.noise - latents)).square().mean()
    aligned = (
        sum(alignment_loss(p(tokens[1]), t).mean() for p, t in zip(objective.projectors, targets, strict=True)) / 2
    )
    torch.testing.assert_close(terms["loss"], flow_term + 0.3 * aligned)
    torch.testing.assert_close(terms["alignment"], aligned)


def test_labels_are_dropped_in_training_only() -> None:
    seen = []

    class Spy(SiT):
        def condition(self, t, y):
            seen.append(y.tolist())
            return super().condition(t, y)

    model = Spy(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=2)
    objective = Objective(model, FlowConfig(label_dropout=0.5), None)
    draws = draw(torch.arange(64), (4, 4, 4), FlowConfig(), seed=0)
    objective(torch.randn(64, 4, 4, 4), torch.zeros(64).long(), draws, [])
    assert 20 < seen[0].count(2) < 44


def test_flops_are_counted_as_the_paper_counts_them() -> None:
    """Multiply-adds per token and block, "Speed" of the specification: attention 12C² + 2NC, ATConv 10C² + 9C + …"""
    N, C = 64, 128
    options = {"input_size": 16, "depth": 4, "hidden_size": C, "num_heads": 4, "num_classes": 0}
    counted = {}
    for name in ("SiT-S/2", "SiT-ATConv-S/2"):
        with torch.device("meta"):
            one, four = (create_model(name, **{**options, "depth": depth}) for depth in (1, 5))
        counted[name] = (training_flops(four, (4, 16, 16)) - training_flops(one, (4, 16, 16))) / 4 / 3 / 2 - 6 * C**2
    assert counted["SiT-S/2"] == N * (12 * C**2 + 2 * N * C)
    assert counted["SiT-ATConv-S/2"] == N * (10 * C**2 + 9 * C) + 9 * C**2 + 81 * C


@pytest.mark.slow
def test_a_killed_process_continues(tmp_path: Path) -> None:
    words = [sys.executable, "train.py", "--config", "configs/quickstart.yaml", "--run", str(tmp_path / "run")]
    words += [*TINY.split(), "--training.steps", "60", "--log.checkpoint_every", "2", "--preview.every", "null"]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    latest = tmp_path / "run" / "checkpoints" / "latest"
    deadline = time.monotonic() + 120
    while not latest.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert latest.exists()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert np.array_equal([line[0] for line in losses(tmp_path / "run")], range(1, 61))
    train(tiny_config("--training.steps 60 --log.checkpoint_every 60 --preview.every null"), tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")

"""Training: what a run leaves behind, the objective, and what is refused before anything is written."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import ALIGNED, QUICKSTART, TINY, losses, run_tiny, tiny_config

import sample as sample_command
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
from sit_atconv.sampling.writing.grid import save_grid
from sit_atconv.training import power_ema
from sit_atconv.training.schedule import learning_rate
from sit_atconv.training.session.objective import Objective, draw


def test_a_run_leaves_what_the_design_says(tmp_path: Path) -> None:
    run_tiny(tmp_path / "run")
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


@pytest.mark.parametrize("extra", ["--training.accumulation 4", "--training.gradient_checkpointing mixers"])
def test_accumulation_and_checkpointing_leave_the_losses(tmp_path: Path, extra: str) -> None:
    run_tiny(tmp_path / "plain", "--training.steps 3")
    run_tiny(tmp_path / "other", f"--training.steps 3 {extra}")
    for ours, theirs in zip(losses(tmp_path / "other"), losses(tmp_path / "plain"), strict=True):
        assert ours[1] == pytest.approx(theirs[1], rel=1e-6)
        assert ours[4] == pytest.approx(theirs[4], rel=1e-4)


@pytest.mark.parametrize("guidance", ["1", "2"])
def test_the_preview_is_what_sample_py_draws_from_that_checkpoint(tmp_path: Path, guidance: str) -> None:
    run, interval = tmp_path / "run", [] if guidance == "1" else ["--interval", "0", "0.5"]
    run_tiny(
        run,
        f"--training.steps 3 --preview.guidance {guidance} --preview.interval [0,0.5] --training.seed 3 "
        "--training.ema_decay 0.1",
    )
    words = f"--num-samples 4 --labels 0,0,1,1 --seed 3 --solver heun --steps 2 --batch-size 3 --guidance {guidance}"
    checkpoint = ["--checkpoint", str(run / "checkpoints" / "latest" / "model"), "--out", str(tmp_path / "out")]
    sample_command.main([*checkpoint, *words.split(), *interval])
    images = torch.from_numpy(np.load(tmp_path / "out" / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    save_grid(images, 2, tmp_path / "grid.png")
    drawn, preview = (
        np.asarray(Image.open(path)) for path in (tmp_path / "grid.png", run / "samples/step-0000003.png")
    )
    assert np.array_equal(drawn, preview)
    assert drawn.std() > 10


def test_a_complete_run_is_left_alone(tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", "--training.steps 1")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    run_tiny(tmp_path / "run", "--training.steps 1")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_what_a_kill_at_the_very_end_left_goes_with_the_next_start(tmp_path: Path) -> None:
    """All steps were done, and the checkpoints that are no longer kept were being removed."""
    run_tiny(tmp_path, "--training.steps 1")
    half_removed = tmp_path / "checkpoints" / ".unfinished-step-0000000" / "model"
    half_removed.mkdir(parents=True)
    run_tiny(tmp_path, "--training.steps 1")
    assert not half_removed.parent.exists()


def test_training_learns(tmp_path: Path) -> None:
    extra = "--training.steps 60 --log.every 10 --log.checkpoint_every 60 --preview.every null --optimizer.lr 0.01"
    run_tiny(tmp_path / "run", f"{extra} --training.batch_size 16")
    history = [line[1] for line in losses(tmp_path / "run")]
    assert history[-1] < 0.7 * history[0]


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
        ("--model.mixer_pattern [atconv,atconv,attention]", "3 mixers for 2 blocks"),
        ("--model.num_heads 3", "not a multiple of the 3"),
        ("--training.precision fp16", "fp16 needs a GPU"),
        ("--training.power_ema [0.3]", "relative width of 0.3"),
        ("--training.more_ema_decays [0.98]", "name one twice"),
        ('--evaluation {"reference":"nowhere","features":"pixels"}', "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, extra: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        run_tiny(tmp_path / "run", extra)
    assert not (tmp_path / "run").exists()


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="is not a training run"):
        run_tiny(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_the_command_line_ends_with_code_2_on_mistakes(tmp_path: Path, capsys) -> None:
    config = ["--config", str(QUICKSTART)]
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
    run_tiny(tmp_path / "run", "--training.steps 1 --model.num_classes 0")
    assert SiT.from_pretrained(tmp_path / "run" / "checkpoints" / "latest" / "model").label_embed is None


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
        def condition(self, t, y, dtype):
            seen.append(y.tolist())
            return super().condition(t, y, dtype)

    model = Spy(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=2)
    objective = Objective(model, FlowConfig(label_dropout=0.5), None)
    draws = draw(torch.arange(64), (4, 4, 4), FlowConfig(), seed=0)
    objective(torch.randn(64, 4, 4, 4), torch.zeros(64).long(), draws, [])
    assert 20 < seen[0].count(2) < 44


def test_files_of_a_run_have_the_mode_of_the_umask_and_links_stay(tmp_path: Path) -> None:
    """safetensors makes its files 0600: nobody else could sample from a run on shared storage."""
    run, before = tmp_path / "run", os.umask(0o027)
    extra = "--training.power_ema [0.05] --training.power_ema_every 2"
    try:
        run_tiny(run, f"--training.steps 2 {extra}")
        (run / "log.jsonl").rename(tmp_path / "log")
        (run / "log.jsonl").symlink_to(tmp_path / "log")
        run_tiny(run, f"--training.steps 3 {extra}")
        power_ema.main([str(run), str(tmp_path / "averaged"), "--width", "0.05"])
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    names = {path.name for path in files}
    assert {"weights.safetensors", "power-0.05.safetensors", "config.yaml", "log", "step-0000003.png"} <= names
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == dict.fromkeys(names, "0o640")
    assert (run / "log.jsonl").is_symlink() and [line[0] for line in losses(run)] == [1, 2, 3]
    with pytest.raises(SystemExit):  # what is there is not overwritten
        power_ema.main([str(run), str(tmp_path / "averaged"), "--width", "0.05"])

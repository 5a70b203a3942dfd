"""Runs with Muon: resumed, with bad steps, accumulated, compiled, and on several processes."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training_guard import spoil
from test_training_processes import SHARED, launch, records
from test_training_resume import compile_without_code, kill_in_step
from training_runs import NO_PREVIEW, assert_same_checkpoint, checkpoint_tensors, losses, run_tiny, start_run

from sit_atconv.models import SiT

MUON = "--optimizer.name muon"
NAMES = ("model.blocks.0.mixer.qkv.weight", "model.blocks.1.mixer.kernel_gen.weight")  # Muon's and AdamW's


@pytest.mark.parametrize(
    "extra", ["--training.accumulation 2", "--training.precision bf16 --optimizer.weight_decay 0.1"]
)
def test_a_killed_run_continued_equals_the_uninterrupted_run(tmp_path: Path, extra: str) -> None:
    extra = f"{MUON} {NO_PREVIEW} --training.steps 6 --log.checkpoint_every 2 {extra}"
    run_tiny(tmp_path / "whole", extra)
    killed = start_run(tmp_path / "parts", extra, kill_in_step, 4)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    run_tiny(tmp_path / "parts", extra)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_checkpoint(*(tmp_path / run / "checkpoints" / "latest" for run in ("parts", "whole")))
    state = load_file(tmp_path / "parts" / "checkpoints" / "latest" / "optimizer.safetensors")
    kept = {name: {key.rpartition("/")[2] for key in state if key.startswith(f"{name}/")} for name in NAMES}
    assert kept == dict(zip(NAMES, ({"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}), strict=True))


def test_a_bad_step_of_a_run_leaves_weights_momentum_and_averages_alone(tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        spoil(patched, "gradient", {3})
        run_tiny(tmp_path / "run", f"{MUON} {NO_PREVIEW} --training.steps 4 --log.checkpoint_every 1 --log.keep null")
    checkpoints = [tmp_path / "run" / "checkpoints" / f"step-000000{step}" for step in (2, 3, 4)]
    assert_same_checkpoint(*checkpoints[:2])
    after, before = (checkpoint_tensors(checkpoint) for checkpoint in checkpoints[:0:-1])
    assert not any(torch.equal(after[name], before[name]) for name in after if "mixer.qkv.weight" in name)
    assert [line[6] for line in losses(tmp_path / "run")] == [0, 0, 1, 1]


def test_accumulation_equals_the_whole_batch_and_compile_the_plain_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(SiT, "compile_repeated_blocks", compile_without_code)
    extra = f"{MUON} {NO_PREVIEW} --training.steps 3"
    runs = {"plain": "", "accumulated": "--training.accumulation 4", "compiled": "--training.compile true"}
    for name, more in runs.items():
        run_tiny(tmp_path / name, f"{extra} {more}")
    plain, *others = (load_file(tmp_path / name / "checkpoints" / "latest" / "weights.safetensors") for name in runs)
    for other in others:
        for name, values in plain.items():
            torch.testing.assert_close(other[name], values, atol=2e-4, rtol=0)


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, sharded: bool) -> None:
    extra = f"{SHARED} {MUON}"
    run_tiny(tmp_path / "one", extra)
    assert launch(tmp_path / "two", 2, extra, *(["shard_the_model"] if sharded else [])) == [0, 0]
    assert len({rank["ema"] for rank in records(tmp_path / "two", 2)}) == 1
    one, two = (checkpoint_tensors(tmp_path / run / "checkpoints" / "step-0000006") for run in ("one", "two"))
    before = checkpoint_tensors(tmp_path / "one" / "checkpoints" / "step-0000003")
    assert one.keys() == two.keys()
    matrices = {name for name in one if name.endswith(tuple(f"{part}.weight" for part in ("qkv", "fc1", "value_proj")))}
    assert len(matrices) == 2 * 4  # in the raw weights and in the average
    for name in matrices:  # updates of each shard alone would differ by half of what they are
        assert (two[name] - one[name]).norm() < 0.01 * (one[name] - before[name]).norm()

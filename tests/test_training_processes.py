"""Several processes: the same run as one, no sample twice, equal averages, and agreement on when to stop or skip."""

import hashlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from training_runs import ALIGNED, NO_PREVIEW, ROOT, assert_same_checkpoint, log_lines, losses, start_run

from sit_atconv import SiT
from sit_atconv.config import FlowConfig
from sit_atconv.models import create_model
from sit_atconv.training import trainer
from sit_atconv.training.objective import Objective
from sit_atconv.training.throughput import Interval
from sit_atconv.training.trainer import Trainer

STEPS = 6
SHARED = f"--training.steps {STEPS} --training.batch_size 12 --log.every 2 --log.checkpoint_every 3 {NO_PREVIEW}"


def become(rank: int, world: int, port: int, *faults: str) -> None:
    """Make this process one of many, as a launcher does, let it record what it sees, and add faults by name."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    seen: list[list[int]] = []
    fetch, run = Interval.fetch, Trainer.run

    def recorded(self: Interval, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = fetch(self, batches)
        seen.append(batch["position"].tolist())
        return batch

    def finished(self: Trainer, *arguments: object) -> None:
        run(self, *arguments)
        ema = hashlib.sha256(b"".join(p.numpy().tobytes() for p in self.session.averages.model().parameters()))
        record = {"positions": seen, "ema": ema.hexdigest()}
        (self.directory / f"rank-{world}-{rank}.json").write_text(json.dumps(record))

    Interval.fetch, Trainer.run = recorded, finished
    for fault in faults:
        globals()[fault](rank)


def shard_the_model(rank: int) -> None:
    """What Accelerate does for FSDP2 on GPUs, which it does not do on CPUs."""

    def prepare(self: Accelerator, objective: nn.Module, optimizer: AdamW) -> tuple[nn.Module, AdamW]:
        before = list(objective.parameters())
        for block in objective.model.blocks:
            fully_shard(block)
        fully_shard(objective)
        after = dict(zip(map(id, before), objective.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [after[id(p)] for p in group["params"]]
        return objective, self.prepare_optimizer(optimizer)

    Accelerator.prepare = prepare


def terminate_one_rank(rank: int) -> None:
    """The second process is asked to stop in its third step."""
    step = Trainer.step

    def asked(self: Trainer) -> None:
        step(self)
        if rank == 1 and self.position.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.step = asked


def spoil_one_rank(rank: int) -> None:
    """The second process's latents are NaN in the second step."""
    prepare = trainer.prepare_inputs

    def spoilt(session: object, batch: dict[str, Tensor]) -> tuple:
        latents, *others = prepare(session, batch)
        bad = rank == 1 and batch["position"].min() // 12 == 1
        return (latents * torch.nan if bad else latents, *others)

    trainer.prepare_inputs = spoilt


def launch(run: Path, world: int, extra: str = "", *faults: str) -> list[int]:
    """Train on so many processes; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        start_run(run, f"{SHARED} {extra}", become, rank, world, port, *faults, stderr=f"{run}-{rank}.stderr")
        for rank in range(world)
    ]
    for process in processes:
        process.join(120)
        process.kill()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_what_accelerates_files_say_to_every_process(monkeypatch, name: str) -> None:
    words = ["--config_file", str(ROOT / "configs" / "accelerate" / f"{name}.yaml"), "train.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (arguments.multi_gpu, arguments.use_fsdp) == ((True, False) if name == "ddp" else (False, True))
    if name == "fsdp2":
        for key, value in prepare_multi_gpu_env(arguments).items():
            monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        model = create_model("SiT-Hybrid-S/2", input_size=4, hidden_size=8, depth=2, num_heads=2)
        objective = Objective(model, FlowConfig(), None)
        plugin.set_auto_wrap_policy(objective)
        splits = fsdp2_prepare_auto_wrap_policy(plugin, objective)
        assert plugin.fsdp_version == 2
        assert not plugin.cpu_ram_efficient_loading
        assert [m for m in objective.modules() if splits(m)] == list(model.blocks)


def records(run: Path, world: int) -> list[dict]:
    return [json.loads((run / f"rank-{world}-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("processes") / "single"
    assert launch(run, 1) == [0]
    return run


def assert_same_losses(run: Path, other: Path) -> None:
    for ours, theirs in zip(losses(run), losses(other), strict=True):
        assert ours[0] == theirs[0]
        assert ours[1:3] == pytest.approx(theirs[1:3], rel=1e-5)
        assert ours[4] == pytest.approx(theirs[4], rel=1e-4)


@pytest.mark.parametrize(
    ("world", "extra", "faults"),
    [(2, "", ()), (3, "--training.accumulation 2", ()), (2, "--training.precision no", ("shard_the_model",))],
    ids=["two", "three-accumulating", "two-sharded"],
)
def test_several_processes_train_as_one_does(tmp_path: Path, single: Path, world: int, extra: str, faults) -> None:
    assert launch(tmp_path / "run", world, extra, *faults) == [0] * world
    assert_same_losses(tmp_path / "run", single)
    ranks = records(tmp_path / "run", world)
    assert len({rank["ema"] for rank in ranks}) == 1
    micro_batches = len(ranks[0]["positions"]) // STEPS
    for step in range(STEPS):
        here = slice(step * micro_batches, (step + 1) * micro_batches)
        positions = [p for rank in ranks for batch in rank["positions"][here] for p in batch]
        assert sorted(positions) == list(range(12 * step, 12 * (step + 1)))
    weights = [SiT.from_pretrained(run / "checkpoints/latest/model").state_dict() for run in (tmp_path / "run", single)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-5)


def test_two_processes_continue_bit_for_bit_after_sigterm_to_one(tmp_path: Path) -> None:
    """The termination falls between two lines of the log: the averages so far differ between processes."""
    extra = f"{ALIGNED} --log.every 5 --log.checkpoint_every 6"
    assert launch(tmp_path / "parts", 2, extra, "terminate_one_rank") == [143, 143]
    (stopped,) = [p.name for p in (tmp_path / "parts" / "checkpoints").glob("step-*")]
    assert stopped in ("step-0000003", "step-0000004")
    assert launch(tmp_path / "parts", 2, extra) == [0, 0]
    assert launch(tmp_path / "whole", 2, extra) == [0, 0]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_checkpoint(*(tmp_path / run / "checkpoints" / "latest" for run in ("parts", "whole")))


def test_another_number_of_processes_continues_with_a_note(tmp_path: Path, single: Path) -> None:
    assert launch(tmp_path / "run", 2, "--training.steps 2", "shard_the_model") == [0, 0]
    assert launch(tmp_path / "run", 3, "--training.steps 4") == [0, 0, 0]
    assert launch(tmp_path / "run", 2, "", "shard_the_model") == [0, 0]
    assert_same_losses(tmp_path / "run", single)
    notes = [line["note"] for line in log_lines(tmp_path / "run") if "note" in line]
    assert [note[:42] for note in notes if "processes" in note] == [
        "Continued on 3 processes instead of 2: the",
        "Continued on 2 processes instead of 3: the",
    ]


def test_a_bad_batch_on_one_process_is_skipped_by_all(tmp_path: Path, single: Path) -> None:
    assert launch(tmp_path / "run", 2, "--log.every 1 --training.steps 2", "spoil_one_rank") == [0, 0]
    assert [line[6] for line in losses(tmp_path / "run")] == [0, 1]
    assert losses(tmp_path / "run")[1][1] is None
    assert launch(tmp_path / "one", 2, "--log.every 1 --training.steps 1") == [0, 0]
    files = [tmp_path / run / "checkpoints/latest/weights.safetensors" for run in ("run", "one")]
    after, before = map(load_file, files)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len({rank["ema"] for rank in records(tmp_path / "run", 2)} | {records(tmp_path / "one", 2)[0]["ema"]}) == 1

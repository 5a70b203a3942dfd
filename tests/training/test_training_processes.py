"""Several processes: the same run as one, no sample twice, equal averages, and agreement on when to stop or skip."""

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from training_runs import ALIGNED, NO_PREVIEW, ROOT, assert_same_checkpoint, command_words, log_lines, losses, start_run

from sit_atconv import SiT
from sit_atconv.config import Config, FlowConfig, OptimizerConfig, TrainingConfig, parse_command_line
from sit_atconv.errors import InputError
from sit_atconv.models import create_model
from sit_atconv.training import trainer
from sit_atconv.training.run.checkpoint import Checkpoints
from sit_atconv.training.run.integrity import read_position
from sit_atconv.training.session.objective import Objective
from sit_atconv.training.session.zero import configure_zero
from sit_atconv.training.trainer import Trainer
from sit_atconv.training.watch import evaluation
from sit_atconv.training.watch.preview import Preview
from sit_atconv.training.watch.throughput import Interval

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

    def finished(self: Trainer, *arguments: object) -> bool:
        terminated = run(self, *arguments)
        ema = hashlib.sha256(b"".join(p.numpy().tobytes() for p in self.session.averages.model().parameters()))
        record = {"positions": seen, "ema": ema.hexdigest()}
        (self.directory / f"rank-{world}-{rank}.json").write_text(json.dumps(record))
        return terminated

    Interval.fetch, Trainer.run = recorded, finished
    for fault in faults:
        globals()[fault](rank)


def shard_the_model(rank: int) -> None:
    """What Accelerate does for FSDP2 on GPUs, which it does not do on CPUs."""

    def prepare(self: Accelerator, objective: nn.Module, optimizer: AdamW) -> tuple[nn.Module, AdamW]:
        before = list(objective.parameters())
        for module in (*objective.model.blocks, objective):
            fully_shard(module)
            module.set_force_sum_reduction_for_comms(True)  # Gloo takes a mean for a sum in torch 2.8
        after = dict(zip(map(id, before), objective.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [after[id(p)] for p in group["params"]]
        return objective, self.prepare_optimizer(optimizer)

    Accelerator.prepare = prepare


def use_zero_1(rank: int, stage: str = "1") -> None:
    """What `accelerate launch` tells every process of configs/accelerate/deepspeed.yaml, and to do without GPUs."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    os.environ |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "DS_ACCELERATOR": "cpu"}


def use_zero_2(rank: int) -> None:
    use_zero_1(rank, "2")


def terminate_one_rank(rank: int) -> None:
    """The second process is asked to stop in its third step."""
    step = Trainer.step

    def asked(self: Trainer) -> None:
        step(self)
        if rank == 1 and self.position.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.step = asked


def kill_before_the_fifth_step(rank: int) -> None:
    step = Trainer.step

    def killed(self: Trainer) -> None:
        if self.position.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self)

    Trainer.step = killed


def refuse_on_one_rank(rank: int) -> None:
    """The second process meets a bad row in its third step."""
    step = Trainer.step

    def refused(self: Trainer) -> None:
        if rank == 1 and self.position.step == 2:
            raise InputError("The row is bad.")
        step(self)

    Trainer.step = refused


def spoil_one_rank(rank: int) -> None:
    """The second process's latents are NaN in the first and the third step."""
    prepare = trainer.prepare_inputs

    def spoilt(session: object, batch: dict[str, Tensor]) -> tuple:
        latents, *others = prepare(session, batch)
        bad = rank == 1 and batch["position"].min() // 12 in (0, 2)
        return (latents * torch.nan if bad else latents, *others)

    trainer.prepare_inputs = spoilt


def take_long(rank: int) -> None:
    """Rank 0 needs longer for grid, scores and checkpoint than collectives wait by default; here, a second."""
    torch.distributed.distributed_c10d.default_pg_timeout = timedelta(seconds=1)

    def slowed(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def slow(*arguments: object) -> object:
            result = original(*arguments)
            time.sleep(0 if rank else 2.5)
            return result

        setattr(owner, name, slow)

    slowed(Preview, "save")
    slowed(Checkpoints, "_write")
    slowed(evaluation, "evaluate")


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


def accelerate_arguments(name: str) -> argparse.Namespace:
    """What `accelerate launch` makes of a file of ours."""
    words = ["--config_file", str(ROOT / "configs" / "accelerate" / f"{name}.yaml"), "train.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    return arguments


def test_the_slurm_script_of_the_docs(tmp_path: Path) -> None:
    """It runs with stand-ins: srun starts two nodes, accelerate notes its words, which its own parser then reads."""
    blocks = (ROOT / "docs" / "training.md").read_text().split("```sh\n")
    script = next(block for block in blocks if block.startswith("#!/bin/bash\n#SBATCH")).partition("```")[0]
    stand_ins = {
        "scontrol": 'test "$*" = "show hostnames node[1-2]" && printf "node1\\nnode2\\n"',
        "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@"; done',
        "accelerate": f'printf "%s\\n" "$@" > {tmp_path}/words-$SLURM_NODEID',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"NNODES": "2", "JOB_NODELIST": "node[1-2]", "JOB_ID": "1234567", "CPUS_PER_TASK": "64"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **{f"SLURM_{key}": slurm[key] for key in slurm}}
    subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, check=True)
    for rank in (0, 1):
        launch, *words = (tmp_path / f"words-{rank}").read_text().splitlines()
        arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
        told = prepare_multi_gpu_env(arguments)
        assert (launch, arguments.multi_gpu, arguments.rdzv_backend) == ("launch", True, "static")
        assert (arguments.nnodes, arguments.node_rank, arguments.nproc_per_node) == ("2", rank, "8")
        assert arguments.rdzv_endpoint == "node1:24567"
        assert told["ACCELERATE_MIXED_PRECISION"] == "no" and arguments.training_script == "train.py"
        config, run, _ = parse_command_line(arguments.training_script_args)
        assert (config.training.batch_size, run) == (256, Path("/shared/runs/repa"))


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed"])
def test_accelerates_files_ask_for_what_they_are_named_after(name: str) -> None:
    arguments = accelerate_arguments(name)
    asked = {"ddp": arguments.multi_gpu, "fsdp2": arguments.use_fsdp, "deepspeed": arguments.use_deepspeed}
    assert [other for other, flag in asked.items() if flag] == [name]


def test_what_the_fsdp2_file_says_to_every_process(monkeypatch) -> None:
    for key, value in prepare_multi_gpu_env(accelerate_arguments("fsdp2")).items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    model = create_model("SiT-Hybrid-S/2", input_size=4, hidden_size=8, depth=2, num_heads=2)
    objective = Objective(model, FlowConfig(), None)
    plugin.set_auto_wrap_policy(objective)
    splits = fsdp2_prepare_auto_wrap_policy(plugin, objective)
    assert plugin.fsdp_version == 2
    assert not plugin.cpu_ram_efficient_loading
    assert [m for m in objective.modules() if splits(m)] == list(model.blocks)


def test_what_the_deepspeed_file_says_to_every_process(monkeypatch) -> None:
    arguments = accelerate_arguments("deepspeed")
    arguments.deepspeed_fields_from_accelerate_config = ""  # which `accelerate launch` adds
    environment = prepare_deepspeed_cmd_env(arguments)[1]
    for key in [key for key in environment if key.startswith("ACCELERATE_")]:
        monkeypatch.setenv(key, environment[key])
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("no")
    config = Config(training=TrainingConfig(batch_size=64, accumulation=2), optimizer=OptimizerConfig(clip_norm=None))
    configure_zero(SimpleNamespace(deepspeed_plugin=plugin, num_processes=8), config)
    settings = plugin.deepspeed_config
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["gradient_clipping"] == 0
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [settings[size] for size in sizes] == [64, 4, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "asks for ZeRO stage 3"),
        ({"zero_optimization": {}}, "asks for ZeRO stage 0"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "asks for offloading"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {"type": "Lamb"}}, "asks for an optimizer"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, "asks for a precision"),
    ],
)
def test_a_deepspeed_file_that_would_train_otherwise_is_refused(settings: dict, message: str) -> None:
    accelerator = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=settings), num_processes=2)
    with pytest.raises(InputError, match=message):
        configure_zero(accelerator, Config())


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


@pytest.mark.parametrize("faults", [(), ("shard_the_model",)], ids=["whole", "sharded"])
def test_a_second_head_and_groups_beside_a_teacher_train_as_on_one_process(tmp_path: Path, faults) -> None:
    extra = f"--model.internal_block 1 --flow.dispersion 0.5 --flow.dispersion_group 3 {ALIGNED}"
    assert launch(tmp_path / "one", 1, extra) == [0] and launch(tmp_path / "two", 2, extra, *faults) == [0, 0]
    assert_same_losses(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "extra"),
    [
        ("use_zero_2", ""),
        ("use_zero_1", "--training.accumulation 2"),
        ("use_zero_2", "--optimizer.clip_norm 0.1 --training.precision bf16"),
    ],
    ids=["stage-2", "stage-1-accumulating", "stage-2-clipped-bf16"],
)
def test_deepspeed_trains_and_continues_as_ddp_does(tmp_path: Path, stage: str, extra: str) -> None:
    pytest.importorskip("deepspeed")
    assert launch(tmp_path / "ddp", 2, extra) == [0, 0]
    assert launch(tmp_path / "parts", 2, extra, stage, "kill_before_the_fifth_step") == [-signal.SIGKILL] * 2
    assert launch(tmp_path / "parts", 2, extra, stage) == [0, 0]
    assert launch(tmp_path / "whole", 2, extra, stage) == [0, 0]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_checkpoint(*(tmp_path / run / "checkpoints" / "latest" for run in ("parts", "whole")))
    assert_same_losses(tmp_path / "whole", tmp_path / "ddp")
    assert len({rank["ema"] for rank in records(tmp_path / "whole", 2)}) == 1


@pytest.mark.slow
def test_accelerate_launch_trains_as_one_process_does(tmp_path: Path, single: Path) -> None:
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    words = [*launcher.split(), "--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "train.py")]
    words += [*command_words(SHARED), "--run", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)
    assert done.returncode == 0
    assert_same_losses(tmp_path / "run", single)
    assert read_position(tmp_path / "run" / "checkpoints" / "latest")["processes"] == 2


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


def test_when_one_process_cannot_go_on_none_waits_for_it(tmp_path: Path) -> None:
    assert launch(tmp_path / "run", 2, "--data.workers 1 --log.checkpoint_every 2", "refuse_on_one_rank") == [2, 2]
    told = [Path(f"{tmp_path / 'run'}-{rank}.stderr").read_text() for rank in range(2)]
    assert told[1].endswith("error: The row is bad.\n")
    assert "error" not in told[0]
    assert "Traceback" not in told[0] + told[1]
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == "step-0000002"


def test_the_others_wait_for_the_first_process_as_long_as_it_takes(tmp_path: Path) -> None:
    grid = "--preview.every 1 --preview.classes 1 --preview.per_class 1 --preview.steps 1"
    scores = "--evaluation.every 1 --evaluation.samples 4 --evaluation.steps 1 --evaluation.features pixels"
    extra = f"--training.steps 1 {grid} {scores} --evaluation.reference digits:heldout@8"
    assert launch(tmp_path / "run", 2, extra, "take_long") == [0, 0]
    assert any("fd_pixels" in line for line in log_lines(tmp_path / "run"))
    assert read_position(tmp_path / "run" / "checkpoints" / "latest")["step"] == 1


@pytest.mark.parametrize("split", ["shard_the_model", pytest.param("use_zero_2", marks=pytest.mark.slow)])
def test_another_number_of_processes_continues_with_a_note(tmp_path: Path, single: Path, split: str) -> None:
    if split == "use_zero_2":
        pytest.importorskip("deepspeed")
    assert launch(tmp_path / "run", 2, "--training.steps 2", split) == [0, 0]
    assert launch(tmp_path / "run", 3, "--training.steps 4") == [0, 0, 0]
    assert launch(tmp_path / "run", 2, "", split) == [0, 0]
    assert_same_losses(tmp_path / "run", single)
    notes = [line["note"] for line in log_lines(tmp_path / "run") if "note" in line]
    assert [note[:42] for note in notes if "processes" in note] == [
        "Continued on 3 processes instead of 2: the",
        "Continued on 2 processes instead of 3: the",
    ]


@pytest.mark.parametrize("zero", [(), pytest.param(("use_zero_1",), marks=pytest.mark.slow)], ids=["ddp", "deepspeed"])
def test_a_bad_batch_on_one_process_is_skipped_by_all(tmp_path: Path, zero: tuple[str, ...]) -> None:
    if zero:
        pytest.importorskip("deepspeed")
    extra = "--log.every 1 --log.checkpoint_every 1 --log.keep null --training.steps 3"
    assert launch(tmp_path / "run", 2, extra, "spoil_one_rank", *zero) == [0, 0]
    assert [line[6] for line in losses(tmp_path / "run")] == [1, 1, 2]
    assert [line[1] is None for line in losses(tmp_path / "run")] == [True, False, True]
    first, second, third = (tmp_path / "run" / "checkpoints" / f"step-000000{step}" for step in (1, 2, 3))
    assert not any(tensor.any() for tensor in load_file(first / "optimizer.safetensors").values())
    assert any(tensor.any() for tensor in load_file(second / "optimizer.safetensors").values())
    assert_same_checkpoint(second, third)
    assert len({rank["ema"] for rank in records(tmp_path / "run", 2)}) == 1

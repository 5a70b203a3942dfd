"""Small runs that the training tests share, and what can be compared of them."""

import json
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

import train as train_command
from sit_atconv.config import Config, load_config
from sit_atconv.training import train

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
TINY = (
    "--model.name SiT-Hybrid-S/2 --model.hidden_size 16 --model.depth 2 --model.num_heads 2 --data.path digits:train@8 "
    "--training.steps 6 --training.batch_size 8 --log.every 1 --log.checkpoint_every 3 --preview.every 6 "
    "--preview.classes 2 --preview.per_class 2 --preview.steps 2 --optimizer.warmup_steps 4 "
    "--optimizer.schedule constant"
)
ALIGNED = '--alignment {"block":1,"projector_width":16,"teachers":[{"name":"test_vit","weights":"random"}]}'
BY_LATENTS = '--alignment {"coefficient":1.0,"block":1,"teachers":[{"name":"latents"}]}'
NO_PREVIEW = "--preview.every null"


def tiny_config(extra: str = "") -> Config:
    return load_config(QUICKSTART, f"{TINY} {extra}".split())


def command_words(extra: str = "") -> list[str]:
    """A tiny run for train.py's command line, but for --run."""
    return ["--config", str(QUICKSTART), *f"{TINY} {extra}".split()]


def fresh_accelerate() -> None:
    """Accelerate keeps the first configuration of a process for good; tests need many."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def run_tiny(run: Path, extra: str = "", resume: str | None = None) -> None:
    """Train a tiny run in this process."""
    fresh_accelerate()
    train(tiny_config(extra), run, resume)


def log_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def number_lines(run: Path) -> list[dict]:
    """The lines of the log but for notes."""
    return [line for line in log_lines(run) if "note" not in line]


def losses(run: Path) -> list[tuple]:
    """What the log says of each step, but for speed."""
    names = ("step", "loss", "flow", "alignment", "grad_norm", "lr", "skipped")
    return [tuple(line.get(name) for name in names) for line in log_lines(run) if "loss" in line]


def checkpoint_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, optimizer state and all averages of a checkpoint, by file and name."""
    return {
        f"{path.relative_to(checkpoint)}:{name}": tensor
        for path in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Bit for bit."""
    ours, theirs = checkpoint_tensors(one), checkpoint_tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def start_run(
    run: Path,
    extra: str = "",
    prepare: Callable[..., None] | None = None,
    *arguments: object,
    stderr: str | None = None,
) -> BaseProcess:
    """Train a tiny run by train.py's command line in a process of its own, forked from one that has it all imported.

    `prepare(*arguments)` is called first in that process; both must be importable. `stderr`: by default RUN.stderr.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # of the process that is forked from, which must not have threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_runs", "sklearn.datasets", "timm"])
    process = context.Process(target=_run_quietly, args=(run, extra, prepare, arguments, stderr or f"{run}.stderr"))
    process.start()
    return process


def _run_quietly(run: Path, extra: str, prepare: Callable[..., None] | None, arguments: tuple, stderr: str) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a process started by hand
    with open(stderr, "a") as file:
        os.dup2(file.fileno(), 2)
    if prepare:
        prepare(*arguments)
    train_command.main([*command_words(extra), "--run", str(run)])

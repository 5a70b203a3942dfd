"""Kill training, sampling and preparation at random moments, go on, and compare with what nobody interrupted.

    OMP_NUM_THREADS=1 python tests/kills.py training sampling preparing --kills 100 --seed 0

Each command is started again and again in one place, and killed (SIGKILL) somewhere within the time that it takes
when left alone, until one start comes through. A training may be asked to stop (SIGTERM) instead, and whatever its
end, its checkpoints are whole and it has lost no more than the steps since the last of them. The files are then
compared, byte by byte, with those of the command left alone (of the log the lines but for speed, since no two runs
take the same time). Exits with 1 at the first difference.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from training_runs import command_words

import sample as sample_command
import train as train_command
from sit_atconv import create_model
from sit_atconv.config import LogConfig
from sit_atconv.data.prepare.__main__ import main as prepare_command
from sit_atconv.training.run.checkpoint import Checkpoints
from sit_atconv.training.run.integrity import read_position
from sit_atconv.training.run.log import read_log
from sit_atconv.training.run.stop import TERMINATED

_KILLED = (-signal.SIGKILL, -signal.SIGTERM, TERMINATED)
_EVERY = 4  # steps between checkpoints
_TIMES = ("images_per_second", "seconds_per_step", "data_seconds", "compute_seconds", "mfu", "memory_gib", "hours_left")
_TRAINING = (
    f"--training.steps 40 --log.checkpoint_every {_EVERY} --log.keep 1 --preview.every 20 --data.workers 1 "
    "--training.power_ema [0.1] --training.power_ema_every 20"
)


def start_training(out: Path, inputs: Path) -> None:
    """train.py, with checkpoints, grids and snapshots."""
    train_command.main([*command_words(_TRAINING), "--run", str(out)])


def start_sampling(out: Path, inputs: Path) -> None:
    """sample.py, with PNG files."""
    words = f"--checkpoint {inputs} --out {out} --num-samples 96 --batch-size 4 --solver heun --steps 8 --png"
    sample_command.main(words.split())


def start_preparing(out: Path, inputs: Path) -> None:
    """sit_atconv.data.prepare, with many shards."""
    words = f"digits:all@32 {out} --resolution 32 --vae identity --shard-size 128 --batch-size 16 --workers 1"
    prepare_command(words.split())


COMMANDS = {"training": start_training, "sampling": start_sampling, "preparing": start_preparing}


def make_inputs(folder: Path) -> Path:
    """The model that is sampled from."""
    torch.manual_seed(0)
    latents = {"autoencoder": "identity", "weights_hash": None, "channels": 1, "downscale": 1}
    model = create_model(
        "SiT-Hybrid-S/2", input_size=16, in_channels=1, num_classes=10, hidden_size=32, depth=2, num_heads=2
    )
    model.register_to_config(latents={**latents, "scale": 1.0, "shift": 0.0})
    model.save_pretrained(folder)
    return folder


def run_quietly(command: Callable[[Path, Path], None], out: Path, inputs: Path) -> None:
    """In a process of its own, whose words go to OUT.stderr."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a process started by hand
    with open(f"{out}.stderr", "a") as file:
        os.dup2(file.fileno(), 2)
    command(out, inputs)


def begin(command: Callable[[Path, Path], None], out: Path, inputs: Path) -> BaseProcess:
    """Start a command, forked from a process that has it all imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kills", "training_runs", "sklearn.datasets", "timm"])
    process = context.Process(target=run_quietly, args=(command, out, inputs))
    process.start()
    return process


def newest_step(run: Path) -> int:
    """The step of a run's newest checkpoint, 0 without one."""
    found = Checkpoints(run / "checkpoints", LogConfig(), None).find(None)
    return int(found.name.removeprefix("step-")) if found else 0


def check_training(run: Path, before: int) -> None:
    """Raise `AssertionError` or `InputError` unless checkpoints are whole, and the log is not far ahead of them."""
    assert newest_step(run) >= before
    for checkpoint in (run / "checkpoints").glob("step-*"):
        read_position(checkpoint)
    lines = read_log(run / "log.jsonl") if (run / "log.jsonl").exists() else []
    assert max((line["step"] for line in lines), default=0) - newest_step(run) <= _EVERY


def kill_and_compare(name: str, kills: int, seed: int, folder: Path) -> int:
    """Kill a command so many times at moments drawn from `seed`; returns how many runs were compared.

    Raises `AssertionError` at the first file that differs, and when a start that nobody killed fails.
    """
    command, moments, whole = COMMANDS[name], random.Random(f"{name} {seed}"), folder / "whole"
    inputs = make_inputs(folder / "model")
    begin(command, folder / "first", inputs).join()  # so that the next one finds the caches warm
    started = time.monotonic()
    begin(command, whole, inputs).join()
    seconds, done, compared = time.monotonic() - started, 0, 0
    while done < kills:
        parts = folder / f"parts-{compared}"
        while True:
            before = newest_step(parts)
            process = begin(command, parts, inputs)
            process.join(moments.uniform(0, seconds) if done < kills else None)
            (process.terminate if name == "training" and moments.random() < 0.3 else process.kill)()
            process.join()
            if name == "training":
                check_training(parts, before)
            if process.exitcode not in _KILLED:
                break
            done += 1
        words = Path(f"{parts}.stderr").read_text()[-3000:]
        assert process.exitcode == 0, f"{name} ended with {process.exitcode} after {done} kills:\n{words}"
        differing = [file for file, content in contents(whole).items() if contents(parts).get(file) != content]
        extra = contents(parts).keys() - contents(whole).keys()
        assert not differing and not extra, f"{parts} differs after {done} kills: {differing} {sorted(extra)}"
        shutil.rmtree(parts)
        compared += 1
    return compared


def contents(folder: Path) -> dict[str, object]:
    """What is in each file of a folder, by its relative path; links by where they lead."""
    return {str(path.relative_to(folder)): _content(path) for path in folder.rglob("*") if not path.is_dir()}


def _content(path: Path) -> object:
    if path.is_symlink():
        return os.readlink(path)
    if path.name == "log.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in _TIMES} for line in lines]
    return path.read_bytes()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("commands", nargs="+", choices=COMMANDS)
    parser.add_argument("--kills", type=int, default=100, help="of each command (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in options.commands:
        with tempfile.TemporaryDirectory() as folder:
            compared = kill_and_compare(name, options.kills, options.seed, Path(folder))
            sys.stdout.write(f"{name}: {options.kills} kills, {compared} runs compared, no difference\n")


if __name__ == "__main__":
    main()

"""Damaged JSON and YAML: every command ends with code 0 or 2, without a traceback and soon.

A case that fails is repeated by its name: `pytest "tests/test_damage.py::test_damage[dataset-17]"`.
"""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from damage import TEXTS, damaged_text
from PIL import Image
from sampling_fixtures import tiny_model
from training_runs import QUICKSTART

import sample
from sit_atconv.autoencoder import load_autoencoder
from sit_atconv.config import load_config
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.prepare.__main__ import main as prepare
from sit_atconv.errors import exit_on_input_error
from sit_atconv.runtime.reading import read_json
from sit_atconv.sampling.writing.model_card import Scores
from sit_atconv.training import plot
from sit_atconv.training.run.integrity import read_position, write_position

FEW, MANY, SECONDS = 6, 60, 60


class Target(NamedTuple):
    """A file that is damaged, and what is done with it then, as by somebody at the keyboard."""

    file: Path
    use: Callable[[], object]


def dataset(folder: Path) -> Target:
    (folder / "pictures").mkdir()
    for number in range(3):
        Image.fromarray(np.full((8, 8, 3), 80 * number, np.uint8)).save(folder / "pictures" / f"{number}.png")
    out = str(folder / "out")
    words = ["--resolution", "8", "--vae", "identity", "--unconditional", "--workers", "0", "--shard-size", "2"]
    prepare([str(folder / "pictures"), out, *words])

    def use() -> None:
        open_dataset(out).read([0, 1], [False, True], images=True)
        prepare([str(folder / "pictures"), out, *words])
        prepare([out, "--verify"])

    return Target(folder / "out" / "dataset.json", use)


def note(folder: Path) -> Target:
    """Of a shard that is complete, while the data set is not."""
    target = dataset(folder)
    manifest = json.loads(target.file.read_text())
    shard = manifest["shards"][0]
    file = target.file.with_name(shard["name"]).with_suffix(".json")
    file.write_text(json.dumps({"basis": {}, "shard": shard, "skipped": [{"index": 1, "reason": "x"}]}))
    target.file.write_text(json.dumps({**manifest, "complete": False, "shards": [], "count": 0}))
    words = ["--resolution", "8", "--vae", "identity", "--unconditional", "--workers", "0", "--shard-size", "2"]
    return Target(file, lambda: prepare([str(folder / "pictures"), str(file.parent), "--max-bad", "1", *words]))


def draw(folder: Path) -> None:
    words = ["--num-samples", "2", "--steps", "1", "--solver", "euler", "--batch-size", "2"]
    sample.main(["--checkpoint", str(folder / "model"), "--out", str(folder / "out"), *words])


def model(folder: Path) -> Target:
    tiny_model(class_names=["a", "b", "c"]).save_pretrained(folder / "model")
    return Target(folder / "model" / "config.json", lambda: draw(folder))


def settings(folder: Path) -> Target:
    tiny_model().save_pretrained(folder / "model")
    draw(folder)
    return Target(folder / "out" / "settings.json", lambda: draw(folder))


def autoencoder(folder: Path) -> Target:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks).save_pretrained(folder)
    return Target(folder / "config.json", lambda: load_autoencoder(str(folder)).encode(torch.zeros(1, 3, 16, 16)))


def repa(folder: Path) -> Target:
    (folder / "vae-sd").mkdir()
    names = ["img-mean-std-0.npy", "img-mean-std-1.npy"]
    for name in names:
        np.save(folder / "vae-sd" / name, np.zeros((8, 2, 2), np.float32))
    file = folder / "vae-sd" / "dataset.json"
    file.write_text(json.dumps({"labels": [[name, 0] for name in names]}))
    return Target(file, lambda: open_dataset(str(folder)).read([0, 1], [False, False]))


def scores(folder: Path) -> Target:
    report = {"metrics": {"fid": 1.0}, "samples": {"count": 3}, "reference": {"path": "x", "kind": "npz"}}
    (folder / "scores.json").write_text(json.dumps({**report, "warnings": ["few"]}))
    return Target(folder / "scores.json", lambda: read_json(folder / "scores.json", Scores))


def position(folder: Path) -> Target:
    sums = {"names": ["loss"], "rows": [[1.5, 3.0]]}
    numbers = {"step": 3, "images": 24, "processes": 1, "averages": sums, "guard": {"skipped": 0, "row": 0}}
    (folder / "weights.safetensors").write_bytes(b"x")
    write_position(folder, {**numbers, "best": [3, 0.5], "scaler": None})
    return Target(folder / "position.json", lambda: read_position(folder))


def log(folder: Path) -> Target:
    """Its only line; one beside it is whole."""
    whole = json.dumps({"step": 1, "loss": 1.0, "grad_norm": 1.0, "images_per_second": 3.5, "mfu": None})

    def use() -> None:
        path = folder / "log.jsonl"
        path.write_bytes(whole.encode() + b"\n" + path.read_bytes() + b"\n" + whole.encode() + b"\n")
        plot.main([str(folder), "--out", str(folder / "curves.png")])

    (folder / "log.jsonl").write_text(whole)
    return Target(folder / "log.jsonl", use)


def configuration(folder: Path) -> Target:
    """JSON is YAML."""
    values = yaml.safe_load(QUICKSTART.read_text())
    values["alignment"] = {"block": 1, "teachers": [{"name": "x"}]}
    (folder / "config.yaml").write_text(json.dumps(values))
    return Target(folder / "config.yaml", lambda: load_config(folder / "config.yaml"))


TARGETS = (dataset, note, model, settings, autoencoder, repa, scores, position, log, configuration)


def require_orderly_end(use: Callable[[], object], capsys: pytest.CaptureFixture) -> None:
    """Code 0 or 2, a paragraph where it is 2, and within a minute."""

    def hang(*_: object) -> None:
        raise AssertionError(f"not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    capsys.readouterr()
    try:
        with exit_on_input_error():
            use()
    except SystemExit as end:
        error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert end.code == 2 and error and len(error[-1]) < 3_000
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("make", "seed"),
    [
        pytest.param(make, seed, id=f"{make.__name__}-{seed}", marks=[pytest.mark.slow] if seed >= FEW else [])
        for make in TARGETS
        for seed in range(MANY)
    ],
)
def test_damage(make: Callable[[Path], Target], seed: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = make(tmp_path)
    target.file.write_bytes(damaged_text(json.loads(target.file.read_text()), np.random.default_rng(seed)))
    require_orderly_end(target.use, capsys)


@pytest.mark.parametrize("make", TARGETS)
def test_what_is_no_json(make: Callable[[Path], Target], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = make(tmp_path)
    for text in TEXTS:
        target.file.write_bytes(text)
        require_orderly_end(target.use, capsys)

"""Benchmarks as a user runs them: a table is printed, and JSON says what ran where; figures are drawn from it."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.operator import all_mixings
from benchmarks.timing import default_device, peak_mebibytes

COMMANDS = {
    "operator": "--sides 8 16 --channels 32 --turns 1 --batch-size 1",
    "model": "--sizes S/8 --latents 8 --turns 1 --batch-size 1",
    "training": "--models SiT-S/8 --latent 8 --settings cached --batch-size 1 --teacher test_vit --turns 1",
    "sampling": "--model SiT-ATConv-S/8 --input-size 8 --batch-size 2 --labels 1 --steps 2 --turns 1",
    "evaluation": "--neighbours 40 30",
}


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m benchmarks.NAME ARGUMENTS` in this process."""
    words = ["python", "-m", f"benchmarks.{name}", *arguments]
    monkeypatch.setattr(sys, "argv", words[2:])
    monkeypatch.setattr(sys, "orig_argv", words)
    importlib.import_module(f"benchmarks.{name}").main()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_prints_and_writes(name, written, monkeypatch, capsys) -> None:
    monkeypatch.chdir(written)
    run(name, COMMANDS[name].split(), monkeypatch)
    *table, _, last = capsys.readouterr().out.splitlines()
    assert len(table) > 1
    assert last == f"Written to {name}.json."
    found = json.loads(Path(f"{name}.json").read_text())
    assert found["command"] == f"python -m benchmarks.{name} {COMMANDS[name]}"
    assert f"torch {torch.__version__}" in found["machine"]
    assert len(found["rows"]) >= 1


def test_figures_are_drawn_from_what_was_written(written, monkeypatch, tmp_path) -> None:
    for name in ("operator", "model"):
        if not (written / f"{name}.json").exists():
            run(name, [*COMMANDS[name].split(), "--json", str(written / f"{name}.json")], monkeypatch)
    run("figures", [str(written / "operator.json"), str(written / "model.json"), "--out", str(tmp_path)], monkeypatch)
    for name in ("operator", "model"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 600
            assert len(image.getcolors(image.width * image.height)) > 10


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_peak_memory_is_what_is_held_at_once(kept) -> None:
    x = torch.zeros(2**18, device=default_device())  # 1 MiB

    def hold() -> torch.Tensor:
        held = [x + i for i in range(kept)]
        return held[0] + 1

    assert peak_mebibytes(hold, x.device) == kept + 1


def test_the_released_mixing_is_the_same_function() -> None:
    q, k, v = torch.randn(3, 2, 5, 7, 6, dtype=torch.float64)
    mixings = all_mixings(6, q.dtype, q.device)
    theirs = mixings["ATConv, released"](q, k, v)
    torch.testing.assert_close(theirs, mixings["ATConv"](q, k, v), rtol=1e-12, atol=1e-12)

"""Benchmarks as a user runs them: a table is printed, and JSON says what ran where; figures are drawn from it."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.mixers import add_mixers
from benchmarks.operator import all_mixings
from sit_atconv.runtime.measuring.memory import peak_mebibytes
from sit_atconv.runtime.measuring.timing import default_device

COMMANDS = {
    "operator": "--sides 8 16 --channels 32 --turns 1 --batch-size 1",
    "model": "--sizes S/8 --latents 8 --turns 1 --batch-size 1",
    "training": "--models SiT-S/8 --latent 8 --settings cached --batch-size 1 --teacher test_vit --turns 1",
    "sampling": "--model SiT-ATConv-S/8 --input-size 8 --batch-size 2 --labels 1 --steps 2 --turns 1",
    "evaluation": "--neighbours 40 30",
    "spaces": "--samples 40 --references 30",
    "block": "--size S --sides 2 --turns 1 --batch-size 1",
}
MIXERS = {
    "operator": "--mixers attention inline --sides 8 --channels 32 --turns 1",
    "block": "--mixers attention inline --size S --sides 2 4 --turns 1 --batch-size 1",
}
MODELS = "--mixers attention inline --sizes S/8 --latents 16 --turns 1 --batch-size 1"


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m benchmarks.NAME ARGUMENTS` in this process."""
    words = ["python", "-m", f"benchmarks.{name}", *arguments]
    monkeypatch.setattr(sys, "argv", words[2:])
    monkeypatch.setattr(sys, "orig_argv", words)
    importlib.import_module(f"benchmarks.{name}").main()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json")


def printed_and_written(
    name: str, arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[list[str], list[dict]]:
    """The table that a benchmark prints, and the rows of the JSON that it writes into the current folder."""
    run(name, arguments.split(), monkeypatch)
    *table, _, last = capsys.readouterr().out.splitlines()
    assert len(table) > 1
    assert last == f"Written to {name}.json."
    found = json.loads(Path(f"{name}.json").read_text())
    assert found["command"] == f"python -m benchmarks.{name} {arguments}"
    assert f"torch {torch.__version__}" in found["machine"]
    assert len(found["rows"]) >= 1
    return table, found["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_prints_and_writes(name, written, monkeypatch, capsys) -> None:
    monkeypatch.chdir(written)
    printed_and_written(name, COMMANDS[name], monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
def test_registered_mixers_are_measured_by_name(name, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    table, rows = printed_and_written(name, MIXERS[name], monkeypatch, capsys)
    assert any("attention" in line for line in table) and any("inline" in line for line in table)
    assert {row["gradients"] for row in rows} == {False, True}
    for row in rows:
        for quantity in ("milliseconds", "mebibytes", "operations"):
            assert list(row[quantity]) == ["attention", "inline"]
            assert all(number > 0 for number in row[quantity].values())
    if name != "block":  # figures are of the default contenders
        with pytest.raises(SystemExit):
            run("figures", [f"{name}.json", "--out", "."], monkeypatch)
        assert "without --mixers" in capsys.readouterr().err


def test_models_of_registered_mixers_are_measured_by_name(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    _, rows = printed_and_written("model", MODELS, monkeypatch, capsys)
    assert [row["model"] for row in rows] == ["SiT-S/8, attention", "SiT-S/8, inline"]
    assert all(row[key] > 0 for row in rows for key in ("forward_ms", "step_ms", "forward_mib", "step_mib", "flops"))
    with pytest.raises(SystemExit):
        run("figures", ["model.json", "--out", "."], monkeypatch)
    assert "without --mixers" in capsys.readouterr().err


def test_without_names_all_mixers_are_compared_and_unknown_ones_are_refused(capsys) -> None:
    parser = argparse.ArgumentParser()
    add_mixers(parser)
    assert [parser.parse_args(words).mixers for words in ([], ["--mixers"], ["--mixers", "hydra"])] == [
        None,
        [],
        ["hydra"],
    ]
    with pytest.raises(SystemExit):
        parser.parse_args(["--mixers", "hydro"])
    assert "hydra" in capsys.readouterr().err


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

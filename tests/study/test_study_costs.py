"""`python -m sit_atconv.study costs`: what it counts, what it measures, and what it refuses before measuring."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from sit_atconv.models import create_model
from sit_atconv.models.flops import forward_flops
from sit_atconv.models.mixers import list_mixers
from sit_atconv.models.mixers import registry as mixers
from sit_atconv.study.costs import command, main
from sit_atconv.study.costs.command import chosen_models, examine, measure

HALVING = """
from torch import nn
from sit_atconv.models.mixers import register_mixer

@register_mixer("halving")
class Halving(nn.Module):
    def __init__(self, dim): super().__init__(); self.proj = nn.Linear(dim, dim)
    def forward(self, x, grid): return self.proj(x) / 2
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch) -> str:
    (tmp_path / "halving.py").write_text(HALVING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(mixers, "_MIXERS", dict(mixers._MIXERS))
    monkeypatch.delitem(sys.modules, "halving", raising=False)
    return "halving"


def refused(capsys, *words: str) -> str:
    """The paragraph on standard error of a command that must end with code 2 before anything is measured."""
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_mixers_take_the_place_of_all_of_the_first_models() -> None:
    models = chosen_models(["SiT-S/2", "SiT-Hybrid-S/4"], ["inline"])
    assert list(models) == ["SiT-S/2", "SiT-Hybrid-S/4", "SiT-S/2 with inline"]
    assert models["SiT-S/2 with inline"].mixer_pattern == "inline"
    assert list(chosen_models(["SiT-S/2"], None)) == ["SiT-S/2"]
    every = [name.partition(" with ")[2] for name in chosen_models(["SiT-S/2"], [])]
    assert every == ["", *(name for name in list_mixers() if name != "attention")]


def test_parameters_and_operations_are_those_of_the_model() -> None:
    title, config = list(chosen_models(["SiT-S/8"], ["inline"]).items())[1]
    subject, model = examine(title, config, 16), create_model("SiT-S/8", mixer_pattern="inline")
    assert subject.parameters == sum(p.numel() for p in model.parameters())
    assert subject.flops == forward_flops(model, (4, 16, 16))


@pytest.mark.slow
def test_everything_is_measured_and_written(plugin: str, tmp_path: Path, capsys) -> None:
    words = ["--models", "SiT-S/8", "--mixers", "halving", "--plugins", plugin, "--latents", "8", "--turns", "1"]
    main([*words, "--batch-size", "1", "--json", str(tmp_path / "new" / "costs.json")])
    found = json.loads((tmp_path / "new" / "costs.json").read_text())
    assert (found["batch"], found["compiled"]) == (1, False) and f"torch {torch.__version__}" in found["machine"]
    first, second = found["rows"]
    assert (first["model"], second["model"]) == ("SiT-S/8", "SiT-S/8 with halving")
    assert (first["forward_ratio"], first["step_ratio"]) == (1, 1)
    assert second["step_ratio"] == pytest.approx(second["step_ms"] / first["step_ms"], abs=1e-3)
    for row in found["rows"]:
        assert row["step_ms"] > 0 and row["forward_ms"] > 0
        gradients = 4 * row["parameters"] / 2**20
        assert row["step_mib"] > 0.99 * gradients > row["forward_mib"] > 0
    table = capsys.readouterr().out
    assert "| SiT-S/8 with halving | 8 |" in table and "(1.00)" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--models SiT-S/3", "Unknown model 'SiT-S/3': did you mean 'SiT-S/"),
        ("--models SiT-S/2 --mixers hydro", "SiT-S/2 with hydro for latents of 32x32: Unknown mixer 'hydro': did you"),
        ("--models SiT-S/2 --latents 32 15", "SiT-S/2 for latents of 15x15: "),
        ("--models SiT-S/2 --plugins no_such_module", "The plugin no_such_module cannot be imported"),
        ("--models SiT-S/2 --batch-size 9999999", "a step of 9999999 images at least .* GiB are free. Take fewer"),
        ("--models SiT-S/2 --turns 0", "'0' is not a whole number from 1"),
        ("--latents 8", "--models"),
    ],
)
def test_what_cannot_be_measured_is_said_before(words: str, message: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("measured"))
    assert re.search(message, refused(capsys, *words.split()))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_memory_that_runs_out_is_one_paragraph(error: RuntimeError, capsys, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(command, "build_session", fail)
    assert "Memory ran out with 1 models at latents of 8x8" in refused(
        capsys, "--models", "SiT-S/8", "--latents", "8", "--batch-size", "1"
    )


def test_other_errors_keep_their_traceback(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(command, "build_session", fail)
    subjects = {"SiT-S/8": examine("SiT-S/8", chosen_models(["SiT-S/8"], None)["SiT-S/8"], 8)}
    options = command._parser().parse_args(["--models", "SiT-S/8", "--batch-size", "1"])
    with pytest.raises(RuntimeError, match="a fault"):
        measure(subjects, 8, options, torch.device("cpu"))

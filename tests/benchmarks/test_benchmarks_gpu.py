"""`make gpu`: its orchestration with stand-in parts, the options of the real ones, and the tables of their results."""

import argparse
import importlib
import json
import re
import shlex
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Part, all_parts, main, run_parts
from benchmarks.gpu_tables import TABLES, TITLES, write_tables
from sit_atconv.errors import InputError

ROOT = Path(__file__).parents[2]
RESULTS, MEASUREMENTS = ROOT / "benchmarks" / "results", ROOT / "sit_atconv" / "ops" / "measurements.json"
H200 = "NVIDIA H200, torch 2.11"


def stand_in(code: str, seconds: int = 30, needs: Path | None = None) -> Part:
    return Part(f"-c {shlex.quote(code)}", seconds, needs)


def states(found: dict[str, dict]) -> dict[str, str]:
    return {name: part["state"] for name, part in found.items()}


def test_a_failing_part_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    parts = {
        "bad": stand_in("print('so far'); raise SystemExit('no such option')"),
        "missing": stand_in("import no_such_package.inner"),
        "no file": stand_in("print(1)", needs=tmp_path / "weights.pth"),
        "slow": stand_in("import time; time.sleep(60)", seconds=1),
        "good": stand_in("open('OUT/good.json', 'w').write('[]'); print('16 passed')"),
    }
    found = run_parts(parts, tmp_path, H200, 60)
    expected = ("failed", "skipped", "skipped", "failed", "done")
    assert tuple(states(found).values()) == expected
    assert "no such option" in found["bad"]["note"] and "bad.log" in found["bad"]["note"]
    assert "package no_such_package is missing" in found["missing"]["note"]
    assert "longer than 1 s" in found["slow"]["note"]
    assert found["good"]["note"] == "16 passed" and (tmp_path / "good.json").read_text() == "[]"
    write_tables(tmp_path, H200, found)
    assert "| slow | failed |" in (tmp_path / "gpu.md").read_text()


def test_what_is_done_is_not_repeated_and_what_was_interrupted_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "_LEAST", 0)
    count = "p = open('OUT/counted', 'a'); p.write('x'); p.close()"
    parts = {"first": stand_in(count), "second": stand_in("import time; time.sleep(60)")}
    run_parts({"first": parts["first"]}, tmp_path, H200, 60)
    assert states(run_parts(parts, tmp_path, H200, 1)) == {"first": "done", "second": "waiting"}
    parts["second"] = stand_in("print(1)")
    assert states(run_parts(parts, tmp_path, H200, 60)) == {"first": "done", "second": "done"}
    assert (tmp_path / "counted").read_text() == "x"
    run_parts({"first": stand_in(count + "  # another command")}, tmp_path, H200, 60)
    assert (tmp_path / "counted").read_text() == "xx"


def test_no_part_begins_when_the_time_is_up(tmp_path: Path) -> None:
    found = run_parts({"late": stand_in("open('OUT/late', 'w')")}, tmp_path, H200, 5)
    assert states(found) == {"late": "waiting"} and not (tmp_path / "late").exists()


def test_a_part_that_is_ended_takes_along_what_it_has_started(tmp_path: Path) -> None:
    child = f"import time; time.sleep(3); open({str(tmp_path / 'left')!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(30)"
    run_parts({"parent": stand_in(code, seconds=2)}, tmp_path, H200, 60)
    time.sleep(2)
    assert not (tmp_path / "left").exists()


def test_results_of_another_gpu_and_other_files_are_refused(tmp_path: Path) -> None:
    run_parts({"one": stand_in("print(1)")}, tmp_path, H200, 60)
    with pytest.raises(InputError, match=r"holds the results of NVIDIA H200, .* and this is NVIDIA A100"):
        run_parts({}, tmp_path, "NVIDIA A100", 60)
    (tmp_path / "parts.json").write_text("[]")
    with pytest.raises(InputError, match="is no file of this program"):
        run_parts({}, tmp_path, H200, 60)


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(["--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == "There is no GPU here that torch can use, so there is nothing to measure.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("code", "ended"), [("print('fine')", 0), ("raise ValueError('wrong')", 1)])
def test_the_command_on_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch, capsys, code: str, ended: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu, "all_parts", lambda weights: {"one": stand_in(code)})
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "new" / "out")])
    assert stopped.value.code == ended
    assert f"1 {'failed' if ended else 'done'}: " in capsys.readouterr().out
    assert (tmp_path / "new" / "out" / "gpu.md").read_text().startswith("# NVIDIA H200, torch ")


class Parsed(Exception):
    """Raised instead of running a benchmark whose options were understood."""


@pytest.mark.parametrize("name", [*all_parts(Path("weights.pth"))])
def test_the_options_of_every_part_are_known(name: str, monkeypatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, *arguments: object) -> None:
        parse(self, *arguments)
        raise Parsed

    _, module, *words = shlex.split(all_parts(Path("weights.pth"))[name].words)
    if name == "tests":
        assert module == "pytest" and words[-1].startswith("tests/") and Path(words[-1]).is_file()
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [module, *words])
    if words[0] == "costs":
        command = importlib.import_module(f"{module}.costs").main
    else:
        command = importlib.import_module(module).main
    with pytest.raises(Parsed):
        command(words[1:]) if words[0] == "costs" else command()


def test_all_parts_are_within_reach_of_one_run() -> None:
    """Each part's limit is far above what it should take; together with another they still fit."""
    parts = all_parts(Path("weights.pth"))
    assert max(part.seconds for part in parts.values()) < gpu.SECONDS / 2
    assert set(TABLES) == set(TITLES) == set(parts) - {"tests"}


@pytest.mark.parametrize("name", ["backends", "operator", "block", "model", "training", "sampling", "costs"])
def test_results_become_tables(name: str, tmp_path: Path) -> None:
    """Of the files that the same benchmarks wrote on a CPU."""
    path = MEASUREMENTS if name == "backends" else RESULTS / f"{name}.json"
    (tmp_path / f"{name}.json").write_text(path.read_text())
    part = {"state": "done", "seconds": 1, "note": "", "command": f"python -m benchmarks.{name}"}
    write_tables(tmp_path, H200, {name: part})
    text = (tmp_path / "gpu.md").read_text()
    lines = [line for line in text[text.index("## ") :].splitlines() if line.startswith("| ")]
    assert len(lines) > 2 and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert len(TABLES[name](json.loads(path.read_text()))) == len(lines) - 1

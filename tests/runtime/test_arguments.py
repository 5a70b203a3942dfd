"""Numbers and mistakes on command lines."""

import os
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from sit_atconv.data.prepare.__main__ import main as prepare
from sit_atconv.evaluation.command import parse
from sit_atconv.runtime.arguments import Parser, whole_number

ROOT = Path(__file__).parents[2]
HUGE = "1" + "0" * 30


@pytest.mark.parametrize("word", ["-1", "0", "6", HUGE, "9" * 5_000, "1.0", "", "x", "１", "²", "\x00"])
def test_what_is_no_number_within_the_limits(word: str) -> None:
    if word == "１":  # a digit to Python, and to int()
        assert whole_number(1, 5)(word) == 1
        return
    with pytest.raises(ArgumentTypeError, match="is not a whole number from 1 to 5"):
        whole_number(1, 5)(word)


def test_a_mistake_is_one_paragraph(capsys: pytest.CaptureFixture) -> None:
    parser = Parser(prog="x")
    parser.add_argument("--steps", type=whole_number(1))
    assert parser.parse_args(["--steps", "7"]).steps == 7
    for words in (["--step", "7"], ["--steps", HUGE], ["more"]):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(words)
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and line.startswith("error: ") and line.endswith("All options: x --help")


@pytest.mark.parametrize(
    "words", [["--batch-size", HUGE], ["--workers", HUGE], ["--shard-size", HUGE], ["--max-bad", HUGE]]
)
def test_preparation(words: list[str], capsys: pytest.CaptureFixture) -> None:
    for given in (words, ["--resolution", HUGE], ["--resolution", "9" * 5_000], ["--resolution", "8x0"]):
        with pytest.raises(SystemExit) as end:
            prepare(["digits", "out", "--vae", "identity", "--resolution", "8", *given])
        assert end.value.code == 2 and len(capsys.readouterr().err) < 300
    with pytest.raises(SystemExit):
        parse([], lambda parser: [])


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["train.py", "--config", "configs/quickstart.yaml", "--run", "unmade", "--training.stepz", "3"],
        ["train.py", "--config", "configs/quickstart.yaml", "--run", "unmade", "--training.steps", HUGE],
        ["sample.py", "--checkpoint", "nowhere", "--out", "unmade", "--steps", "0"],
        ["evaluate_fid.py", "--samples", "digits"],
        ["-m", "sit_atconv.data.prepare", "digits"],
    ],
)
def test_a_mistake_is_told_once_by_several_processes(words: list[str]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    script = ["-m", "--", *words[1:]] if words[0] == "-m" else ["--", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1, done.stderr
    assert "exitcode  : 2" in done.stderr

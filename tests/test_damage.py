"""Damaged files: every command ends with code 0 or 2, without a traceback and soon.

A case that fails is repeated by its name: `pytest "tests/test_damage.py::test_damage[dataset-17]"`. `tests/damage.py`
says how to try many.
"""

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damage import SECONDS, TEXTS, complaint, damage
from damage_targets import TARGETS, TARGETS_OF_JSON, Target

from sit_atconv.errors import exit_on_input_error

FEW, MANY = 3, 40


def require_orderly_end(use: Callable[[], object], capsys: pytest.CaptureFixture) -> None:
    """Code 0 or 2, a paragraph where it is 2, and within a minute."""

    def hang(*_: object) -> None:
        raise AssertionError(f"not done after {SECONDS} seconds")

    before, code = signal.signal(signal.SIGALRM, hang), 0
    signal.alarm(SECONDS)
    capsys.readouterr()
    try:
        with exit_on_input_error():
            use()
    except SystemExit as end:
        code = end.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert complaint(code, capsys.readouterr().err) is None


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
    damage(target, np.random.default_rng(seed))
    require_orderly_end(target.use, capsys)


@pytest.mark.parametrize("make", TARGETS_OF_JSON)
def test_what_is_no_json(make: Callable[[Path], Target], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = make(tmp_path)
    for text in TEXTS:
        target.file.write_bytes(text)
        require_orderly_end(target.use, capsys)

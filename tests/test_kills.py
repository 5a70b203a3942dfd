"""The driver that kills, in the small: `tests/kills.py` says how to run it for long."""

from pathlib import Path

import pytest
from kills import COMMANDS, kill_and_compare


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_what_was_killed_and_went_on_is_what_nobody_killed(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert kill_and_compare(name, kills=4, seed=0, folder=tmp_path) > 0

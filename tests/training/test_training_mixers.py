"""Every registered mixer trains: 300 steps of the quickstart's own configuration, to their end."""

from pathlib import Path

import pytest
from training_runs import NO_PREVIEW, QUICKSTART, fresh_accelerate, number_lines

from sit_atconv.config import load_config
from sit_atconv.models.mixers import list_mixers
from sit_atconv.training import train


@pytest.mark.long
@pytest.mark.parametrize("mixer", list_mixers())
def test_the_loss_falls(mixer: str, tmp_path: Path) -> None:
    fresh_accelerate()
    words = f"{NO_PREVIEW} --model.mixer_pattern {mixer} --training.steps 300 --log.checkpoint_every 300"
    train(load_config(QUICKSTART, words.split()), tmp_path / mixer)
    lines = number_lines(tmp_path / mixer)
    assert lines[-1]["step"] == 300 and not any(line["skipped"] for line in lines)
    assert (tmp_path / mixer / "checkpoints" / "latest").exists()
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]

"""A run that is stopped and continued, beside one that is not."""

from pathlib import Path

import pytest
from training_runs import NO_PREVIEW, assert_same_checkpoint, number_lines, run_tiny

from sit_atconv.training.trainer import Trainer

_TERMS = ("step", "loss", "flow", "internal", "alignment", "dispersion", "grad_norm", "lr", "skipped")


def terms(run: Path) -> list[dict]:
    """What the log says of each step, but for speed and memory."""
    return [{name: line[name] for name in _TERMS if name in line} for line in number_lines(run) if "loss" in line]


def require_same_when_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch, extra: str) -> list[dict]:
    """Train 6 steps at once, and as many in two parts, and require the same to the last bit; returns the log's terms.

    The second run fails in its fifth step, two steps after its checkpoint.
    """
    extra = f"{NO_PREVIEW} --log.checkpoint_every 2 {extra}"
    run_tiny(folder / "whole", extra)
    step = Trainer.step

    def failing(self: Trainer) -> None:
        if self.position.step == 4:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(folder / "parts", extra)
    assert len(terms(folder / "parts")) == 4
    run_tiny(folder / "parts", extra)
    assert terms(folder / "parts") == terms(folder / "whole")
    assert_same_checkpoint(*(folder / run / "checkpoints" / "latest" for run in ("parts", "whole")))
    return terms(folder / "whole")

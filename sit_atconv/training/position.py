"""The position of a run: all of its state except tensors of the model's size, as plain numbers."""

from pathlib import Path
from typing import Any

from sit_atconv.training.run.guard import Guard
from sit_atconv.training.run.log import Averages
from sit_atconv.training.session.session import Session


class Position:
    """Optimizer steps done (`step`), means since the last line of the log, skipped steps, and the best score."""

    def __init__(self, session: Session, run: Path) -> None:
        self._session, accelerator = session, session.accelerator
        self.step = 0
        self.averages = Averages(accelerator)
        self.guard = Guard(session.config.training.max_bad_steps, session.batch_indices, run, accelerator)
        self.best: tuple[int, float] | None = None  # step and score

    def note_score(self, score: float) -> bool:
        """Record this step's score, where lower is better, and return whether it is the best so far."""
        if self.best is not None and score >= self.best[1]:
            return False
        self.best = self.step, score
        return True

    def state(self) -> dict[str, Any]:
        """The state for `restore`. All processes call it."""
        scaler, guard = self._session.accelerator.scaler, self.guard.state()
        return {
            "step": self.step,
            "images": self.step * self._session.config.training.batch_size,
            "data": self._session.data,
            "processes": self._session.accelerator.num_processes,
            "averages": self.averages.state(),
            "guard": guard,
            # By name, the first of them in model/: how much of each are the weights that the run began with
            "weights": self._session.averages.first_shares(self.step, guard["skipped"]),
            "best": self.best,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def restore(self, state: dict[str, Any]) -> list[str]:
        """Continue from a state; returns notes about what will not be exactly reproduced."""
        accelerator = self._session.accelerator
        self.step, self.best = state["step"], state["best"] and tuple(state["best"])
        self.averages.restore(state["averages"])
        self.guard.restore(state["guard"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        before, now = state["processes"], accelerator.num_processes
        if before == now:
            return []
        return [
            f"Continued on {now} processes instead of {before}: the order of the data and all noise stay the same, "
            "sums are rounded in another order."
        ]

"""The position of a run: all of its state except tensors of the model's size, as plain numbers."""

from pathlib import Path
from typing import Any

from sit_atconv.training.run.guard import Guard
from sit_atconv.training.run.log import Averages
from sit_atconv.training.session.trained import Trained


class Position:
    """Optimizer steps done (`step`), means since the last line of the log, skipped steps, and the best score.

    `seconds` are those of training before the current step, the same on all processes. `out_of_time`: they have reached
    training.max_seconds, so the current step is the last one.
    """

    def __init__(self, session: Trained, run: Path) -> None:
        self._session, accelerator = session, session.accelerator
        self.step, self.seconds, self.out_of_time = 0, 0.0, False
        self.averages = Averages(accelerator)
        self.guard = Guard(session.config.training.max_bad_steps, session.batch_indices, run, accelerator)
        self.best: tuple[int, float] | None = None  # step and score
        self.measure: str | None = None  # what the score is; unknown in checkpoints of earlier versions

    @property
    def complete(self) -> bool:
        """Whether the run ends with the current step."""
        return self.out_of_time or self.step >= self._session.config.training.steps

    @property
    def ending(self) -> str:
        """How a complete run has ended."""
        if self.out_of_time:
            return f"its time (training.max_seconds) is over after {self.step} steps"
        return f"all {self.step} steps are done"

    def begin_step(self) -> None:
        """Count a step, which is the last one if the time is over."""
        self.step += 1
        self.out_of_time = self._is_time_over()

    def note_score(self, measure: str, score: float | None) -> bool:
        """Record this step's score, where lower is better, and return whether it is the best so far.

        Scores of another measure, as before the evaluation was changed, are not compared. None is never the best.
        """
        comparable = self.best is not None and self.measure in (measure, None)
        if score is None or (comparable and score >= self.best[1]):
            return False
        self.best, self.measure = (self.step, score), measure
        return True

    def state(self, seconds: float) -> dict[str, Any]:
        """The state for `restore`, after so many `seconds` of training. All processes call it."""
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
            "measure": self.measure,
            "seconds": seconds,
            "out_of_time": self.out_of_time,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def restore(self, state: dict[str, Any]) -> list[str]:
        """Continue from a state; returns notes about what will not be exactly reproduced."""
        accelerator = self._session.accelerator
        self.step, self.best = state["step"], state["best"] and tuple(state["best"])
        self.measure, self.seconds = state.get("measure"), state.get("seconds", 0.0)  # absent in earlier versions
        self.out_of_time = state.get("out_of_time", False) and self._is_time_over()  # the limit may have been raised
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

    def _is_time_over(self) -> bool:
        limit = self._session.config.training.max_seconds
        return limit is not None and self.seconds >= limit

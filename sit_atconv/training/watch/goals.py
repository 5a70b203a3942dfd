"""Values that scores of a run are to reach, and after how many epochs they did (RAEv2's EP_FID@k for a FID of k)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sit_atconv.config import EvaluationConfig
from sit_atconv.training.run.log import Record
from sit_atconv.training.run.measures import HELDOUT, find_score, lower_is_better

# A note of the log that begins with one of these says that from there on something else was measured.
_OF_SAMPLES = ("reference", "samples", "features", "weights", "solver", "steps", "guidance", "interval")
_OF_SAMPLES += ("internal_guidance", "internal_interval")
_SAMPLES_CHANGED = ("evaluation:", *(f"evaluation.{key}:" for key in _OF_SAMPLES))
_LOSS_CHANGED = ("data.heldout:",)


@dataclass(frozen=True)
class Goal:
    """A value that a score is to reach: at most this high, or at least where higher is better."""

    name: str
    value: float

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {self.value:.15g}"

    @property
    def key(self) -> str:
        """What the log calls the epochs to it, such as "epochs_to_fid_2"."""
        return f"epochs_to_{self.name}_{self.value:.15g}"

    @property
    def sign(self) -> str:
        """The relation of a score that has reached it to the value: "≤" or "≥"."""
        return "≤" if lower_is_better(self.name) else "≥"

    def is_reached(self, scores: Mapping[str, Any]) -> bool:
        """Whether these scores reach it; not if its own is missing, or not a number."""
        score = scores.get(find_score(self.name, scores))
        if not isinstance(score, int | float):
            return False
        return score <= self.value if lower_is_better(self.name) else score >= self.value


def goals_of(config: EvaluationConfig | None) -> list[Goal]:
    """The goals of a configuration."""
    return [Goal(name, value) for name, value in ((config and config.goals) or {}).items()]


class Goals:
    """The goals that a run has still to reach. The first evaluation that reaches one counts, whatever later ones say.

    Args:
        config: of the evaluations, or None for none.
        epochs: step -> epochs by then, images seen over images to train on.
    """

    def __init__(self, config: EvaluationConfig | None, epochs: Callable[[int], float]) -> None:
        self._config, self._epochs, self._ahead = config, epochs, goals_of(config)

    def recall(self, lines: Sequence[Record]) -> list[tuple[Goal, int]]:
        """Take from the log of a run that goes on what it has reached, since what is measured was last changed.

        Returns the goals that an evaluation had reached before they were set, and its step.
        """
        late = []
        for goal in list(self._ahead):
            same = _since(lines, _LOSS_CHANGED if goal.name == HELDOUT else _SAMPLES_CHANGED)
            said = any(goal.key in line for line in same)
            step = next((line["step"] for line in same if goal.is_reached(line)), None)
            if said or step is not None:
                self._ahead.remove(goal)
            if step is not None and not said:
                late.append((goal, step))
        return late

    def reach(self, scores: Mapping[str, Any]) -> list[Goal]:
        """The goals that these scores are the first to reach."""
        reached = [goal for goal in self._ahead if goal.is_reached(scores)]
        self._ahead = [goal for goal in self._ahead if goal not in reached]
        return reached

    def numbers(self, goals: Iterable[Goal], step: int) -> dict[str, float]:
        """What a line of the log says of goals that were reached at `step`: the epochs by then, by `Goal.key`."""
        return {goal.key: self._epochs(step) for goal in goals}

    def sentence(self, goal: Goal, step: int) -> str:
        """That a goal was reached at `step`, how often it was looked at, and whether samples were guided."""
        every, scales = self._config.every, described_guidance(self._config.guidance, self._config.internal_guidance)
        if goal.name == HELDOUT:
            how = ""
        elif not scales:
            how = ", of unguided samples"
        else:
            how = f", of samples with {scales} (published epochs to a FID are those of unguided ones)"
        when = f"{goal} is reached after {self._epochs(step):.4g} epochs, at step {step}"
        return f"{when}, by the first evaluation of those every {every} steps{how}."


def described_guidance(guidance: float, internal: float) -> str:
    """Such as "guidance 1.5 and internal guidance 1.9"; empty without guidance."""
    scales = {"guidance": guidance, "internal guidance": internal}
    return " and ".join(f"{name} {scale:g}" for name, scale in scales.items() if scale != 1)


def _since(lines: Sequence[Record], changes: tuple[str, ...]) -> Sequence[Record]:
    """The lines after the last note that begins with one of `changes`."""
    changed = [number for number, line in enumerate(lines) if str(line.get("note", "")).startswith(changes)]
    return lines[changed[-1] + 1 :] if changed else lines

"""The learning rate schedule."""

from sit_atconv.config import Config


def learning_rate(config: Config, step: int, seconds: float = 0.0) -> float:
    """The learning rate of step 1, 2, …, N, which begins after so many seconds of training.

    Without training.max_seconds it is a function of the step alone.
    """
    rates, steps, limit = config.optimizer, config.training.steps, config.training.max_seconds
    warm = min(1.0, step / rates.warmup_steps) if rates.warmup_steps else 1.0
    remaining = 1.0
    if rates.schedule == "linear":
        remaining = (steps - step + 1) / steps
        if limit is not None:
            remaining = min(remaining, max(1 - seconds / limit, 0.0))
    return rates.lr * min(warm, remaining)

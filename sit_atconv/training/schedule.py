"""The learning rate schedule."""

from sit_atconv.config import Config


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of step 1, 2, …, N: a function of the step alone, so no state needs saving."""
    rates, steps = config.optimizer, config.training.steps
    warm = min(1.0, step / rates.warmup_steps) if rates.warmup_steps else 1.0
    remaining = (steps - step + 1) / steps if rates.schedule == "linear" else 1.0
    return rates.lr * min(warm, remaining)

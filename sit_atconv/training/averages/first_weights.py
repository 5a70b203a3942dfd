"""What to say of averages that still are the weights before the first step, random ones or those of init_from."""

import math

from sit_atconv.config import Settings
from sit_atconv.models.checkpoint import NOTABLE_SHARE, percent
from sit_atconv.training.averages.ema import WeightAverages


def first_weights_note(
    averages: WeightAverages, step: int, skipped: int, config: Settings, steps: int, raw: str
) -> str | None:
    """How much of the averages after `step` are the weights that the run began with, and what to do about it.

    `steps` are those of the whole run; `raw` says where the weights in training are to be had. None when it is no more
    than 1 % of each.
    """
    shares = averages.first_shares(step, skipped)
    over = [name for name, share in shares.items() if share > NOTABLE_SHARE]
    if not over:
        return None
    parts = " and ".join(f"{percent(shares[name])} of the average {name}" for name in over)
    at_the_end = averages.first_shares(steps, skipped)
    if max(at_the_end[name] for name in over) > NOTABLE_SHARE:
        cure = f"A decay of {longest_decay(steps):g} or less (training.ema_decay) forgets them within {steps} steps."
    else:
        cure = f"By step {steps} it is 1 % or less."
    return (
        f"After step {step}, {parts} are still {_begun_with(config)} that the run began with, and samples and scores "
        f"show them. {cure} {raw}"
    )


def first_weights_caption(averages: WeightAverages, step: int, skipped: int, config: Settings) -> str | None:
    """The same in fewer words of the average that samples are drawn from, for their grid."""
    share = averages.first_shares(step, skipped)[averages.main]
    if share <= NOTABLE_SHARE:
        return None
    return (
        f"{percent(share)} of the average {averages.main} are still {_begun_with(config)} that the run began with: see "
        "the log, or sample.py --weights raw"
    )


def longest_decay(steps: int) -> float:
    """A round decay whose average keeps at most 1 % of the first weights after so many steps."""
    weight = -math.expm1(math.log(NOTABLE_SHARE) / steps)
    digits = 1 - math.floor(math.log10(weight))
    return round(1 - math.ceil(weight * 10**digits) / 10**digits, digits)


def _begun_with(config: Settings) -> str:
    return "the random weights" if config.model.init_from is None else "the weights of model.init_from"

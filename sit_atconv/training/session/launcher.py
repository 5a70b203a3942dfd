"""Settings that `accelerate launch` passes by environment variables and that a run's configuration also has."""

import os

from sit_atconv.config import Config
from sit_atconv.errors import InputError

_PREFIX = "ACCELERATE_"


def require_same_from_launcher(config: Config) -> None:
    """Raise `InputError` when the launcher was given another value than the configuration.

    A launcher without these options passes Accelerate's defaults ("no" precision, no compiler, one micro-batch for
    DeepSpeed), for which the configuration decides. `accelerate launch` passes the number of micro-batches only with
    DeepSpeed.
    """
    precision, micro_batches = config.training.precision, config.training.accumulation
    said = [  # variable, the launcher's option, its default, the configuration's key, its value
        ("MIXED_PRECISION", "mixed_precision", "no", "training.precision", precision),
        ("GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", "1", "training.accumulation", micro_batches),
        ("GRADIENT_CLIPPING", "gradient_clipping", "", "optimizer.clip_norm", config.optimizer.clip_norm),
        ("DYNAMO_BACKEND", "dynamo_backend", "no", "training.compile", None),  # another way to compile: always refused
    ]
    for variable, option, default, key, value in said:
        asked = os.environ.get(_PREFIX + variable, default).lower()
        if asked not in (default, "none", "auto") and not _is_same(asked, value):
            now = "" if value is None else f", which is {value} here"
            raise InputError(
                f"The launcher has --{option} {asked} (as an option or in its file), but {key} decides{now}: "
                f"remove it from the launcher, and set --{key} if you want another value."
            )


def _is_same(asked: str, value: object) -> bool:
    """Whether the launcher's text means the configuration's value: "1.0" is 1."""
    if isinstance(value, int | float):
        try:
            return float(asked) == value
        except ValueError:
            return False
    return asked == str(value)

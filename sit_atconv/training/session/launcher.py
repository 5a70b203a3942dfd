"""What `accelerate launch` says by environment variables that a run's configuration says, too."""

import os

from sit_atconv.config import Config
from sit_atconv.errors import InputError

_PREFIX = "ACCELERATE_"


def require_same_from_launcher(config: Config) -> None:
    """Raise `InputError` where the launcher asks for something else than the configuration.

    A launcher that was told nothing says what Accelerate has as defaults ("no" precision, no compiler, one micro-batch
    for DeepSpeed): then the configuration decides. How many micro-batches it was told, `accelerate launch` hands on
    with DeepSpeed only.
    """
    precision, micro_batches = config.training.precision, config.training.accumulation
    said = [  # variable, launcher's option, its default, the key of the configuration, its value
        ("MIXED_PRECISION", "mixed_precision", "no", "training.precision", precision),
        ("GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", "1", "training.accumulation", micro_batches),
        ("GRADIENT_CLIPPING", "gradient_clipping", "", "optimizer.clip_norm", config.optimizer.clip_norm),
        ("DYNAMO_BACKEND", "dynamo_backend", "no", "training.compile", None),  # which is another way to compile
    ]
    for variable, option, default, key, value in said:
        asked = os.environ.get(_PREFIX + variable, default).lower()
        if asked not in (default, "none", "auto") and not _is_same(asked, value):
            now = "" if value is None else f", which is {value} here"
            raise InputError(
                f"The launcher was told --{option} {asked} (or its configuration file was), but {key} decides{now}: "
                f"leave the option of the launcher out, and set --{key} if you want another value."
            )


def _is_same(asked: str, value: object) -> bool:
    """Whether a launcher's word means a configuration's value: "1.0" is 1."""
    if isinstance(value, int | float):
        try:
            return float(asked) == value
        except ValueError:
            return False
    return asked == str(value)

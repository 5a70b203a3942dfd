"""What `accelerate launch` says that a run's configuration says, too."""

from sit_atconv.config import Settings
from sit_atconv.runtime.launcher import Setting, require_same_from_launcher


def require_launcher_of(config: Settings) -> None:
    """Raise `InputError` where the launcher asks for something else than the configuration."""
    training = config.training
    require_same_from_launcher(
        Setting("mixed_precision", "no", "training.precision", training.precision),
        Setting("gradient_accumulation_steps", "1", "training.accumulation", training.accumulation),
        Setting("gradient_clipping", "", "optimizer.clip_norm", config.optimizer.clip_norm),
        Setting("dynamo_backend", "no", "training.compile"),  # which is another way to compile
    )

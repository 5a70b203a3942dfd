"""Opening a saved model, with errors that say what is wrong with it."""

import json
from pathlib import Path

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from sit_atconv.errors import InputError
from sit_atconv.models.sit import SiT


def model_directory(path: Path) -> Path:
    """Where in `path` the model is: in model/ of a checkpoint, in transformer/ of a saved pipeline, or there itself."""
    return next((path / name for name in ("model", "transformer") if (path / name / "config.json").exists()), path)


def load_model(path: str | Path) -> SiT:
    """Open a `model/` directory (config.json and safetensors), a checkpoint or a saved pipeline, in eval mode.

    Raises `InputError` when there is none, when it is not a SiT, or when its weights are damaged or do not fit.
    """
    path = Path(path)
    directory = model_directory(path)
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise InputError(
            f"{path} is not a checkpoint: there is no config.json in it. Give a directory written by training "
            "(RUN/checkpoints/latest/model) or by SiT.save_pretrained."
        )
    try:
        class_name = json.loads(config_path.read_text()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{config_path} cannot be read ({error}): the checkpoint is damaged.") from None
    if class_name != "SiT":
        raise InputError(f"{directory} holds a {class_name or 'model without a class name'}, not a SiT.")
    weights = directory / SAFETENSORS_WEIGHTS_NAME
    if not weights.exists() and not (directory / f"{SAFETENSORS_WEIGHTS_NAME}.index.json").exists():
        raise InputError(
            f"{directory} has no weights: {SAFETENSORS_WEIGHTS_NAME} is missing, the checkpoint is incomplete."
        )
    try:
        model, report = SiT.from_pretrained(directory, local_files_only=True, output_loading_info=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"The model in {directory} cannot be loaded: {error}") from None
    missing = report["missing_keys"]
    if missing:
        raise InputError(f"The weights in {directory} lack {len(missing)} tensors, {sorted(missing)[0]} first.")
    return model.eval()

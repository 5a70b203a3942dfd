"""Saving and restoring checkpoints: tensors as safetensors, numbers as JSON, each file with its digest.

Tensors are stored unsharded under the model's own names, so a run continues on any number of processes, sharded or not.
Nothing is pickled.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from sit_atconv.errors import InputError
from sit_atconv.training.averages.sharding import copy_whole, gather_whole, local, split_like
from sit_atconv.training.averages.statistics import statistics_of
from sit_atconv.training.run.integrity import read_position, write_position
from sit_atconv.training.session.optimizer import state_keys
from sit_atconv.training.session.trained import Trained
from sit_atconv.training.session.zero import set_whole, uses_zero, whole_moments

_WEIGHTS, _OPTIMIZER = "weights.safetensors", "optimizer.safetensors"


def gather_state(session: Trained, position: dict[str, Any]) -> Callable[[Path], None]:
    """Collect the state from all processes, and return a function that writes it to a folder. All processes call it."""
    main, parameters = session.accelerator.is_main_process, dict(session.bare.named_parameters())
    weights = gather_whole((*parameters.items(), *statistics_of(session.bare)), main)
    moments = gather_whole(
        ((f"{name}/{k}", tensor) for name, p in parameters.items() for k, tensor in _moments(session, p).items()), main
    )
    averages = {name: gather_whole(session.averages.tensors(name), main) for name in session.averages.profiles}

    def write(folder: Path) -> None:
        save_file(weights, folder / _WEIGHTS)
        save_file(moments, folder / _OPTIMIZER)
        for name, tensors in averages.items():
            write_model(session, tensors, folder / model_folder(session, name))
        write_position(folder, position)

    return write


def restore_state(session: Trained, checkpoint: Path) -> dict[str, Any]:
    """Load weights, optimizer and averages from a checkpoint, and return its position. All processes call it.

    Raises `InputError` naming the file when something is missing or damaged, or belongs to another model, and when the
    run was trained on other data.
    """
    position = _read_position(session, checkpoint)
    _require_same_data(session, position, checkpoint)
    weights, moments = load_file(checkpoint / _WEIGHTS), load_file(checkpoint / _OPTIMIZER)
    parameters, statistics = dict(session.bare.named_parameters()), dict(statistics_of(session.bare))
    _require_shapes(weights, {**parameters, **statistics}, checkpoint)
    for name, buffer in statistics.items():
        copy_whole(buffer, weights[name])
    for name, parameter in parameters.items():
        state = {key: moments[f"{name}/{key}"] for key in state_keys(session.adam, parameter)}
        if uses_zero(session.accelerator):
            step, *rest = state.values()
            set_whole(session.adam, parameter, weights[name], step, rest)
            continue
        copy_whole(parameter, weights[name])
        device = local(parameter).device
        session.adam.state[parameter] = {
            key: tensor.to(device) if key == "step" else split_like(tensor, parameter) for key, tensor in state.items()
        }
    for name in session.averages.profiles:
        session.averages.restore(name, load_file(checkpoint / model_folder(session, name) / session.weights_name))
    session.restore_config(checkpoint / "model")
    return position


def model_folder(session: Trained, name: str) -> str:
    """The folder of the average called `name` in a checkpoint: "model" for the one used for sampling."""
    return "model" if name == session.averages.main else f"model-{name}"


def write_model(session: Trained, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write an average as a folder from which the model can be loaded: `SiT.from_pretrained`, timm's `local-dir:`."""
    folder.mkdir(exist_ok=True)
    session.save_config(folder)
    save_file(tensors, folder / session.weights_name, metadata={"format": "pt"})


def _moments(session: Trained, parameter: Parameter) -> dict[str, Tensor]:
    """The optimizer's state of a parameter. All processes call it."""
    if uses_zero(session.accelerator):
        return whole_moments(session.adam, parameter)
    return {key: session.adam.state[parameter][key] for key in state_keys(session.adam, parameter)}


def _read_position(session: Trained, checkpoint: Path) -> dict[str, Any]:
    """The position; the main process reads and checks it, and sends it to all."""
    found: list[Any] = [None, None]
    if session.accelerator.is_main_process:
        try:
            found[0] = read_position(checkpoint)
        except InputError as error:
            found[1] = str(error)
    position, mistake = broadcast_object_list(found)
    if mistake is not None:
        raise InputError(mistake)
    return position


def _require_same_data(session: Trained, position: dict[str, Any], checkpoint: Path) -> None:
    """Raise `InputError` for other data. Checkpoints of earlier versions do not record the data and are accepted."""
    if position.get("data", session.data) != session.data:
        raise InputError(
            f"{checkpoint} was trained on other data than those at {session.config.data.path}, which were prepared "
            "anew or changed since. Nothing was changed: give the data it was trained on, wherever they lie now, by "
            "--data.path, or choose another --run."
        )


def _require_shapes(weights: dict[str, Tensor], tensors: dict[str, Tensor], checkpoint: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        name = sorted(shapes.items() ^ expected.items())[0][0]
        raise InputError(
            f"{checkpoint / _WEIGHTS} is of another model: {name} is {shapes.get(name)}, not {expected.get(name)}."
        )

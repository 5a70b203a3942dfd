"""The directory of a graft: what is grafted, the state of an unfinished fit, and at the end the model."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim import Optimizer

from sit_atconv.config import config_differences
from sit_atconv.errors import InputError
from sit_atconv.models import SiT
from sit_atconv.runtime.lock import LOCK
from sit_atconv.runtime.reading import read_json
from sit_atconv.runtime.weights import require_finite, require_floats
from sit_atconv.runtime.whole_files import as_json, leftovers, remove_leftovers, whole_file, whole_folder, write_json
from sit_atconv.training.session.projectors import copy_projectors

_ADAM = ("step", "exp_avg", "exp_avg_sq")
_STEP = "step"  # of the fit, in the metadata


class GraftDirectory:
    """OUT: graft.json and log.jsonl; unfinished.safetensors, the state of a fit that goes on; at the end, model/.

    `model/` stands in OUT as in a checkpoint, so that OUT itself can be given wherever a model is opened. Each file is
    whole or not there. Only the main process writes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.model, self.log = path, path / "model", path / "log.jsonl"
        self._basis, self._state = path / "graft.json", path / "unfinished.safetensors"

    def check(self, basis: dict[str, Any]) -> None:
        """Raise `InputError` unless OUT is new, empty, or was begun with the same `basis`. Writes nothing.

        The basis is all that determines the result, as JSON can hold it.
        """
        if self._basis.is_file():
            begun = read_json(self._basis, dict[str, Any], "Restore it, or choose another OUT.")
            differing = config_differences(begun, as_json(basis))
            if differing:
                raise InputError(
                    f"{self.path} belongs to another graft ({'; '.join(differing)}). Nothing was changed: give what it "
                    "was begun with to continue it, or choose another OUT."
                )
        elif self.path.exists():
            known = {self.path / LOCK, *leftovers(self.path)} if self.path.is_dir() else set()
            if not self.path.is_dir() or set(self.path.iterdir()) - known:
                raise InputError(f"{self.path} exists and is not a graft: choose another OUT.")

    def begin(self, basis: dict[str, Any]) -> None:
        """Write what is grafted, and remove what a kill left unfinished."""
        remove_leftovers(self.path)
        write_json(self._basis, basis)

    @property
    def complete(self) -> bool:
        """Whether the model is there."""
        return self.model.is_dir()

    def save(self, step: int, mixers: nn.Module, adam: Optimizer) -> None:
        """Write the state after `step`: weights and Adam's moments."""
        tensors = {
            f"{name}/{key}": value for name, p in mixers.named_parameters() for key, value in adam.state[p].items()
        }
        tensors |= {name: parameter.detach() for name, parameter in mixers.named_parameters()}
        with whole_file(self._state) as file:
            file.write(save({name: t.cpu().contiguous() for name, t in tensors.items()}, {_STEP: str(step)}))

    def restore(self, mixers: nn.Module, adam: Optimizer) -> int:
        """Load the state of `save` and return its step; 0 without one.

        Raises `InputError` for a file that is damaged.
        """
        if not self._state.is_file():
            return 0
        try:
            tensors = load_file(self._state)
            with safe_open(self._state, "pt") as file:
                step = (file.metadata() or {}).get(_STEP, "")
            if not step.isdecimal():
                raise ValueError("it does not say its step")
            _require_shapes(tensors, mixers)
            require_floats(self._state)
            for name, parameter in mixers.named_parameters():
                parameter.data.copy_(tensors[name])
                state = {key: tensors[f"{name}/{key}"] for key in _ADAM}
                adam.state[parameter] = {key: t.to(parameter.device) for key, t in state.items()}
        except (SafetensorError, ValueError) as error:
            raise InputError(
                f"{self._state} is damaged ({error}): restore it from a copy, or remove it to begin the fit anew."
            ) from None
        require_finite(tensors, str(self._state))
        return int(step)

    def finish(self, model: SiT, checkpoint: Path) -> None:
        """Write the grafted model, with the projectors that were trained with the old one at `checkpoint`."""
        with whole_folder(self.model) as unfinished:
            model.save_pretrained(unfinished)
            copy_projectors(checkpoint, unfinished)
        self._state.unlink(missing_ok=True)


def _require_shapes(tensors: dict[str, Tensor], mixers: nn.Module) -> None:
    """Raise `ValueError` unless the tensors are the weights of the mixers and Adam's state of each."""
    expected = {name: parameter.shape for name, parameter in mixers.named_parameters()}
    for name, shape in list(expected.items()):
        expected |= {f"{name}/{key}": torch.Size() if key == "step" else shape for key in _ADAM}
    if differing := {name: tensor.shape for name, tensor in tensors.items()}.items() ^ expected.items():
        raise ValueError(f"{min(name for name, _ in differing)} is missing, or of another shape")

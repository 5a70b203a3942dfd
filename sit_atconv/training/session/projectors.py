"""Fine-tuning with alignment: load the projectors that were trained with the model a run starts from."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from msgspec import Meta
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sit_atconv.config import AlignmentConfig, load_config
from sit_atconv.convert.directory import PROJECTORS_NAME
from sit_atconv.errors import InputError
from sit_atconv.models.checkpoint import model_directory
from sit_atconv.runtime.reading import understand
from sit_atconv.runtime.weights import require_finite, require_floats

log = logging.getLogger(__name__)

_PREFIX = "projectors."


@dataclass(frozen=True)
class ProjectorFacts:
    """Metadata of projectors.safetensors, as text: the block, and REPA's names of the teachers, separated by commas."""

    block: Annotated[str, Meta(pattern=r"^[1-9]\d{0,5}$")] | None = None
    teachers: str = ""


@dataclass(frozen=True)
class _Trained:
    """Projectors by the names of a ModuleList, the block they follow, and their teachers' names.

    Block and teachers are None if the file does not name them.
    """

    tensors: dict[str, Tensor]
    block: int | None
    teachers: list[str] | None

    def __len__(self) -> int:
        return len({key.split(".")[0] for key in self.tensors})

    def one(self, number: int) -> dict[str, Tensor]:
        """The weights of projector `number`; empty if there are not so many."""
        prefix = f"{number}."
        return {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}


def begin_projectors(projectors: nn.ModuleList, alignment: AlignmentConfig, path: str) -> None:
    """Initialise the `projectors`, one per teacher, with those stored beside the `model/` directory `path`.

    `path` is a release converted by sit_atconv.convert, or in a checkpoint of a run. Projectors are matched by their
    order. If one is missing or has another block, teacher or shape, a message says so and ours starts from scratch.
    """
    trained = _find(Path(path))
    if trained is None:
        log.info("No projectors beside %s: they begin anew.", path)
        return
    for number, (projector, teacher) in enumerate(zip(projectors, alignment.teachers, strict=True)):
        theirs = trained.one(number)
        obstacle = _obstacle(theirs, projector, trained, number, alignment)
        if obstacle is not None:
            log.warning("The projector for %s begins anew: %s.", teacher.name, obstacle)
            continue
        projector.load_state_dict(theirs)
        whose = trained.teachers[number] if trained.teachers else "an unnamed teacher"
        block = f"block {trained.block}" if trained.block else f"an unnamed block, taken for {alignment.block}"
        log.info("The projector for %s begins with that for %s after %s.", teacher.name, whose, block)


def copy_projectors(path: Path, folder: Path) -> None:
    """Write the projectors that were trained with the model at `path`, if there are any, into another model's folder.

    `begin_projectors` finds them there, with their block and teachers.
    """
    trained = _find(path)
    if trained is not None:
        facts = {"block": trained.block, "teachers": trained.teachers and ",".join(trained.teachers)}
        known = {key: str(value) for key, value in facts.items() if value is not None}
        save_file(trained.tensors, folder / PROJECTORS_NAME, metadata=known)


def _obstacle(
    theirs: dict[str, Tensor], projector: nn.Module, trained: _Trained, number: int, alignment: AlignmentConfig
) -> str | None:
    """Why a projector cannot take these weights; None if it can."""
    if not theirs:
        return f"there are only {len(trained)} projectors"
    if trained.block not in (None, alignment.block):
        return f"there it follows block {trained.block}, here block {alignment.block}"
    ours = {key: tuple(tensor.shape) for key, tensor in projector.state_dict().items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    differing = sorted(key for key in ours.keys() | shapes if ours.get(key) != shapes.get(key))
    if differing:
        key = differing[0]
        return f"{key} is {shapes.get(key, 'missing')} there, {ours.get(key, 'missing')} here"
    name = alignment.teachers[number].name
    # REPA's names, such as dinov2-vit-b, cannot be compared with timm's, which contain "_".
    if trained.teachers and "_" in trained.teachers[number] and trained.teachers[number] != name:
        return f"there it is for {trained.teachers[number]}"
    return None


def _find(path: Path) -> _Trained | None:
    """The projectors that were trained with the model in `path`."""
    directory = model_directory(path)
    converted, ours = directory / PROJECTORS_NAME, directory.parent / "weights.safetensors"
    if converted.is_file():
        tensors, facts = _read(converted)
        known = understand(facts, ProjectorFacts, f"the metadata of {converted}", "Convert the release again.")
        trained = _Trained(tensors, int(known.block) if known.block else None, None)
        teachers = known.teachers.split(",")
        return replace(trained, teachers=teachers) if len(teachers) == len(trained) and teachers[0] else trained
    config = directory.resolve().parent.parent.parent / "config.yaml"
    if not ours.is_file() or not config.is_file():
        return None
    alignment = load_config(config).alignment
    if alignment is None:
        return None
    return _Trained(_read(ours, _PREFIX)[0], alignment.block, [teacher.name for teacher in alignment.teachers])


def _read(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors whose names begin with `prefix`, without it, and the file's metadata."""
    try:
        require_floats(path)
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (safe_open is no mapping)
            tensors, facts = {name.removeprefix(prefix): file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}): convert or copy it again, or remove it.") from error
    require_finite(tensors, str(path))
    return tensors, facts

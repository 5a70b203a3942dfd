"""The rows of the table: which models, and which sets of samples of each."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sit_atconv.autoencoder import IDENTITY, Autoencoder
from sit_atconv.errors import InputError
from sit_atconv.models import SiT
from sit_atconv.models.checkpoint import find_weights, load_model
from sit_atconv.runtime.whole_files import followed
from sit_atconv.sampling import open_generator
from sit_atconv.sampling.labels import RULES, choose_labels
from sit_atconv.sampling.settings import SamplerSettings
from sit_atconv.study.table.calls import Calls, count_calls

_NAME = re.compile(r"[^\W_][\w .+@()-]*")  # of a folder on any file system
_TAKEN = re.compile(r"table[.-].*", re.IGNORECASE)  # the table's own files


@dataclass(frozen=True)
class Drawn:
    """How samples are drawn: the same for all models. `guided` is None without guidance."""

    unguided: SamplerSettings
    guided: SamplerSettings | None
    num_samples: int
    seed: int = 0
    weights: str | None = None
    vae: str | None = None
    weak_checkpoint: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it but for paths."""
        guided = self.guided and self.guided.to_dict()
        return {**vars(self), "unguided": self.unguided.to_dict(), "guided": guided}

    def guides(self, model: SiT) -> bool:
        """Whether `model` has what the guided rows need, or may need as far as is known: a null class, or a head."""
        if self.guided is not None and self.guided.internal_guidance != 1:
            has_head = model.config.internal_block is not None
            return has_head and (self.guided.guidance == 1 or self._guides_classes(model))
        return self._guides_classes(model)

    def _guides_classes(self, model: SiT) -> bool:
        return self.weak_checkpoint is not None or bool(model.config.num_classes and model.config.label_dropout)


@dataclass(frozen=True)
class Set:
    """A set of samples of a model. `labels` is "random" or "balanced", or None for an unconditional model."""

    row: str
    guided: bool
    labels: str | None

    @property
    def guidance(self) -> str:
        """In a word."""
        return "guided" if self.guided else "unguided"

    @property
    def folder(self) -> Path:
        """Its place in the table's folder."""
        return Path(self.row) / "-".join(filter(None, (self.guidance, self.labels)))

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.row, self.guidance, self.labels and f"{self.labels} labels")))


@dataclass(frozen=True)
class Subject:
    """What is known of a model before samples are drawn.

    Args:
        name: of its rows.
        checkpoint: its folder, without links.
        weights: which of a checkpoint's, in words.
        step: of its training, if known.
        autoencoder: that decodes its latents, in words.
        labels: the rules of its sets: random and balanced, or None alone for an unconditional model.
        calls: by "unguided" and, if it can be guided, "guided".
    """

    name: str
    checkpoint: Path
    weights: str
    step: int | None
    autoencoder: str
    labels: tuple[str | None, ...]
    calls: dict[str, Calls | None]

    @property
    def sets(self) -> list[Set]:
        """In the order of the table."""
        return [Set(self.name, kind == "guided", labels) for kind in self.calls for labels in self.labels]


def named_checkpoints(words: Sequence[str]) -> dict[str, Path]:
    """The models by name, from words RUN or NAME=RUN; a run's folder stands for its newest checkpoint.

    Raises `InputError` for a RUN that is not there, and for names that are equal or no names of folders.
    """
    found: dict[str, Path] = {}
    for word in words:
        head, equals, tail = word.partition("=")
        given = equals and "/" not in head and not Path(word).exists()
        path = Path(tail if given else word)
        name = head if given else path.absolute().name
        if not _NAME.fullmatch(name) or _TAKEN.fullmatch(name):
            raise InputError(
                f"'{name}' cannot name the rows of {path}, nor their folder: give another name, of letters, digits, "
                "spaces and . _ + @ ( ) -, that does not begin with table- or table., as NAME=RUN."
            )
        if name.lower() in map(str.lower, found):
            raise InputError(f"Two RUNs have the name {name}: give at least one of them as NAME=RUN.")
        found[name] = _checkpoint(path)
    return found


def _checkpoint(path: Path) -> Path:
    if (path / "checkpoints").is_dir():
        model = followed(path / "checkpoints" / "latest" / "model")
        if not model.is_dir():
            raise InputError(f"The run {path} has no checkpoint yet: train it first, or name a model's folder.")
        return model.resolve()
    if not followed(path).is_dir():
        raise InputError(
            f"There is no RUN {path}: expected the folder of a training run, of a checkpoint, or of a model."
        )
    return followed(path).resolve()


def examine(checkpoints: dict[str, Path], drawn: Drawn) -> list[Subject]:
    """Look at every model. Raises `InputError` for one that cannot be used, and for too much or too little guidance."""
    weak = None if drawn.weak_checkpoint is None else load_model(drawn.weak_checkpoint)
    subjects = [_subject(name, path, drawn, weak) for name, path in checkpoints.items()]
    guided = any("guided" in subject.calls for subject in subjects)
    if guided and drawn.guided is None:
        raise InputError("The scale of the guided rows is missing: give --guidance SCALE, such as --guidance 1.8.")
    if drawn.guided is not None and not guided:
        raise InputError(
            "None of these models can be guided so: they are unconditional, or never learned a null class, or have no "
            "second head for --internal-guidance. Leave out --guidance or --internal-guidance and what belongs to it, "
            "or name a model to guide away from with --weak-checkpoint."
        )
    return subjects


def _subject(name: str, path: Path, drawn: Drawn, weak: SiT | None) -> Subject:
    model, autoencoder = open_generator(path, drawn.vae, weights=drawn.weights)
    found = find_weights(path, drawn.weights)
    rules = RULES if model.config.num_classes else (None,)
    for rule in filter(None, rules):
        choose_labels(rule, range(1), model.classes, drawn.seed)  # raises where there is nothing to draw
    calls = {"unguided": count_calls(model, drawn.unguided)}
    if drawn.guides(model):
        calls["guided"] = None if drawn.guided is None else count_calls(model, drawn.guided, weak)
    return Subject(name, path, str(found), found.step, _described(autoencoder), tuple(reversed(rules)), calls)


def _described(autoencoder: Autoencoder) -> str:
    spec = autoencoder.spec
    if spec.autoencoder == IDENTITY:
        return "none (pixels)"
    return spec.autoencoder + (f", sha256 {spec.weights_hash[:8]}" if spec.weights_hash else "")

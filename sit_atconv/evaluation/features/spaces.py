"""Several features of the same pictures, computed in one pass."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.kinds import Features


class Space(NamedTuple):
    """Features, and what stands before their kinds where several are computed: "dinov2/" -> "dinov2/pool"."""

    features: Features
    prefix: str

    @property
    def pool(self) -> str:
        """The kind of feature that distances compare."""
        return f"{self.prefix}pool"


class Spaces:
    """A function from images to the features of all spaces, by kind: "inception/pool", "dinov2/pool", …

    The kinds of a single space have no prefix. Raises `InputError` for two spaces of one name, or with metrics of one
    name.
    """

    def __init__(self, features: "Features | Sequence[Features] | Spaces") -> None:
        if isinstance(features, Spaces):
            features = [space.features for space in features]
        several = list(features) if isinstance(features, Sequence) else [features]
        names, suffixes = ([getattr(each, key) for each in several] for key in ("name", "suffix"))
        if len(set(names)) < len(names) or len(set(suffixes)) < len(suffixes):
            raise InputError(
                f"The features {', '.join(names)} would give numbers of the same name: give each one once."
            )
        self._spaces = [Space(each, f"{each.name}/" if len(several) > 1 else "") for each in several]
        self.device: torch.device = several[0].device

    def of(self, kinds: Iterable[str]) -> "Spaces":
        """The spaces of these kinds, which are called as here."""
        part = copy.copy(self)
        part._spaces = [space for space in self._spaces if any(kind.startswith(space.prefix) for kind in kinds)]
        return part

    def __iter__(self) -> Iterator[Space]:
        return iter(self._spaces)

    def __len__(self) -> int:
        return len(self._spaces)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """The features of uint8 images (B, 3, H, W), (B, d) each."""
        return {
            f"{prefix}{kind}": values for features, prefix in self._spaces for kind, values in features(images).items()
        }

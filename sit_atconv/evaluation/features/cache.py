"""Features on disk, keyed by what an image is and what looked at it: an interrupted evaluation goes on from there."""

import hashlib
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.kinds import Features
from sit_atconv.runtime.whole_files import whole_file

log = logging.getLogger(__name__)

_SHARD = 256  # images a file: what a killed run loses at most, a process


class FeatureCache:
    """`features`, remembered in `directory` for every image seen before, by any process, in any order.

    Files hold the features of up to 256 images beside the images' digests, under a folder named after the identity of
    the features (network, weights' hash, precision), and appear whole or not at all.
    """

    def __init__(self, directory: str | Path, features: Features, kinds: frozenset[str]) -> None:
        self._compute, self._kinds = features, sorted(kinds)
        self._folder = Path(directory) / hashlib.sha256(features.identity.encode()).hexdigest()[:16]
        self._new: list[tuple[np.ndarray, dict[str, Tensor]]] = []
        self.hits = self.misses = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"The cache {directory} is not a directory: give --cache another one.") from error
        self._rows = self._index()

    def __enter__(self) -> "FeatureCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def features(self, images: Tensor, digests: np.ndarray) -> dict[str, Tensor]:
        """What `features(images)` gives, for the kinds asked for; only images not seen before are computed."""
        keys = [digest.tobytes() for digest in digests]
        known = [i for i, key in enumerate(keys) if key in self._rows]
        missing = [i for i, key in enumerate(keys) if key not in self._rows]
        self.hits, self.misses = self.hits + len(known), self.misses + len(missing)
        parts = []
        if missing:
            parts.append(self._compute(images[missing]))
            self._remember(digests[missing], parts[0])
        if known:
            places = [self._rows[keys[i]] for i in known]
            parts.append({kind: self._read(places, kind).to(self._compute.device) for kind in self._kinds})
        order = torch.tensor(missing + known).argsort()
        return {kind: torch.cat([part[kind] for part in parts])[order] for kind in self._kinds}

    def _remember(self, digests: np.ndarray, computed: Mapping[str, Tensor]) -> None:
        self._new.append((digests, {kind: features.cpu() for kind, features in computed.items()}))
        if sum(len(digests) for digests, _ in self._new) >= _SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what is new."""
        if not self._new:
            return
        tensors = {"digests": torch.from_numpy(np.concatenate([digests for digests, _ in self._new]))}
        for kind in self._new[0][1]:
            tensors[kind] = torch.cat([computed[kind] for _, computed in self._new])
        with whole_file(self._folder / f"{uuid.uuid4().hex}.safetensors") as file:
            file.write(save(tensors))
        self._new.clear()

    def _index(self) -> dict[bytes, tuple[Path, int]]:
        """digest -> (file, row) of all whole files that hold every kind asked for."""
        rows = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    if set(self._kinds) <= set(file.keys()):
                        digests = file.get_tensor("digests").numpy()
                        rows |= {digest.tobytes(): (path, row) for row, digest in enumerate(digests)}
            except (SafetensorError, OSError) as error:
                log.warning("Ignoring %s in the cache: %s", path, error)
        return rows

    def _read(self, places: list[tuple[Path, int]], kind: str) -> Tensor:
        """Cached rows, (n, d), file by file."""
        by_file: dict[Path, list[int]] = {}
        for path, row in places:
            by_file.setdefault(path, []).append(row)
        found = {}
        for path, wanted in by_file.items():
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor(kind)
                found |= {(path, row): tensor[row] for row in wanted}
        return torch.stack([found[place] for place in places])

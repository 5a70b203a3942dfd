"""A cache of features on disk, keyed by image and network, from which an interrupted evaluation continues."""

import contextlib
import fcntl
import hashlib
import logging
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.kinds import Features
from sit_atconv.evaluation.features.spaces import Spaces
from sit_atconv.runtime.whole_files import whole_file

log = logging.getLogger(__name__)

_SHARD = 256  # images that a process collects before it writes a file; a killed run loses about as many


class FeatureCache:
    """Computes `features`, and caches them in `directory` for all processes and later runs.

    Files hold the features and digests of at least 256 images, except a process's last one, in a folder named after the
    identity of the features (network, weights' hash, precision). They are written atomically. Each has a digest: a
    damaged file is removed when its features are needed, and they are computed again.
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
        self._lock = _join(self._folder)
        self._verified: set[Path] = set()
        self._rows = self._index()

    def __enter__(self) -> "FeatureCache":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            os.close(self._lock)

    def features(self, images: Tensor, digests: np.ndarray) -> dict[str, Tensor]:
        """`features(images)` for the requested kinds; only features that are not cached are computed."""
        keys = [digest.tobytes() for digest in digests]
        self._verify({self._rows[key][0] for key in keys if key in self._rows})
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
        """Write new features to disk."""
        if not self._new:
            return
        tensors = {"digests": torch.from_numpy(np.concatenate([digests for digests, _ in self._new]))}
        for kind in self._new[0][1]:
            tensors[kind] = torch.cat([computed[kind] for _, computed in self._new])
        with whole_file(self._folder / f"{uuid.uuid4().hex}.safetensors") as file:
            file.write(save(tensors, {"sha256": _digest(tensors)}))
        self._new.clear()

    def _index(self) -> dict[bytes, tuple[Path, int]]:
        """digest -> (file, row), for all readable files that hold every requested kind."""
        rows = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    if "sha256" not in (file.metadata() or {}):
                        _remove(path, "it has no digest, since an earlier version wrote it")
                    elif file.get_slice("digests").get_shape()[1:] != [32]:
                        _remove(path, "it does not name the images of its features")
                    elif set(self._kinds) <= set(file.keys()):
                        digests = file.get_tensor("digests").numpy()
                        rows |= {digest.tobytes(): (path, row) for row, digest in enumerate(digests)}
            except FileNotFoundError:  # another process has removed it
                continue
            except SafetensorError as error:
                _remove(path, str(error))
        return rows

    def _verify(self, paths: Iterable[Path]) -> None:
        """Remove damaged files, and forget their rows."""
        for path in set(paths) - self._verified:
            if _is_whole(path):
                self._verified.add(path)
            else:
                _remove(path, "its digest differs")
                self._rows = {key: place for key, place in self._rows.items() if place[0] != path}

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


class FeatureCaches:
    """A cache for each of several spaces, in the same directory."""

    def __init__(self, directory: str | Path, spaces: Spaces, kinds: frozenset[str]) -> None:
        self._caches = []
        for features, prefix in spaces:
            own = frozenset(kind.removeprefix(prefix) for kind in kinds if kind.startswith(prefix))
            if own:
                self._caches.append((prefix, FeatureCache(directory, features, own)))

    def __enter__(self) -> "FeatureCaches":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:
            for _prefix, cache in self._caches:
                stack.enter_context(cache)

    @property
    def hits(self) -> int:
        """Number of images that were found, in all spaces together."""
        return sum(cache.hits for _, cache in self._caches)

    @property
    def misses(self) -> int:
        """Number of images whose features were computed, in all spaces together."""
        return sum(cache.misses for _, cache in self._caches)

    def features(self, images: Tensor, digests: np.ndarray) -> dict[str, Tensor]:
        """The features of all spaces by kind, see `FeatureCache.features`."""
        return {
            f"{prefix}{kind}": values
            for prefix, cache in self._caches
            for kind, values in cache.features(images, digests).items()
        }


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
            return file.metadata()["sha256"] == _digest(tensors)
    except FileNotFoundError:  # another process has found it damaged
        return False


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _remove(path: Path, reason: str) -> None:
    log.warning("%s in the cache is damaged (%s): it is removed, and its features are computed again.", path, reason)
    path.unlink(missing_ok=True)


def _join(folder: Path) -> int:
    """Register this process as a writer of `folder`, until the returned descriptor is closed.

    A process that is the only writer removes the unfinished files of killed processes. On a file system without locks
    these files stay.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in folder.glob("*.partial"):
            path.unlink()
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor

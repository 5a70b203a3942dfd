"""Time and memory of an evaluation in eight spaces of features at once, without the cost of their networks.

    python -m benchmarks.spaces [--samples 50000] [--references 10000]

The networks are random projections of pictures of 16x16 to the dimensions that published networks have, so what is
measured is what `evaluate` reads, keeps and computes: FD in all spaces; precision, recall and MIND in one; KID and CMMD
in one each. The process may have 256 files open.
"""

import argparse
import contextlib
import resource
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.evaluation import timed
from benchmarks.output import write_json
from sit_atconv.evaluation import Options, Reading, evaluate
from sit_atconv.runtime.measuring.records import machine

_SIZE = 16
_FILES = 256
_SPACES = {"first": 2048, "dinov2": 1024, "cmmd": 768, **dict.fromkeys("abcd", 1024), "e": 1152}
_METRICS = ("fd", "mind_first", "precision_first", "recall_first", "kid_dinov2", "cmmd")


class Projection:
    """Features that stand in for those of a network: {"pool": (B, d)}."""

    neighbours, neighbour_limit, fast, remarks = 3, 50_000, False, ()
    weights_path = weights_sha256 = None
    device = torch.device("cpu")

    def __init__(self, name: str, dimensions: int) -> None:
        self.name = self.title = self.identity = name
        self.suffix = f"_{name}"
        generator = torch.Generator().manual_seed(dimensions)
        self._matrix = torch.randn(3 * _SIZE**2, dimensions, generator=generator) / 28  # about its square root

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features of uint8 images (B, 3, 16, 16)."""
        return {"pool": torch.tanh((images.flatten(1).float() / 127.5 - 1) @ self._matrix)}


def write_pictures(folder: Path, counts: Iterable[int]) -> list[str]:
    """Files of random pictures, each set a little darker than the one before."""
    generator, paths = np.random.default_rng(0), []
    for number, count in enumerate(counts):
        pictures = generator.integers(0, 256 - 6 * number, (count, _SIZE, _SIZE, 3), dtype=np.uint8)
        paths.append(str(folder / f"{number}.npz"))
        np.savez(paths[-1], arr_0=pictures)
    return paths


@contextlib.contextmanager
def few_files() -> Iterator[None]:
    """Let the process have no more than 256 files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--references", type=int, default=10_000)
    parser.add_argument("--json", type=Path, default=Path("spaces.json"))
    options = parser.parse_args()
    print(f"{machine(torch.device('cpu'))}\n")

    with tempfile.TemporaryDirectory() as folder, few_files():
        samples, references = write_pictures(Path(folder), (options.samples, options.references))
        spaces = [Projection(name, dimensions) for name, dimensions in _SPACES.items()]
        chosen = Options(_METRICS, reading=Reading(batch_size=256, workers=2))
        report, seconds = timed(lambda: evaluate(samples, references, spaces, chosen))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB
    print(f"{options.samples} samples and {options.references} references in {len(spaces)} spaces:")
    print(f"  {seconds['wall']:.0f} s ({seconds['cpu']:.0f} CPU seconds), peak {peak:.2f} GiB")
    row = {"what": "spaces", "samples": options.samples, "references": options.references, "dimensions": _SPACES}
    write_json(options.json, torch.device("cpu"), [{**row, "seconds": seconds, "peak_gib": peak, **report.metrics}])


if __name__ == "__main__":
    main()

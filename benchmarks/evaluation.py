"""Speed of evaluation: Inception features compared with torch-fidelity's loop, and precision and recall at full size.

    python -m benchmarks.evaluation --weights FILE [--source SOURCE] [--count N] [--turns N] [--neighbours 50000 10000]

Both loops read the same images of the same source and run in turns; ratios are those of medians. CPU seconds, of all
threads and reader processes, are more reliable than wall time if other jobs run. Targets on a CPU: at least 2 x
torch-fidelity, features equal to 1e-5; 50,000 against 10,000 in under 2 GiB and, on two cores, two minutes.
"""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.output import write_json
from sit_atconv.data.pictures.protocol import ImageSource
from sit_atconv.data.sources import open_source
from sit_atconv.evaluation.features.kinds import create_features
from sit_atconv.evaluation.metrics.neighbours import precision_recall
from sit_atconv.evaluation.reading.collect import Wanted, collect
from sit_atconv.evaluation.reading.loading import load_batches
from sit_atconv.runtime.measuring.records import machine
from sit_atconv.runtime.measuring.timing import in_turns


class Pictures(Dataset):
    """The first images of a source in torch-fidelity's format: uint8 (3, H, W)."""

    def __init__(self, source: ImageSource, count: int) -> None:
        self._source, self._count = source, min(count, len(source))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        if index >= self._count:
            raise IndexError(index)
        return torch.from_numpy(self._source[index].image).permute(2, 0, 1)


def torch_fidelity_loop(pictures: Pictures, weights: str, device: torch.device) -> Callable[[], Tensor]:
    """torch-fidelity's loop with its defaults (batches of 64): pool features and logits."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.utils import get_featuresdict_from_dataset

    network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], weights).to(device)
    cuda = device.type == "cuda"
    return lambda: get_featuresdict_from_dataset(pictures, network, 64, cuda, False, False)["2048"]


def our_loop(source: ImageSource, count: int, weights: str, device: torch.device) -> Callable[[], Tensor]:
    """The work of evaluate_fid.py for every image: digests, all three features, moments and score sums."""
    features = create_features("inception", weights, device)
    wanted = Wanted(frozenset({"pool", "spatial"}), frozenset({"pool"}), frozenset({"probabilities"}))
    workers = 2 if device.type == "cpu" else 8

    def run() -> Tensor:
        batches = load_batches(source, range(count), 64, workers)
        return collect(batches, features, wanted, total=count).kept["pool"]

    return run


def benchmark_features(source: str, count: int, weights: str, turns: int, device: torch.device) -> dict:
    """Images per second of both loops, in turns, in wall time and CPU time, and the difference of their features."""
    opened = open_source(source)
    pictures = Pictures(opened, count)
    loops = {
        "torch-fidelity": torch_fidelity_loop(pictures, weights, device),
        "sit-atconv": our_loop(opened, len(pictures), weights, device),
    }
    measured = in_turns(loops, turns, timed)
    times = {name: [seconds for _, seconds in each] for name, each in measured.items()}
    theirs, ours = (measured[name][-1][0].double() for name in loops)
    result = {
        "what": "features",
        "images": len(pictures),
        "relative_difference": float((ours - theirs).norm() / theirs.norm()),
    }
    for clock in clocks():
        seconds = {name: [turn[clock] for turn in each] for name, each in times.items()}
        speeds = {name: len(pictures) / statistics.median(each) for name, each in seconds.items()}
        by_turn = [a / b for a, b in zip(seconds["torch-fidelity"], seconds["sit-atconv"], strict=True)]
        ratio = speeds["sit-atconv"] / speeds["torch-fidelity"]
        result[clock] = {"images_per_second": speeds, "ratio": ratio, "ratio_by_turn": by_turn}
    return result


def benchmark_neighbours(samples: int, references: int, device: torch.device) -> dict:
    """Seconds and peak memory of precision and recall on random features of 2048 dimensions."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.rand(n, 2048, generator=generator).to(device) for n in (samples, references))
    _, seconds = timed(lambda: precision_recall(theirs, ours))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    facts = {"what": "neighbours", "samples": samples, "references": references}
    return facts | {"seconds": seconds, "peak_gib": peak / 2**30}


def timed(run: Callable[[], object]) -> tuple[object, dict[str, float]]:
    """The result of a call, and its duration on both clocks."""
    start = clocks()
    result = run()
    return result, {clock: now - start[clock] for clock, now in clocks().items()}


def clocks() -> dict[str, float]:
    """Wall time, and CPU time of this process and of its finished children, in seconds."""
    spent = os.times()
    return {"wall": time.perf_counter(), "cpu": sum(spent[:4])}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--weights", help="features are measured only with weights")
    parser.add_argument("--source", default="digits@64")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--neighbours", type=int, nargs=2, metavar=("SAMPLES", "REFERENCES"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("evaluation.json"))
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = []
    print(f"{machine(device)}\n")

    if options.neighbours:  # first, so that the peak memory is that of this benchmark
        rows.append(found := benchmark_neighbours(*options.neighbours, device))
        print(f"precision and recall of {found['samples']} against {found['references']} on {device}:")
        seconds = found["seconds"]
        print(f"  {seconds['wall']:.1f} s ({seconds['cpu']:.1f} CPU seconds), peak {found['peak_gib']:.2f} GiB")
    if options.weights:
        found = benchmark_features(options.source, options.count, options.weights, options.turns, device)
        rows.append(found)
        print(f"Inception features of {found['images']} images of {options.source} on {device}, in turns:")
        for clock, unit in (("wall", "img/s"), ("cpu", "img/CPU s")):
            speeds = ", ".join(f"{name} {speed:.2f}" for name, speed in found[clock]["images_per_second"].items())
            ratios = ", ".join(f"{ratio:.2f}" for ratio in found[clock]["ratio_by_turn"])
            print(f"  {unit:<10} {speeds}: ratio {found[clock]['ratio']:.2f} (by turn: {ratios})")
        print(f"  features differ by {found['relative_difference']:.1e}")
    write_json(options.json, device, rows)


if __name__ == "__main__":
    main()

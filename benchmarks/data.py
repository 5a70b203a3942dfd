"""Speed of reading training data: shards compared with one .npy file per image, as REPA reads them.

``python -m benchmarks.data`` writes synthetic latents of 256-pixel images (4 × 32 × 32) to a temporary folder, reads
them from the page cache in turns, and prints and writes a table. The target is 2,500 latents/s with two workers.
Cached tokens have the size of DINOv2-B's, 256 of 768 numbers: 393 kB per sample, compared with 16 kB for a latent.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.output import write_json
from sit_atconv.alignment import TeacherSpec
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.sampler import training_loader
from sit_atconv.data.shards.format import encode_png, pack_images, shard_name, write_shard
from sit_atconv.runtime.measuring.records import machine
from sit_atconv.runtime.measuring.timing import in_turns
from sit_atconv.study.costs.passes import save_dataset

TEACHER = TeacherSpec("synthetic", "random", None, 768, (16, 16), False)
SHARD_SIZE = 1024


class OneFileEach(Dataset):
    """One file per sample, or two with its picture, and the default collation, as in REPA's loader."""

    def __init__(self, root: Path, pictures: bool = False) -> None:
        self._pictures = sorted(root.rglob("*.png")) if pictures else []
        self._paths = sorted(root.rglob("*.npy"))[: len(self._pictures) or None]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        latent = torch.from_numpy(np.load(self._paths[index])), torch.tensor(0)
        if not self._pictures:
            return latent
        with Image.open(self._pictures[index]) as picture:
            return torch.from_numpy(np.array(picture).transpose(2, 0, 1)), *latent


def smooth_picture(generator: torch.Generator) -> np.ndarray:
    """A picture, 256 × 256 × 3, that compresses about as well as photographs."""
    ramp, noise = torch.linspace(0, 255, 256), torch.randn(256, 256, 3, generator=generator) * 8
    return (ramp[:, None, None] * 0.5 + ramp[None, :, None] * 0.5 + noise).clamp(0, 255).byte().numpy()


def write_shards(root: Path, count: int) -> None:
    """Write shards with mirrored latents and with pictures."""
    generator = torch.Generator().manual_seed(0)
    png, shards = encode_png(smooth_picture(generator)), []
    for number, start in enumerate(range(0, count, SHARD_SIZE)):
        index = torch.arange(start, min(start + SHARD_SIZE, count))
        moments = torch.randn(len(index), 8, 32, 32, generator=generator).half()
        images = pack_images([png] * len(index))
        tensors = {"moments": moments, "moments_flip": moments.flip(-1), "labels": index % 10, "index": index, **images}
        shards.append(write_shard(root / shard_name(number), tensors))
    save_dataset(root, 256, 10, shards, has_flip=True, has_images=True)


def write_tokens(root: Path, count: int) -> None:
    """Write one shard with a teacher's tokens."""
    generator, index = torch.Generator().manual_seed(0), torch.arange(count)
    tokens = torch.randn(1, 256, 768, generator=generator).half().expand(count, -1, -1)
    moments = torch.randn(count, 8, 32, 32, generator=generator).half()
    shard = write_shard(
        root / shard_name(0), {"moments": moments, "tokens_0": tokens, "labels": index % 10, "index": index}
    )
    save_dataset(root, 256, 10, [shard], has_flip=False, has_images=False, teachers=[TEACHER])


def write_files(root: Path, count: int) -> None:
    """Write the layout of REPA's preparation: latents in fp32, and uncompressed pictures for the first thousand."""
    picture = Image.fromarray(smooth_picture(torch.Generator().manual_seed(0)))
    for index in range(count):
        path = root / "vae-sd" / f"{index // 1000:05d}" / f"img-mean-std-{index:08d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.zeros((8, 32, 32), dtype=np.float32))
        if index < SHARD_SIZE:
            path = root / "images" / "00000" / f"img{index:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, compress_level=0)
    (root / "vae-sd" / "dataset.json").write_text('{"labels": null}')


def contenders(shards: Path, tokens: Path, files: Path, batch_size: int) -> dict[str, Callable[[], Iterable]]:
    """Name -> a function that starts an iterable of batches."""
    ours = {"batch_size": batch_size, "seed": 0}
    naive = {"batch_size": batch_size, "shuffle": True, "drop_last": True}
    return {
        "shards, no worker": lambda: training_loader(open_dataset(shards), **ours, flip=True),
        "shards, 2 workers": lambda: training_loader(open_dataset(shards), **ours, flip=True, workers=2),
        "shards and pictures, 2 workers": lambda: training_loader(
            open_dataset(shards, images=True), **ours, flip=True, images=True, workers=2
        ),
        "shards and cached tokens, 2 workers": lambda: training_loader(
            open_dataset(tokens), **ours, teachers=[0], workers=2
        ),
        "REPA directory, our reader, 2 workers": lambda: training_loader(open_dataset(files), **ours, workers=2),
        "one .npy a sample, default collation, 2 workers": lambda: DataLoader(
            OneFileEach(files), **naive, num_workers=2
        ),
        "one .npy and one .png a sample, default collation, 2 workers": lambda: DataLoader(
            OneFileEach(files, pictures=True), **naive, num_workers=2
        ),
    }


def rate(start: Callable[[], Iterable], batches: int, batch_size: int) -> float:
    """Latents per second after the first batch has arrived, without the start of workers."""
    iterator = iter(start())
    next(iterator)
    began = time.perf_counter()
    for _ in itertools.islice(iterator, batches):
        pass
    return batches * batch_size / (time.perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--count", type=int, default=8192, help="latents in the data set")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=48, help="batches timed in every turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("data.json"))
    options = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        shards, tokens, files = (Path(folder, name) for name in ("shards", "tokens", "files"))
        shards.mkdir()
        tokens.mkdir()
        write_shards(shards, options.count)
        write_tokens(tokens, min(options.count, SHARD_SIZE))
        write_files(files, options.count)
        readers = contenders(shards, tokens, files, options.batch_size)
        rates = in_turns(readers, options.turns, lambda start: rate(start, options.batches, options.batch_size))

    rows = [{"reader": name, "latents_per_second": round(statistics.median(found))} for name, found in rates.items()]
    device = torch.device("cpu")
    print(f"{machine(device)}\n\n{'latents/s':>10}  reader (median of {options.turns} turns)")
    for row in rows:
        print(f"{row['latents_per_second']:>10,}  {row['reader']}")
    write_json(options.json, device, rows)


if __name__ == "__main__":
    main()

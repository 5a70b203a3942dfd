"""Retrieval with a network of timm's, by default AttNet, of things that are not in training: drawn, or class folders.

    python -m examples.retrieval
    python -m examples.retrieval --data FOLDER --model attnet_t1 --weights FILE --size 224 --steps 20000

FOLDER has a folder of pictures for each class (or person). Every second class is for training, the others for the
measure: each of their pictures is a query to all others. Only the query itself is left out of its ranking: folders know
no cameras, whereas benchmarks of re-identification also leave out views by the query's camera (`measures.left_out`).
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from examples.common import DEVICE, NORMALISE, network, options_of, train
from examples.measures import retrieval_scores
from examples.shapes import Things
from sit_atconv.errors import InputError, exit_on_input_error

SCALE = 16  # of cosines before the softmax


def datasets(options: argparse.Namespace) -> tuple[Dataset, Dataset, int]:
    """For training, for the measure, and the number of classes that their labels are below."""
    if options.data is None:
        return Things(range(200), 50, options.size, seed=0), Things(range(200, 230), 10, options.size, seed=1), 200
    return _classes(options, 0), _classes(options, 1), sum(path.is_dir() for path in options.data.iterdir())


def _classes(options: argparse.Namespace, held_out: int) -> Subset:
    """The pictures of every second class, for training (mirrored at random) or held out."""
    steps = [v2.ToImage(), v2.Resize((options.size, options.size)), v2.ToDtype(torch.float32, scale=True)]
    steps += [] if held_out else [v2.RandomHorizontalFlip()]
    try:
        folders = ImageFolder(options.data, v2.Compose(steps))
    except FileNotFoundError as error:
        raise InputError(f"--data takes a folder with a folder of pictures for each class: {error}") from error
    return Subset(folders, [number for number, label in enumerate(folders.targets) if label % 2 == held_out])


def main(arguments: list[str] | None = None) -> None:
    """Train a classifier of directions, and print how well these retrieve other classes, before and after."""
    options = options_of(__doc__, arguments, "class folders", steps=120, batch_size=24, size=64, learning_rate=1e-3)
    training, held_out, classes = datasets(options)
    body = network(options, num_classes=0)
    model = nn.Sequential(NORMALISE, body).to(DEVICE)
    centres = nn.Linear(body.num_features, classes, bias=False, device=DEVICE)  # directions of the classes

    def loss_of(batch: list[Tensor]) -> Tensor:
        images, labels = (each.to(DEVICE) for each in batch)
        return F.cross_entropy(SCALE * F.normalize(model(images)) @ F.normalize(centres.weight).mT, labels)

    @torch.inference_mode()
    def scores() -> str:
        batches = DataLoader(held_out, options.batch_size, num_workers=options.workers)
        found = [(F.normalize(model.eval()(images.to(DEVICE))).cpu(), labels) for images, labels in batches]
        vectors, labels = (torch.cat(each) for each in zip(*found, strict=True))
        itself = torch.eye(len(labels), dtype=torch.bool)
        measured = retrieval_scores(vectors @ vectors.mT, labels, labels, itself)
        return ", ".join(f"{name} {value:.3f}" for name, value in measured.items())

    batches = DataLoader(training, options.batch_size, shuffle=True, num_workers=options.workers, drop_last=True)
    print(f"before training: {scores()}", flush=True)
    train(nn.ModuleList([model, centres]), batches, loss_of, options)
    print(f"after training: {scores()}")


if __name__ == "__main__":
    with exit_on_input_error():
        main()

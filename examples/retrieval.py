"""Retrieval with a network of timm's, by default AttNet, of things that are not in training: drawn, or class folders.

    python -m examples.retrieval --picture found.png
    python -m examples.retrieval --data FOLDER --model attnet_t1 --weights FILE --size 224 --steps 20000

FOLDER has a folder of pictures for each class or person. Every second class is for training; each picture of the others
is a query to all others. Only the query itself is left out: folders know no cameras, whereas benchmarks of
re-identification leave out views of the person by the same camera, too (`left_out` of `retrieval_scores`).
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.utils import save_image

from examples.common import DEVICE, NORMALISE, network, options_of, train
from examples.measures import retrieval_scores
from examples.shapes import Things
from sit_atconv.errors import InputError, exit_on_input_error

SCALE = 16  # of cosines


def datasets(options: argparse.Namespace) -> tuple[Dataset, Dataset, int]:
    """For training, for the measure, and the number of classes."""
    if options.data is None:
        return Things(range(200), 50, options.size, seed=0), Things(range(200, 230), 10, options.size, seed=1), 200
    return _classes(options, 0), _classes(options, 1), sum(path.is_dir() for path in options.data.iterdir())


def _classes(options: argparse.Namespace, held_out: int) -> Subset:
    """The pictures of every second class, for training (mirrored at random) or held out."""
    steps = [v2.ToImage(), v2.Resize((options.size, options.size)), v2.RandomHorizontalFlip(0 if held_out else 0.5)]
    try:
        folders = ImageFolder(options.data, v2.Compose([*steps, v2.ToDtype(torch.float32, True)]))
    except FileNotFoundError as error:
        raise InputError(f"--data is a folder with a folder of pictures for each class: {error}") from error
    return Subset(folders, [number for number, label in enumerate(folders.targets) if label % 2 == held_out])


def main(arguments: list[str] | None = None) -> None:
    """Train a classifier of directions, and print how well these retrieve other classes, before and after."""
    options = options_of(__doc__, arguments, "class folders", steps=120, batch_size=24, size=64, learning_rate=1e-3)
    (training, held_out, classes), body = datasets(options), network(options, num_classes=0)
    model = nn.Sequential(NORMALISE, body).to(DEVICE)
    centres = nn.Linear(body.num_features, classes, bias=False, device=DEVICE)  # directions of the classes

    def loss_of(batch: list[Tensor]) -> Tensor:
        images, labels = (each.to(DEVICE) for each in batch)
        return F.cross_entropy(SCALE * F.normalize(model(images)) @ F.normalize(centres.weight).mT, labels)

    @torch.inference_mode()
    def similarities() -> tuple[Tensor, Tensor]:
        batches = DataLoader(held_out, options.batch_size, num_workers=options.workers)
        found = [(F.normalize(model.eval()(images.to(DEVICE))).cpu(), labels) for images, labels in batches]
        vectors, labels = (torch.cat(each) for each in zip(*found, strict=True))
        return vectors @ vectors.mT, labels

    def report(when: str) -> None:
        similarity, labels = similarities()
        scores = retrieval_scores(similarity, labels, labels, torch.eye(len(labels), dtype=torch.bool))
        print(f"{when} training:", ", ".join(f"{name} {value:.3f}" for name, value in scores.items()), flush=True)

    batches = DataLoader(training, options.batch_size, shuffle=True, num_workers=options.workers, drop_last=True)
    report("before")
    train(nn.ModuleList([model, centres]), batches, loss_of, options)
    report("after")
    if options.picture:  # a query in each row, then what is most similar
        rows = similarities()[0].topk(min(6, len(held_out))).indices[:: len(held_out) // 8 + 1]
        save_image([held_out[number][0] for number in rows.flatten().tolist()], options.picture, nrow=rows.shape[1])


if __name__ == "__main__":
    with exit_on_input_error():
        main()

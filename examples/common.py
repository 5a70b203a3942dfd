"""What the examples share: their options, a network of timm's, and a training loop."""

import argparse
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import sit_atconv.zoo  # noqa: F401 (registers the networks)
from sit_atconv.errors import InputError, nearest

NORMALISE = v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)  # for images in [0, 1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def options_of(description: str, arguments: list[str] | None, data: str, **defaults: Any) -> argparse.Namespace:
    """The options that all examples have, and those in `defaults`: steps, batch_size, learning_rate and others."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="attnet_xxs", help="a network of timm's (attnet_xxs)")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights of the network to start from")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help=f"{data}; without it, shapes are drawn")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write a picture of results")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"({value})")
    options = parser.parse_args(arguments)
    for path in filter(None, (options.data, options.weights)):
        os.stat(path)  # its error names what is not there
    torch.manual_seed(0)
    return options


def network(options: argparse.Namespace, **changes: Any) -> nn.Module:
    """The network `--model`, with `--weights` if given."""
    if not timm.is_model(options.model):
        raise InputError(f"timm has no network '{options.model}': {nearest(options.model, timm.list_models())}")
    overlay = {"file": str(options.weights)} if options.weights else None
    return timm.create_model(options.model, pretrained=bool(overlay), pretrained_cfg_overlay=overlay, **changes)


def train(model: nn.Module, batches: DataLoader, loss_of: Callable[[Any], Tensor], options: argparse.Namespace) -> None:
    """`--steps` of AdamW on `batches`, repeated; the learning rate rises, then falls."""
    if not len(batches):
        raise InputError(
            f"There are fewer pictures than a batch takes: give a --batch-size below {options.batch_size}."
        )
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.05)
    schedule, start = OneCycleLR(optimizer, options.learning_rate, total_steps=options.steps + 1), time.perf_counter()
    epochs = itertools.chain.from_iterable(itertools.repeat(batches))
    model.train()
    for step, batch in enumerate(itertools.islice(epochs, options.steps), 1):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(options.steps // 10, 1) == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()

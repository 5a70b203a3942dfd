"""Top-1 and top-5 accuracy of a network, with the crop and the interpolation of its configuration."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sit_atconv.runtime.processes import end_when_unable_to_send
from sit_atconv.zoo.validate.pictures import Pictures, Shown, picture_loader

TOP = 5


@dataclass(frozen=True)
class View:
    """How a picture is shown to a network; timm's words.

    The shorter side is resized to image_size / crop_pct, and a square of image_size is cut from the middle.
    """

    image_size: int
    interpolation: str
    crop_pct: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """A PIL image -> (3, image_size, image_size), normalised."""
        return create_transform(
            (3, self.image_size, self.image_size),
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            mean=self.mean,
            std=self.std,
        )


def view_of(model: nn.Module, **changes: Any) -> View:
    """How the network's pretrained_cfg says that pictures are shown; `changes` that are not None override it."""
    cfg = model.pretrained_cfg
    usual = {"image_size": cfg["input_size"][-1], **{key: cfg[key] for key in ("interpolation", "crop_pct")}}
    usual |= {"mean": tuple(cfg["mean"]), "std": tuple(cfg["std"])}
    return View(**usual | {key: value for key, value in changes.items() if value is not None})


class Validation:
    """Pictures to measure networks on, divided among the processes.

    Args:
        pictures: of all processes.
        view: how they are shown.
        batch_size: for each process.
        workers: loader processes.
        state: of the processes, with the device.
        begin_worker: called in each loader process when it starts.
    """

    def __init__(
        self,
        pictures: Pictures,
        view: View,
        batch_size: int,
        workers: int,
        state: PartialState | Accelerator,
        begin_worker: Callable[[int], None] = end_when_unable_to_send,
    ) -> None:
        mine = range(state.process_index, len(pictures), state.num_processes)
        self._batches = [list(mine[start : start + batch_size]) for start in range(0, len(mine), batch_size)]
        self._shown, self._workers, self._state = Shown(pictures, view.transform()), workers, state
        self._begin_worker = begin_worker

    @torch.no_grad()
    def scores(self, model: nn.Module, cast: Callable[[], AbstractContextManager] = nullcontext) -> dict[str, float]:
        """{"top1", "top5", "loss"} of a network that is in eval mode; all processes call it.

        Accuracies are percentages, the loss is the mean cross entropy. `cast` makes the context that sets precision.
        """
        loss, first, five, count = 0.0, 0, 0, 0
        for batch in self._loader():
            images, labels = (batch[name].to(self._state.device, non_blocking=True) for name in ("image", "label"))
            with cast():
                logits = model(images).float()
            ranked = logits.topk(min(TOP, logits.shape[1])).indices == labels[:, None]
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            first, five, count = first + int(ranked[:, 0].sum()), five + int(ranked.sum()), count + len(labels)
        loss, first, five, count = map(sum, zip(*gather_object([(loss, first, five, count)]), strict=True))
        return {"top1": 100 * first / count, "top5": 100 * five / count, "loss": loss / count}

    def _loader(self) -> Iterator[dict[str, Tensor]]:
        loader: DataLoader = picture_loader(self._shown, self._batches, self._workers)
        loader.worker_init_fn = self._begin_worker
        return iter(loader)

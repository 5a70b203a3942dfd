"""Training an image network: what its steps see, and the accuracy of its weights and of their average."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sit_atconv.config import ImageConfig
from sit_atconv.randomness import Stream, keyed_generator
from sit_atconv.training.loop import Loop, take_step, train_run
from sit_atconv.training.position import Position
from sit_atconv.training.run.checkpoint import Checkpoints
from sit_atconv.training.run.measures import HELDOUT
from sit_atconv.training.run.stop import follow_trainer
from sit_atconv.zoo.train.session import ImageSession, build_session
from sit_atconv.zoo.validate.scoring import Validation


def train(config: ImageConfig, run: Path, resume: str | None = None, ends_process: bool = False) -> None:
    """Train an image network in the directory `run`, or continue the run there; see `sit_atconv.training.train`."""
    train_run(ImageTrainer, build_session, config, run, resume, ends_process)


class ImageTrainer(Loop):
    """The loop of an image network. Raises `InputError` when batch and processes do not agree."""

    session: ImageSession
    raw = "The accuracy of the weights in training is logged beside that of the average."

    def __init__(self, session: ImageSession, run: Path, checkpoints: Checkpoints, position: Position) -> None:
        super().__init__(session, run, checkpoints, position)
        self.validation = None
        if session.heldout is not None:
            size, workers = session.config.validation.batch_size, session.config.data.workers
            self.validation = Validation(
                session.heldout, session.view, size, workers, session.accelerator, follow_trainer
            )

    def learning_rate(self) -> float:
        return self.session.learning_rate(self.position.step)

    def train_step(self) -> dict[str, Tensor]:
        return take_step(self.session, lambda: prepare_inputs(self.session, self.interval.fetch(self.batches)))

    @property
    def looks(self) -> Sequence[int | None]:
        return (self.session.config.validation.every if self.validation else None,)

    def look(self, due: Callable[[int | None], bool]) -> bool:
        if self.validation is not None and due(self.session.config.validation.every):
            with self.interval.paused():
                self.log.write({"step": self.position.step, **self.accuracies()})
        return False  # the run's last weights count: the best of many validations would be chosen by the held-out data

    def accuracies(self) -> dict[str, float]:
        """{"top1", "top5", "heldout_loss"} of the average, and with "_raw" at their ends of the weights in training."""
        session, scores = self.session, {}
        for ending, model in (("", session.averages.model()), ("_raw", session.model.eval())):
            found = self.validation.scores(model, session.accelerator.autocast)
            found[HELDOUT] = found.pop("loss")
            scores |= {f"{name}{ending}": value for name, value in found.items()}
        session.model.train()
        return scores


def prepare_inputs(session: ImageSession, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The objective's inputs, on the device: images and soft labels, mixed. Seeds what the network draws at random."""
    device, seed, position = session.accelerator.device, session.config.training.seed, int(batch["position"][0])
    images, labels = (batch[name].to(device, non_blocking=True) for name in ("image", "label"))
    inputs = session.mixing(images, labels, position)
    torch.manual_seed(int(keyed_generator(seed, Stream.DROPPED_PATHS, position).integers(2**63)))
    return inputs

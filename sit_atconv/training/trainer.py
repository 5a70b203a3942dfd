"""Training a SiT: what its steps see, and the grids and scores of its averaged weights."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from sit_atconv.alignment import LATENTS
from sit_atconv.autoencoder import sample_posterior
from sit_atconv.config import Config
from sit_atconv.models.flops import training_flops
from sit_atconv.sampling.draw import Drawing
from sit_atconv.training.averages.ema import PowerFunction
from sit_atconv.training.averages.first_weights import first_weights_caption
from sit_atconv.training.averages.power_ema import save_snapshot
from sit_atconv.training.averages.sharding import gather_whole
from sit_atconv.training.loop import Loop, take_step, train_run
from sit_atconv.training.position import Position
from sit_atconv.training.run.checkpoint import Checkpoints
from sit_atconv.training.run.measures import deciding_score
from sit_atconv.training.schedule import learning_rate
from sit_atconv.training.session.objective import Draws
from sit_atconv.training.session.session import Session, build_session
from sit_atconv.training.watch.drawing import sampler_settings
from sit_atconv.training.watch.evaluation import Evaluation
from sit_atconv.training.watch.goals import Goals
from sit_atconv.training.watch.heldout_loss import HeldOutLoss
from sit_atconv.training.watch.preview import Preview
from sit_atconv.training.watch.trackers import show_picture


def train(config: Config, run: Path, resume: str | None = None, ends_process: bool = False) -> None:
    """Train with `config` in the directory `run`, or continue the run there, until all steps are done.

    `resume` names an older checkpoint to go back to, by its step, name or path. `ends_process` says that the process
    ends with training: SIGTERM is then ignored after the last step.

    Raises:
        InputError: when configuration, data and run directory do not agree; nothing is written then.
        SystemExit: with code 143 after SIGTERM and a checkpoint of the last step; with code 1 when training cannot
            continue (`TrainingStopped`).
    """
    train_run(Trainer, build_session, config, run, resume, ends_process)


class Trainer(Loop):
    """The loop of a SiT.

    Raises `InputError` when data, preview, evaluation and the number of processes do not agree.
    """

    session: Session
    raw = "sample.py --weights raw draws the weights in training."

    def __init__(self, session: Session, run: Path, checkpoints: Checkpoints, position: Position) -> None:
        super().__init__(session, run, checkpoints, position)
        config, accelerator, seed = session.config, session.accelerator, session.config.training.seed
        self.preview, self.evaluations = None, []
        preview, evaluation = config.preview, config.evaluation
        drawn = [preview] if preview.every else []
        drawn += [evaluation] if evaluation is not None and evaluation.reference is not None else []
        for drawing in drawn:  # refuse impossible settings now, not at the first grid
            Drawing(accelerator.unwrap_model(session.model), sampler_settings(drawing))
        if preview in drawn and accelerator.is_main_process:
            self.preview = Preview(preview, session.dataset, run / "samples", seed, accelerator.device)
        if evaluation in drawn:
            self.evaluations.append(Evaluation(evaluation, session.dataset, seed, accelerator))
        if evaluation is not None and evaluation.loss:
            self.evaluations.append(HeldOutLoss(session.heldout, evaluation.batch_size, accelerator))
        self.goals = Goals(evaluation, session.epochs)

    def flops(self) -> int:
        return training_flops(self.session.model, self.session.dataset.latent_shape)

    def learning_rate(self) -> float:
        return learning_rate(self.session.config, self.position.step, self.position.seconds)

    def train_step(self) -> dict[str, Tensor]:
        return train_step(self.session, lambda: self.interval.fetch(self.batches))

    def open(self, notes: list[str]) -> None:
        super().open(notes)
        for goal, reached in self.goals.recall(self.log.lines()):
            self.log.write({"step": self.position.step, **self.goals.numbers([goal], reached)})
            self.note(self.goals.sentence(goal, reached))

    @property
    def looks(self) -> Sequence[int | None]:
        config = self.session.config
        return config.preview.every, config.evaluation and config.evaluation.every

    def look(self, due: Callable[[int | None], bool]) -> bool:
        config = self.session.config
        if due(config.preview.every):
            with self.interval.paused():
                self.draw_preview()
        if config.training.power_ema and due(config.training.power_ema_every):
            with self.interval.paused():
                self.save_power_averages()
        return config.evaluation is not None and due(config.evaluation.every) and self.evaluate()

    def draw_preview(self) -> None:
        """Draw the grid of this step from the averaged weights."""
        model = self.session.averages.model()
        if self.preview is not None:
            caption = self.of_first_weights(first_weights_caption)
            path = self.preview.save(model, self.position.step, caption)
            show_picture(self.session.accelerator, path, self.position.step)

    def evaluate(self) -> bool:
        """Score the averaged weights, log the scores and goals reached, and say whether they are the best so far."""
        step, metrics, scores = self.position.step, self.session.config.evaluation.metrics, {}
        with self.interval.paused():
            model = self.session.averages.model()
            for evaluation in self.evaluations:
                scores |= evaluation.scores(model)
        reached = self.goals.reach(scores)
        self.log.write({"step": step, **scores, **self.goals.numbers(reached, step)})
        for goal in reached:
            self.note(self.goals.sentence(goal, step))
        measure = deciding_score(metrics, scores)
        return measure is not None and self.position.note_score(measure, scores[measure])

    def save_power_averages(self) -> None:
        """Write a snapshot of the power-function averages; called before the checkpoint of the same step."""
        averages, main = self.session.averages, self.session.accelerator.is_main_process
        names = [name for name, profile in averages.profiles.items() if isinstance(profile, PowerFunction)]
        tensors = {name: gather_whole(averages.tensors(name), main) for name in names}
        if main:
            save_snapshot(self.directory / "ema", self.position.step, tensors, self.session.model.save_config)


def train_step(session: Session, fetch: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """`take_step` on the micro-batches that `fetch` returns."""
    return take_step(session, lambda: prepare_inputs(session, fetch()))


def prepare_inputs(session: Session, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Draws, list[Tensor] | None]:
    """The objective's inputs, on the device: normalised latents, labels, draws, and each teacher's tokens.

    The tokens are None when the alignment has stopped.
    """
    dataset, device = session.dataset, session.accelerator.device
    drawn = [field.name for field in fields(Draws) if field.name in batch]
    draws = Draws(**{name: batch[name].to(device, non_blocking=True) for name in drawn})
    moments = batch["moments"].to(device, non_blocking=True)
    latents = sample_posterior(moments, draws.posterior_noise, dataset.latents)
    labels = batch["label"].to(device, non_blocking=True)
    if session.teachers and not session.taught(batch):  # then the loader brings nothing for teachers
        return latents, labels, draws, None
    keys = {teacher.key for teacher in session.teachers} - {LATENTS}
    shown = {LATENTS: latents, **{key: batch[key].to(device, non_blocking=True) for key in keys}}
    targets = [teacher.targets(shown, session.model.grid) for teacher in session.teachers]
    return latents, labels, draws, targets

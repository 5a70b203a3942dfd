"""What sample.py does: draw the samples of a checkpoint into a directory, on all processes there are."""

import logging
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from sit_atconv.autoencoder import Autoencoder, LatentSpec, load_autoencoder
from sit_atconv.errors import InputError
from sit_atconv.memory import keep_freed_memory
from sit_atconv.models import SiT
from sit_atconv.models.checkpoint import load_model
from sit_atconv.sampling.draw import Drawing, latent_shape
from sit_atconv.sampling.generate import generate
from sit_atconv.sampling.labels import choose_labels
from sit_atconv.sampling.settings import SamplerSettings
from sit_atconv.sampling.writer import SampleDirectory

log = logging.getLogger(__name__)


def open_generator(
    checkpoint: Path, vae: str | None = None, device: torch.device | str = "cpu"
) -> tuple[SiT, Autoencoder]:
    """A checkpoint's averaged model and the autoencoder of its latents, both on `device`.

    `vae` names another autoencoder for decoding, such as the same one in another place: its latents must be normalised
    alike. Raises `InputError` when the checkpoint does not say what its latents are and `vae` does not either.
    """
    model = load_model(checkpoint).to(device)
    spec = LatentSpec.from_dict(model.config.latents) if model.config.latents else None
    if vae is None and spec is None:
        raise InputError(f"{checkpoint} does not say which autoencoder decodes its latents: name it with --vae.")
    if vae is None:
        return model, load_autoencoder(spec, device=device)
    autoencoder = load_autoencoder(vae, channels=model.config.in_channels, device=device)
    if spec is not None:
        decoder = replace(autoencoder.spec, autoencoder=spec.autoencoder, weights_hash=None)
        spec.require_same(decoder, str(checkpoint), vae)  # but for the weights, which the user chose
        if spec.weights_hash != autoencoder.spec.weights_hash:
            log.warning(
                "Decoding with %s as asked; the latents were made by other weights (%s).", vae, spec.autoencoder
            )
    return model, autoencoder


def sample_to_directory(
    checkpoint: Path,
    out: Path,
    num_samples: int,
    settings: SamplerSettings,
    *,
    labels: str = "balanced",
    seed: int = 0,
    batch_size: int = 64,
    vae: str | None = None,
    png: bool = False,
    weak_checkpoint: Path | None = None,
) -> None:
    """Draw samples 0 … num_samples−1 into `out`; the same call again continues or finds them complete.

    `weak_checkpoint` is a model to guide away from (autoguidance), instead of the null class.

    Raises `InputError` for a checkpoint, label or directory that cannot be used, before anything is written.
    """
    if num_samples < 1 or batch_size < 1:
        raise InputError("The number of samples and the batch size must be at least 1.")
    state = _processes()
    model, autoencoder = open_generator(checkpoint, vae, state.device)
    weak = load_model(weak_checkpoint).to(state.device) if weak_checkpoint else None
    Drawing(model, settings, weak)  # what does not go together is found before anything is written
    num_classes, names = model.config.num_classes, model.config.class_names
    all_labels = choose_labels(labels, range(num_samples), num_classes, seed, names)
    described = {
        "checkpoint": str(checkpoint.resolve()),
        "labels": labels,
        "seed": seed,
        "vae": vae,
        "weak_checkpoint": weak_checkpoint and str(weak_checkpoint.resolve()),
        **asdict(settings),
        "interval": list(settings.interval),
    }
    directory = SampleDirectory(out, num_samples, described, png)
    _, height, width = latent_shape(model)
    downscale = autoencoder.spec.downscale
    if state.is_main_process:
        directory.prepare((height * downscale, width * downscale))
    state.wait_for_everyone()
    if directory.complete:
        log.info("%s is complete already.", directory.npz)
        return

    missing = directory.missing()
    state.wait_for_everyone()  # all have looked before anyone adds to what is there
    if state.is_main_process and 0 < len(missing) < num_samples:
        log.info("Continuing: %d of %d samples are there already.", num_samples - len(missing), num_samples)
    share = missing[state.process_index :: state.num_processes].tolist()
    batches = generate(model, autoencoder, share, settings, labels=labels, seed=seed, batch_size=batch_size, weak=weak)
    begun, silent = num_samples - len(missing), not state.is_main_process
    with tqdm(initial=begun, total=num_samples, unit="img", desc="sampling", disable=silent) as progress:
        for there in directory.write(batches) if share else ():
            progress.update(there - progress.n)
    state.wait_for_everyone()
    if state.is_main_process:
        directory.finish(all_labels)
        log.info("%d samples: %s, a grid of them: %s", num_samples, directory.npz, out / "grid.png")


def _processes() -> PartialState:
    """All that were launched, several CPU processes too, which keep their memory."""
    cpu = not torch.accelerator.is_available()
    if cpu:
        keep_freed_memory()
    return PartialState(cpu=cpu)

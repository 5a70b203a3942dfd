"""The work of sample.py: draw samples of a checkpoint into a directory, on all processes."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from sit_atconv.autoencoder import IDENTITY, Autoencoder, LatentSpec, load_autoencoder
from sit_atconv.errors import InputError
from sit_atconv.models import SiT
from sit_atconv.models.checkpoint import NOTABLE_SHARE, Weights, find_weights, load_model
from sit_atconv.runtime.files import sha256_of_file
from sit_atconv.runtime.lock import Place, locked
from sit_atconv.runtime.processes import process_state
from sit_atconv.runtime.whole_files import followed
from sit_atconv.sampling.draw import Drawing, latent_shape
from sit_atconv.sampling.generate import generate
from sit_atconv.sampling.labels import choose_labels
from sit_atconv.sampling.settings import SamplerSettings
from sit_atconv.sampling.writing.directory import SampleDirectory

log = logging.getLogger(__name__)


def open_generator(
    checkpoint: Path, vae: str | None = None, device: torch.device | str = "cpu", weights: str | None = None
) -> tuple[SiT, Autoencoder]:
    """Open a checkpoint's model and the autoencoder of its latents, both on `device`.

    `weights` chooses an average, or "raw"; by default it is the average in model/ (see `find_weights`).
    `vae` names another autoencoder for decoding, such as a copy in another place; its latents must have the same
    normalisation. A saved pipeline contains its own. Raises `InputError` when neither the checkpoint nor `vae` names an
    autoencoder.
    """
    chosen = find_weights(checkpoint, weights)
    if chosen.first_share > NOTABLE_SHARE:
        log.warning("Samples are drawn from %s. The weights in training are called raw.", chosen)
    model = load_model(checkpoint, weights).to(device)
    spec = LatentSpec.from_dict(model.config.latents) if model.config.latents else None
    if vae is None and spec is None:
        raise InputError(f"{checkpoint} does not say which autoencoder decodes its latents: name it with --vae.")
    if vae is None:
        own = checkpoint / "vae"  # saved again by the pipeline, hence with another digest
        if own.is_dir():
            return model, load_autoencoder(replace(spec, weights_hash=None), location=str(own), device=device)
        return model, load_autoencoder(spec, device=device)
    autoencoder = load_autoencoder(vae, channels=model.config.in_channels, device=device)
    if spec is not None:
        autoencoder.spec = spec.of(autoencoder.spec)
        decoder = replace(autoencoder.spec, autoencoder=spec.autoencoder, weights_hash=None)
        spec.require_same(decoder, str(checkpoint), vae)  # except for the weights, which the user chose
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
    weights: str | None = None,
    vae: str | None = None,
    png: bool = False,
    weak_checkpoint: Path | None = None,
) -> None:
    """Draw samples 0 … num_samples−1 into `out`; the same call continues an interrupted run.

    `weights` are those of `open_generator`. `weak_checkpoint` is a model to guide away from (autoguidance), instead of
    the null class.

    Raises `InputError` for a checkpoint, label or directory that cannot be used, before anything is written, and
    `SystemExit` with a message when `out` is moved meanwhile.
    """
    if num_samples < 1 or batch_size < 1:
        raise InputError(f"Samples and batch size must be at least 1, not {num_samples} and {batch_size}.")
    state = process_state()
    # Resolve links once: a training run moves its link "latest".
    checkpoint, weak_checkpoint = _resolved(checkpoint), weak_checkpoint and _resolved(weak_checkpoint)
    model, autoencoder = open_generator(checkpoint, vae, state.device, weights)
    weak = load_model(weak_checkpoint).to(state.device) if weak_checkpoint else None
    Drawing(model, settings, weak)  # raises for a mismatch before anything is written
    choose_labels(labels, range(1), model.classes, seed)  # raises for unknown labels before anything is written
    directory = SampleDirectory(out, num_samples, png)
    with locked(out, state, "sampled into", "--out"):
        if state.is_main_process:
            described = {"labels": labels, "seed": seed, **settings.to_dict()}
            origins = _origins(checkpoint, weights, weak_checkpoint, vae)
            directory.prepare(_image_size(model, autoencoder), {**origins, **described})
        state.wait_for_everyone()
        if directory.complete:
            log.info("%s is complete already.", directory.npz)
            return

        (missing,) = broadcast_object_list([directory.missing() if state.is_main_process else None])
        if state.is_main_process and 0 < len(missing) < num_samples:
            log.info("Continuing: %d of %d samples are there already.", num_samples - len(missing), num_samples)
        share = missing[state.process_index :: state.num_processes].tolist()
        options = {"labels": labels, "seed": seed, "batch_size": batch_size, "weak": weak}
        batches = generate(model, autoencoder, share, settings, **options)
        place = Place(out, "sampling", "--out")
        begun, silent = num_samples - len(missing), not state.is_main_process
        bar = tqdm(initial=begun, total=num_samples, unit="img", desc="sampling", disable=silent)
        with _kept_in(place), bar as progress:
            for there in directory.write(batches) if share else ():
                progress.update(there - progress.n)
                _require_in(place)
        state.wait_for_everyone()
        if state.is_main_process:
            with _kept_in(place):
                directory.finish(choose_labels(labels, range(num_samples), model.classes, seed), model.classes.names)
            log.info("%d samples: %s, a grid of them: %s", num_samples, directory.npz, directory.grid)


def _resolved(checkpoint: Path) -> Path:
    return followed(checkpoint).resolve()


def _require_in(place: Place) -> None:
    if not place.is_there:
        raise SystemExit(place.gone)


@contextlib.contextmanager
def _kept_in(place: Place) -> Iterator[None]:
    """What fails within because the directory was moved ends the command with code 1 and says so."""
    try:
        yield
    except OSError:
        _require_in(place)
        raise


def _origins(checkpoint: Path, weights: str | None, weak_checkpoint: Path | None, vae: str | None) -> dict[str, Any]:
    """Paths of the models and, under `sha256`, the hashes of their files, since a path may be trained again."""
    models = {"checkpoint": find_weights(checkpoint, weights)}
    if weak_checkpoint:
        models["weak_checkpoint"] = find_weights(weak_checkpoint)
    if vae and vae != IDENTITY and Path(vae).is_dir():
        models["vae"] = Weights(Path(vae))
    return {
        "checkpoint": str(checkpoint),
        "weights": models["checkpoint"].name,
        "vae": vae,
        "weak_checkpoint": weak_checkpoint and str(weak_checkpoint),
        "sha256": {what: {path.name: sha256_of_file(path) for path in model.files} for what, model in models.items()},
    }


def _image_size(model: SiT, autoencoder: Autoencoder) -> tuple[int, int]:
    """Height and width of decoded samples, in pixels."""
    _, height, width = latent_shape(model)
    downscale = autoencoder.spec.downscale
    return height * downscale, width * downscale

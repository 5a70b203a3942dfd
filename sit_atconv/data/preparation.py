"""Preparation of a data set: what is wanted, who writes what, and what is known when all is written."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from sit_atconv.alignment import Teacher
from sit_atconv.autoencoder import IDENTITY, Autoencoder, load_autoencoder
from sit_atconv.data.encoding import read_note, remove_notes, shard_count, write_shards
from sit_atconv.data.manifest import MANIFEST_NAME, Manifest, load_manifest, save_manifest
from sit_atconv.data.protocol import ImageSource
from sit_atconv.data.shards import MAX_SHARD_SIZE
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare. `resolution` is (height, width); `channels` chooses grey (1) for the identity autoencoder.

    `flip` also encodes mirror images; `images` keeps the crops beside their latents, and `teachers` the tokens of these
    (name, weights); `unconditional` drops the labels; more than `max_bad` pictures that cannot be decoded are an error.
    """

    source: str
    out: str
    resolution: tuple[int, int]
    vae: str
    channels: int | None = None
    flip: bool = False
    images: bool = False
    teachers: tuple[tuple[str, str], ...] = ()
    unconditional: bool = False
    batch_size: int = 32
    shard_size: int = MAX_SHARD_SIZE
    max_bad: int = 0
    workers: int = 2


def prepare(options: PrepareOptions) -> Manifest:
    """Prepare a data set, or finish one that was interrupted, and return its manifest.

    Raises `InputError` when the source, the autoencoder or a teacher cannot be used, when `out` holds something else or
    was begun with other settings, when the disk is full, or when more than `max_bad` pictures cannot be decoded.
    """
    state = process_state()
    source = open_source(options.source, convert=True)
    autoencoder = load_autoencoder(options.vae, channels=options.channels, device=state.device)
    teachers = [Teacher(name, weights, state.device) for name, weights in options.teachers]
    manifest = _describe(options, source, autoencoder, teachers)
    out = Path(options.out)
    if _is_complete(out, manifest):
        if state.is_main_process:
            log.info("%s is already complete.", out)
        return load_manifest(out)

    # Everyone has compared settings before the first process begins to write.
    state.wait_for_everyone()
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        save_manifest(manifest, out)
    state.wait_for_everyone()

    # A shard belongs to one process by its number alone, whatever is complete already.
    mine = range(state.process_index, shard_count(manifest), state.num_processes)
    write_shards(
        source,
        autoencoder,
        teachers,
        manifest,
        out,
        [number for number in mine if read_note(out, number) is None],
        batch_size=options.batch_size,
        workers=options.workers,
        progress=state.is_main_process,
    )
    state.wait_for_everyone()
    return _finish(manifest, out, options.max_bad) if state.is_main_process else manifest


def process_state() -> PartialState:
    """This process among those of the launcher.

    Without an accelerator, Accelerate joins processes only if told so. They wait for one another as long as it takes:
    after a restart one may have hours more to do than the others; a dead one is noticed by the launcher.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def _describe(
    options: PrepareOptions, source: ImageSource, autoencoder: Autoencoder, teachers: Sequence[Teacher]
) -> Manifest:
    names = [teacher.name for teacher in teachers]
    if len(set(names)) < len(names):
        raise InputError(f"The teachers {', '.join(names)} name one twice: give each once.")
    spec = autoencoder.spec
    autoencoder.require_divisible(*options.resolution)
    # Latents that are pixels are mirrored exactly as they are read, and are their own pictures.
    is_pixels = spec.autoencoder == IDENTITY
    labels = None if options.unconditional else source.labels
    if labels is not None and labels.min() < 0:
        raise InputError(f"{options.source} has pictures without a label (below 0): give --unconditional to drop all.")
    names = None if labels is None else source.class_names
    return Manifest(
        source=options.source,
        resolution=options.resolution,
        latents=spec,
        class_names=names,
        num_classes=0 if labels is None else len(names) if names else int(labels.max()) + 1,
        has_flip=options.flip and not is_pixels,
        has_images=options.images and not is_pixels,
        shard_size=options.shard_size,
        source_count=len(source),
        teachers=[teacher.spec(*options.resolution, options.flip) for teacher in teachers],
    )


def _is_complete(out: Path, manifest: Manifest) -> bool:
    """Whether `out` holds this data set already. Raises `InputError` when it holds something else."""
    if not (out / MANIFEST_NAME).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists and holds no data set of ours: choose a new or empty directory.")
        return False
    found = load_manifest(out)
    old, new = found.settings(), manifest.settings()
    differing = [f"{key}: {old[key]} there, {new[key]} now" for key in new if old[key] != new[key]]
    if differing:
        raise InputError(
            f"{out} was begun with other settings ({'; '.join(differing)}). Use those, or choose another directory."
        )
    return found.complete


def _finish(manifest: Manifest, out: Path, max_bad: int) -> Manifest:
    """Gather what the shards' notes say into dataset.json."""
    notes = [read_note(out, number) for number in range(shard_count(manifest))]
    skipped = [skip for _, skips in notes for skip in skips]
    shards = [info for info, _ in notes]
    for skip in skipped:
        log.warning("skipped: %s", skip.reason)
    if len(skipped) > max_bad:
        raise InputError(
            f"{len(skipped)} of {manifest.source_count} pictures could not be decoded (named above); {max_bad} are "
            f"allowed. To go on without them, run the same command with --max-bad {len(skipped)}: nothing is encoded "
            "again."
        )
    count = sum(info.count for info in shards)
    if count == 0:
        raise InputError(f"Not one picture of {manifest.source} could be decoded.")
    manifest = replace(manifest, shards=shards, skipped=skipped, count=count, complete=True)
    save_manifest(manifest, out)
    remove_notes(out, range(shard_count(manifest)))
    classes = f"{manifest.num_classes} classes" if manifest.num_classes else "no labels"
    log.info("%s: %d pictures, %s, latents %s, %d skipped.", out, count, classes, manifest.latent_shape, len(skipped))
    return manifest

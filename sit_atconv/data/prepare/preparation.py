"""Preparation of a data set: describe it, divide its shards among processes, and write its manifest."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object

from sit_atconv.alignment import Teacher
from sit_atconv.autoencoder import IDENTITY, Autoencoder, load_autoencoder
from sit_atconv.classes import Classes
from sit_atconv.data.pictures.protocol import ImageSource
from sit_atconv.data.pictures.remarks import Remarks
from sit_atconv.data.prepare.batches import LatentBatches, SourceBatches
from sit_atconv.data.prepare.encoding import moments_encoder, tokens_encoder, write_shards
from sit_atconv.data.prepare.importing import ImportedLatents, open_for_import
from sit_atconv.data.prepare.options import PrepareOptions
from sit_atconv.data.shards.files import ShardFiles
from sit_atconv.data.shards.manifest import MANIFEST_NAME, Manifest, load_manifest, save_manifest
from sit_atconv.data.sources import open_source, require_undamaged
from sit_atconv.errors import InputError
from sit_atconv.runtime.lock import LOCK, locked
from sit_atconv.runtime.processes import process_state
from sit_atconv.runtime.whole_files import leftovers, remove_leftovers

log = logging.getLogger(__name__)


def prepare(options: PrepareOptions) -> Manifest:
    """Prepare a data set, or finish one that was interrupted, and return its manifest.

    Raises `InputError` when the source, the autoencoder or a teacher cannot be used, when `out` holds something else or
    was begun with other settings, or when more than `max_bad` pictures cannot be decoded; `OSError` naming the file
    when the disk is full.
    """
    state = process_state()
    autoencoder = load_autoencoder(options.vae, channels=options.channels, device=state.device)
    teachers = [Teacher(name, weights, state.device) for name, weights in options.teachers]
    importing = options.take_latents
    source = (
        open_for_import(options, autoencoder) if importing else open_source(options.source, options=options.reading)
    )
    manifest = _describe(options, source, autoencoder, teachers)
    out = Path(options.out)
    if not _on_all(_is_complete(out, manifest, source)):
        state.wait_for_everyone()  # everyone has compared settings before the first process begins to write
        with locked(out, state, "prepared", "OUT"):
            if not _on_all(_is_complete(out, manifest, source)):  # another program may have completed it meanwhile
                return _encode(options, source, manifest, autoencoder, teachers)
    if state.is_main_process:
        log.info("%s is already complete.", out)
    return load_manifest(out)


def _encode(
    options: PrepareOptions,
    source: ImageSource | ImportedLatents,
    manifest: Manifest,
    autoencoder: Autoencoder,
    teachers: Sequence[Teacher],
) -> Manifest:
    """Write the manifest, the missing shards, and then the manifest of the complete data set, which is returned."""
    state, out = process_state(), Path(options.out)
    require_undamaged(source)
    files = ShardFiles(out, manifest.shard_rows, basis=partial(_basis, source, manifest))
    if state.is_main_process:
        remove_leftovers(out)
        save_manifest(manifest, out)
        files.remove_from(_shard_count(manifest))
    state.wait_for_everyone()

    importing = options.take_latents
    encoders = [] if importing else [moments_encoder(autoencoder, manifest.has_flip)]
    encoders += [tokens_encoder(teacher, k, manifest.teachers[k].flip) for k, teacher in enumerate(teachers)]
    batches = LatentBatches(source, manifest) if importing else SourceBatches(source, manifest)
    # The number of a shard alone decides which process writes it, whichever shards are already complete.
    mine = range(state.process_index, _shard_count(manifest), state.num_processes)
    remarks = write_shards(
        batches,
        files,
        {number: _shard_range(manifest, number) for number in mine if _is_missing(files, number, batches)},
        encoders,
        batch_size=options.batch_size,
        workers=options.workers,
        device=state.device,
        progress=state.is_main_process,
    )
    remarks = sum(gather_object([remarks]), Remarks())
    if not state.is_main_process:
        return manifest
    remarks.say(options.source, options.reading)
    return _finish(manifest, source.labels, files, options.max_bad)


def _basis(source: ImageSource | ImportedLatents, manifest: Manifest, number: int) -> dict:
    """Identifies a shard's pictures and labels, in case the source changes before preparation is complete."""
    covered = _shard_range(manifest, number)
    basis = {}
    if source.names is not None:
        text = json.dumps(source.names[covered.start : covered.stop])  # escapes names that are not UTF-8
        basis["names"] = hashlib.sha256(text.encode()).hexdigest()
    if source.labels is not None:
        labels = np.ascontiguousarray(source.labels[covered.start : covered.stop], dtype=np.int64)
        basis["labels"] = hashlib.sha256(labels).hexdigest()
    return basis


def _is_missing(files: ShardFiles, number: int, batches: LatentBatches | SourceBatches) -> bool:
    """Whether a shard must be written: it does not exist, or a picture skipped in it can be decoded now."""
    note = files.read_note(number)
    return note is None or any(not batches[number, skip.index, skip.index + 1].skipped for skip in note[1])


def _shard_range(manifest: Manifest, number: int) -> range:
    """Positions of the source that a shard covers."""
    return range(number * manifest.shard_size, min((number + 1) * manifest.shard_size, manifest.source_count))


def _shard_count(manifest: Manifest) -> int:
    return -(-manifest.source_count // manifest.shard_size)


def _describe(
    options: PrepareOptions,
    source: ImageSource | ImportedLatents,
    autoencoder: Autoencoder,
    teachers: Sequence[Teacher],
) -> Manifest:
    taught = [teacher.name for teacher in teachers]
    if len(set(taught)) < len(taught):
        raise InputError(f"The teachers {', '.join(taught)} name one twice: give each once.")
    spec = source.latents if options.take_latents else autoencoder.spec
    resolution = source.resolution if options.take_latents else options.resolution
    autoencoder.require_divisible(*resolution)
    # Latents that are pixels can be mirrored exactly when they are read, and are their own pictures.
    is_pixels = spec.autoencoder == IDENTITY
    labels, names = source.labels, source.class_names
    return Manifest(
        source=options.source,
        resolution=resolution,
        latents=spec,
        class_names=names,
        num_classes=0 if labels is None else len(names) if names else int(labels.max()) + 1,
        has_flip=(source.has_flip if options.take_latents else options.flip) and not is_pixels,
        has_images=options.images and not is_pixels,
        shard_size=options.shard_size,
        source_count=len(source),
        teachers=[teacher.spec(*resolution, options.flip) for teacher in teachers],
        moments_dtype="float32" if options.take_latents else "float16",
        exif=options.reading.exif,
        bits=options.reading.bits,
    )


def _is_complete(out: Path, manifest: Manifest, source: ImageSource | ImportedLatents) -> bool:
    """Whether `out` already holds this data set, complete. Raises `InputError` when it holds something else.

    Until preparation is complete, files of the source may change: each shard's note identifies the files it covers.
    """
    if not (out / MANIFEST_NAME).exists():
        if out.exists() and (not out.is_dir() or set(out.iterdir()) - {out / LOCK, *leftovers(out)}):
            raise InputError(f"{out} exists and holds no data set of ours: choose a new or empty directory.")
        return False
    found = load_manifest(out)
    old, new = found.settings(), manifest.settings()
    if not found.complete and source.names is not None:
        del new["source_count"]
    differing = [f"{key}: {old[key]} there, {new[key]} now" for key in new if old[key] != new[key]]
    if differing:
        adding = f" Add teachers by: python -m sit_atconv.data.prepare {out} --teacher NAME." if found.complete else ""
        raise InputError(
            f"{out} was begun with other settings ({'; '.join(differing)}). Use those, or another directory.{adding}"
        )
    return found.complete


def _on_all(answer: bool) -> bool:
    """The main process's answer, for all processes: each may look at a different moment and find something else."""
    (answer,) = broadcast_object_list([answer])
    return answer


def _finish(manifest: Manifest, labels: np.ndarray | None, files: ShardFiles, max_bad: int) -> Manifest:
    """Collect the shards' notes into dataset.json."""
    out, numbers = files.directory, range(_shard_count(manifest))
    notes = [files.read_note(number) for number in numbers]
    skipped = [skip for _, skips in notes for skip in skips]
    shards = [info for info, _ in notes]
    for skip in skipped:
        log.warning("skipped: %s", skip.reason)
    if len(skipped) > max_bad:
        raise InputError(
            f"{len(skipped)} of {manifest.source_count} pictures could not be decoded (named above); {max_bad} are "
            "allowed. Replace or remove them and run the same command again; or continue without them with "
            f"--max-bad {len(skipped)}, which encodes nothing again."
        )
    count = sum(info.count for info in shards)
    if count == 0:
        raise InputError(f"Not one picture of {manifest.source} could be decoded.")
    manifest = replace(manifest, shards=shards, skipped=skipped, count=count, complete=True)
    if labels is not None:
        present = set(np.delete(labels, [skip.index for skip in skipped]).tolist())
        manifest = replace(manifest, empty_classes=[c for c in range(manifest.num_classes) if c not in present])
        if empty := manifest.empty_classes:
            named = Classes(manifest.num_classes, manifest.class_names).titles(empty)
            log.warning("%s: %d classes have no picture: %s.", out, len(empty), named)
    save_manifest(manifest, out)
    files.remove_notes(numbers)
    classes = f"{manifest.num_classes} classes" if manifest.num_classes else "no labels"
    log.info("%s: %d pictures, %s, latents %s, %d skipped.", out, count, classes, manifest.latent_shape, len(skipped))
    return manifest

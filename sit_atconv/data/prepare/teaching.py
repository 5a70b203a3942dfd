"""Add a teacher's tokens to data that are already prepared, from the pictures kept with them; nothing is encoded."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from sit_atconv.alignment import Teacher
from sit_atconv.alignment.cached import find_tokens, tokens_name
from sit_atconv.data.prepare.batches import StoredBatches
from sit_atconv.data.prepare.encoding import tokens_encoder, write_shards
from sit_atconv.data.remote.storage import is_remote
from sit_atconv.data.repa import is_repa
from sit_atconv.data.shards.dataset import ShardDataset
from sit_atconv.data.shards.files import ShardFiles
from sit_atconv.data.shards.manifest import Manifest, load_manifest, save_manifest
from sit_atconv.errors import InputError
from sit_atconv.runtime.lock import locked
from sit_atconv.runtime.processes import process_state

log = logging.getLogger(__name__)


def add_teachers(
    directory: str, teachers: Sequence[tuple[str, str]], *, flip: bool, batch_size: int, workers: int
) -> Manifest:
    """Write the tokens of these teachers (name, weights) to files beside each shard, and return the new manifest.

    Tokens of mirror images are added if the data have mirrored latents or, for pixels, if `flip`. The data can be read
    meanwhile, and do not change until all tokens of a teacher are written; after an interruption, complete files are
    kept. Raises `InputError` when the data are incomplete or hold no pictures, when a teacher cannot be used or its
    tokens of other weights are there, or when the disk is full.
    """
    state = process_state()
    if is_remote(directory):
        raise InputError(f"{directory} is not on this machine: copy it, add the teacher to the copy, and upload that.")
    if is_repa(directory):
        raise InputError(f"{directory} was prepared for REPA: give the teacher while it is imported (--import).")
    dataset = ShardDataset(directory)
    if not dataset.has_images:
        raise InputError(f"{directory} holds no pictures, which a teacher needs: prepare it anew with --teacher.")
    if flip and not dataset.has_flip:
        raise InputError(f"{directory} holds no mirrored latents, so tokens of mirror images are of no use.")
    with locked(Path(directory), state, "prepared", "data set"):
        dataset, manifest = ShardDataset(directory), load_manifest(directory)  # another program may have changed them
        for name, weights in teachers:
            if name in [spec.name for spec in manifest.teachers]:
                held = manifest.teachers[find_tokens(name, weights, manifest.teachers, directory)]
                if flip and not held.flip:
                    raise InputError(f"{directory} holds {name}'s tokens of unmirrored pictures only: prepare it anew.")
                log.info("%s holds the tokens of %s already.", directory, name)
                continue
            teacher = Teacher(name, weights, state.device)
            spec = teacher.spec(*manifest.resolution, flip or manifest.has_flip)
            number, extended = len(manifest.teachers), replace(manifest, teachers=[*manifest.teachers, spec])
            files = _token_files(Path(directory), extended, number)
            mine = range(state.process_index, len(manifest.shards), state.num_processes)
            write_shards(
                StoredBatches(dataset),
                files,
                {shard: dataset.shard_range(shard) for shard in files.missing(mine)},
                [tokens_encoder(teacher, number, spec.flip)],
                batch_size=batch_size,
                workers=workers,
                device=state.device,
                progress=state.is_main_process,
            )
            state.wait_for_everyone()
            manifest = _finish(extended, files, state)
    return manifest


def _token_files(root: Path, manifest: Manifest, number: int) -> ShardFiles:
    """The token files of one teacher, one per shard; existing ones count if teacher and pictures are the same."""
    pictures = hashlib.sha256("".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()
    basis = {"teacher": manifest.teachers[number].to_dict(), "pictures": pictures}
    return ShardFiles(root, manifest.token_rows(number), tokens_name(number), lambda shard: basis)


def _finish(manifest: Manifest, files: ShardFiles, state: PartialState) -> Manifest:
    """List the token files in dataset.json, which adds the last teacher's tokens to the data."""
    numbers = range(len(manifest.shards))
    infos = [files.read_note(shard)[0] for shard in numbers]
    state.wait_for_everyone()  # everyone has read the notes
    manifest = replace(manifest, token_files={**manifest.token_files, files.part: infos})
    if state.is_main_process:
        save_manifest(manifest, files.directory)
        files.remove_notes(numbers)
        shape = files.rows[files.part].shape
        log.info("%s: tokens of %s added, %s a picture.", files.directory, manifest.teachers[-1].name, shape)
    return manifest

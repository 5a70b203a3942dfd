"""Pictures -> latent shards: ``python -m sit_atconv.data.prepare SOURCE OUT --resolution 256 --vae ID``.

Under ``accelerate launch`` every process writes whole shards of its own, the same bytes that one process would write.
Run the same command again after an interruption: complete shards are kept.
"""

import argparse
import logging
import re
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
from sit_atconv.data.verify import verify_dataset
from sit_atconv.errors import InputError, exit_on_input_error

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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sit_atconv.data.prepare", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("source", help="folder, zip, npz, REPA directory, hf:NAME or digits; with --verify alone, the data set")
    add("out", nargs="?", help="directory of the new data set")
    add("--resolution", type=_resolution, metavar="R|HxW", help="size of the crops: 256, or height x width as 256x384")
    add("--vae", metavar="ID", help="hub id or folder of a diffusers autoencoder, or 'identity' for pixels")
    add("--channels", type=int, choices=(1, 3), help="of the identity: 1 for grey, 3 for RGB (default)")
    add("--flip", action="store_true", help="also encode the mirror image of every picture")
    add("--images", action="store_true", help="keep the crops, losslessly, beside their latents (a teacher needs them)")
    add("--teacher", action="append", default=[], metavar="NAME", help="keep this timm model's tokens; repeatable")
    add(
        "--teacher-weights",
        action="append",
        default=[],
        metavar="W",
        help="hub (default), random or a file, for each",
    )
    add("--unconditional", action="store_true", help="drop the labels, e.g. of folders that are not classes")
    add("--batch-size", type=_positive, default=32, help="pictures encoded at a time (default 32)")
    add(
        "--shard-size",
        type=_positive,
        default=MAX_SHARD_SIZE,
        help=f"samples a shard (default, most: {MAX_SHARD_SIZE})",
    )
    add("--max-bad", type=_count, default=0, help="pictures that may be undecodable (default 0)")
    add("--workers", type=_count, default=2, help="decoding processes for each encoding one (default 2)")
    add("--verify", action="store_true", help="check every byte of the data set (afterwards, or with OUT alone)")
    return parser


def _resolution(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match or min(map(int, filter(None, match.groups()))) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no size: expected 256, or height x width as 256x384")
    return int(match[1]), int(match[2] or match[1])


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number, 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    given = vars(parser.parse_args(argv))
    verify, only_verify = given.pop("verify"), given["out"] is None
    if only_verify and not verify:
        parser.error("OUT is missing")
    if not only_verify and None in (given["resolution"], given["vae"]):
        parser.error("--resolution and --vae are required")
    if given["shard_size"] > MAX_SHARD_SIZE:
        parser.error(f"--shard-size is at most {MAX_SHARD_SIZE}")
    names, weights = given.pop("teacher"), given.pop("teacher_weights")
    if weights and len(weights) != len(names):
        parser.error(f"--teacher-weights is given {len(weights)} times for {len(names)} teachers: give one for each")
    given["teachers"] = tuple(zip(names, weights or ["hub"] * len(names), strict=True))
    with exit_on_input_error():
        if not only_verify:
            prepare(PrepareOptions(**given))
        if verify and process_state().is_main_process:
            verify_dataset(given["source"] if only_verify else given["out"])


if __name__ == "__main__":
    main()

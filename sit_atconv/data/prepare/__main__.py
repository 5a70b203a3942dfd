"""Pictures -> latent shards: ``python -m sit_atconv.data.prepare SOURCE OUT --resolution 256 --vae ID``.

Under ``accelerate launch`` every process writes its own shards, with the same bytes that a single process would write.
Run the same command again after an interruption: complete shards are kept. Without OUT, SOURCE is a prepared data set
to be verified (--verify), or to which a teacher's tokens are added (--teacher).
"""

import argparse
import logging
import re
from collections.abc import Sequence

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.prepare.options import PrepareOptions
from sit_atconv.data.prepare.preparation import prepare
from sit_atconv.data.prepare.teaching import add_teachers
from sit_atconv.data.prepare.uploading import prepare_remotely
from sit_atconv.data.remote.storage import is_remote
from sit_atconv.data.shards.manifest import MAX_SHARD_SIZE
from sit_atconv.data.shards.verify import verify_dataset
from sit_atconv.errors import exit_on_input_error
from sit_atconv.runtime.arguments import Parser, count, whole_number, workers
from sit_atconv.runtime.launcher import asked_precision
from sit_atconv.runtime.processes import leaving_in_order, process_state

log = logging.getLogger(__name__)

_READING = ("unconditional", "image_key", "label_key", "exif", "bits")
_side = whole_number(1, 16_384)  # pixels


def _parser() -> Parser:
    description = __doc__.split("\n\n")[0]
    parser = Parser("python -m sit_atconv.data.prepare", description=description)
    add = parser.add_argument
    add("source", help="pictures (docs/own_data.md lists the formats), or digits; without OUT, a prepared data set")
    add("out", nargs="?", help="directory of the new data set, or an address such as s3://BUCKET/NAME")
    add("--resolution", type=_resolution, metavar="R|HxW", help="size of the crops: 256, or height x width as 256x384")
    add("--vae", metavar="ID", help="hub id or folder of a diffusers autoencoder, or 'identity' for pixels")
    others = "take over the latents of REPA, EDM2, LightningDiT, fast-DiT or MAR"
    add("--import", action="store_true", dest="take_latents", help=others)
    add("--channels", type=int, choices=(1, 3), help="of the identity: 1 for grey, 3 for RGB (default)")
    add("--flip", action="store_true", help="also encode the mirror image of every picture")
    add("--images", action="store_true", help="keep the crops, losslessly, beside their latents (a teacher needs them)")
    add("--teacher", action="append", default=[], metavar="NAME", help="keep this timm model's tokens; repeatable")
    weights = "hub (default), random or a file, for each"
    add("--teacher-weights", action="append", default=[], metavar="W", help=weights)
    add("--unconditional", action="store_true", help="read no labels, e.g. where folders are not classes")
    add("--image-key", "--image-column", metavar="NAME", help="the array or column of pictures, if not the usual one")
    add("--label-key", "--label-column", metavar="NAME", help="the array or column of labels, if not the usual one")
    add("--exif", action="store_true", help="turn pictures as their EXIF orientation says (ADM ignores it)")
    add("--bits", type=whole_number(9, 16), help="bits that 16-bit grey pictures use, as 12 (default 16)")
    add("--batch-size", type=count, default=32, help="pictures encoded at a time (default 32)")
    most = f"samples a shard (default, most: {MAX_SHARD_SIZE})"
    add("--shard-size", type=whole_number(1, MAX_SHARD_SIZE), default=MAX_SHARD_SIZE, help=most)
    add("--max-bad", type=whole_number(0), default=0, help="pictures that may be undecodable (default 0)")
    add("--workers", type=workers, default=2, help="decoding processes for each encoding one (default 2)")
    add("--verify", action="store_true", help="check every byte of the data set afterwards")
    return parser


def _resolution(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no size: expected 256, or height x width as 256x384")
    return _side(match[1]), _side(match[2] or match[1])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    given = vars(parser.parse_args(argv))
    verify, in_place = given.pop("verify"), given["out"] is None
    names, weights = given.pop("teacher"), given.pop("teacher_weights")
    if weights and len(weights) != len(names):
        parser.error(f"--teacher-weights is given {len(weights)} times for {len(names)} teachers: give one for each")
    given["teachers"] = tuple(zip(names, weights or ["hub"] * len(names), strict=True))
    if in_place and not (verify or names):
        parser.error("OUT is missing")
    if in_place:
        _refuse_idle(parser, given)
    elif given["vae"] is None or (given["resolution"] is None and not given["take_latents"]):
        parser.error("--resolution and --vae are required (--vae alone with --import)")
    with exit_on_input_error(), leaving_in_order():
        if process_state().is_main_process and (precision := asked_precision()):
            log.warning("The launcher's --mixed_precision %s is for training: pictures are encoded in fp32.", precision)
        if not in_place:
            reading = SourceOptions(convert=True, **{key: given.pop(key) for key in _READING})
            (prepare_remotely if is_remote(given["out"]) else prepare)(PrepareOptions(reading=reading, **given))
        elif names:
            kept = {key: given[key] for key in ("teachers", "flip", "batch_size", "workers")}
            add_teachers(given["source"], **kept)
        if verify and process_state().is_main_process:
            verify_dataset(given["source"] if in_place else given["out"], given["workers"])


def _refuse_idle(parser: Parser, given: dict) -> None:
    """Without OUT, most options would do nothing."""
    used = {"source", "teachers", "batch_size", "workers", *(["flip"] if given["teachers"] else [])}
    idle = [key for key, value in given.items() if key not in used and value != parser.get_default(key)]
    if idle:
        flags = {"take_latents": "import"}
        listed = ", ".join(f"--{flags.get(key, key).replace('_', '-')}" for key in idle)
        parser.error(f"OUT is missing, without which {listed} would do nothing")


if __name__ == "__main__":
    main()

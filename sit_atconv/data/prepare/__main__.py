"""Pictures -> latent shards: ``python -m sit_atconv.data.prepare SOURCE OUT --resolution 256 --vae ID``.

Under ``accelerate launch`` every process writes its own shards, with the same bytes that a single process would write.
Run the same command again after an interruption: complete shards are kept. Without OUT, SOURCE is a prepared data set
to be verified (--verify), or to which a teacher's tokens are added (--teacher).
"""

import argparse
import re
from collections.abc import Sequence

from sit_atconv.data.prepare.options import PrepareOptions
from sit_atconv.data.prepare.preparation import prepare
from sit_atconv.data.prepare.teaching import add_teachers
from sit_atconv.data.shards.manifest import MAX_SHARD_SIZE
from sit_atconv.data.shards.verify import verify_dataset
from sit_atconv.errors import exit_on_input_error
from sit_atconv.runtime.processes import leaving_in_order, process_state


def _parser() -> argparse.ArgumentParser:
    description = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser("python -m sit_atconv.data.prepare", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("source", help="folder, zip, npz, REPA directory, hf:NAME or digits; without OUT, a prepared data set")
    add("out", nargs="?", help="directory of the new data set")
    add("--resolution", type=_resolution, metavar="R|HxW", help="size of the crops: 256, or height x width as 256x384")
    add("--vae", metavar="ID", help="hub id or folder of a diffusers autoencoder, or 'identity' for pixels")
    add("--import", action="store_true", dest="take_latents", help="keep the latents of a REPA directory as they are")
    add("--channels", type=int, choices=(1, 3), help="of the identity: 1 for grey, 3 for RGB (default)")
    add("--flip", action="store_true", help="also encode the mirror image of every picture")
    add("--images", action="store_true", help="keep the crops, losslessly, beside their latents (a teacher needs them)")
    add("--teacher", action="append", default=[], metavar="NAME", help="keep this timm model's tokens; repeatable")
    weights = "hub (default), random or a file, for each"
    add("--teacher-weights", action="append", default=[], metavar="W", help=weights)
    add("--unconditional", action="store_true", help="drop the labels, e.g. of folders that are not classes")
    add("--batch-size", type=_positive, default=32, help="pictures encoded at a time (default 32)")
    most = f"samples a shard (default, most: {MAX_SHARD_SIZE})"
    add("--shard-size", type=_positive, default=MAX_SHARD_SIZE, help=most)
    add("--max-bad", type=_count, default=0, help="pictures that may be undecodable (default 0)")
    add("--workers", type=_count, default=2, help="decoding processes for each encoding one (default 2)")
    add("--verify", action="store_true", help="check every byte of the data set afterwards")
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
    if given["shard_size"] > MAX_SHARD_SIZE:
        parser.error(f"--shard-size is at most {MAX_SHARD_SIZE}")
    with exit_on_input_error(), leaving_in_order():
        if not in_place:
            prepare(PrepareOptions(**given))
        elif names:
            kept = {key: given[key] for key in ("teachers", "flip", "batch_size", "workers")}
            add_teachers(given["source"], **kept)
        if verify and process_state().is_main_process:
            verify_dataset(given["source"] if in_place else given["out"], given["workers"])


def _refuse_idle(parser: argparse.ArgumentParser, given: dict) -> None:
    """Refuse options that would do nothing without OUT."""
    used = {"source", "teachers", "batch_size", "workers", *(["flip"] if given["teachers"] else [])}
    idle = [key for key, value in given.items() if key not in used and value != parser.get_default(key)]
    if idle:
        flags = {"take_latents": "import"}
        listed = ", ".join(f"--{flags.get(key, key).replace('_', '-')}" for key in idle)
        parser.error(f"OUT is missing, without which {listed} would do nothing")


if __name__ == "__main__":
    main()

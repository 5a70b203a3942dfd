"""Convert a released checkpoint of SiT, REPA or ATConv: `python -m sit_atconv.convert RELEASED.pt OUT`.

Size, mixers, classes, position embedding and, except in pruned checkpoints, the direction of time are read from the
tensors. The options are for everything else.
"""

import logging
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from sit_atconv.autoencoder import load_autoencoder
from sit_atconv.convert.checkpoint import read_released
from sit_atconv.convert.directory import PROJECTORS_NAME, save_converted
from sit_atconv.convert.released import convert
from sit_atconv.convert.structure import LAYOUTS
from sit_atconv.errors import exit_on_input_error
from sit_atconv.flow.interpolants import INTERPOLANTS, PREDICTIONS
from sit_atconv.models.mixers import describe_pattern
from sit_atconv.models.mixers.atconv import ACTIVATIONS, POOLS
from sit_atconv.models.sit import POSITIONS
from sit_atconv.runtime.whole_files import require_free

log = logging.getLogger(__name__)


def _parser() -> ArgumentParser:
    summary, details = __doc__.split("\n\n")
    parser = ArgumentParser(
        prog="python -m sit_atconv.convert", description=summary, epilog=details, allow_abbrev=False
    )
    add = parser.add_argument
    add("released", type=Path, help=".pt (with or without 'ema' or 'model') or .safetensors")
    add("out", type=Path, help="directory to create, for SiT.from_pretrained and sample.py")
    add("--num-heads", type=int, help="attention heads, for widths other than those of S, B, L and XL")
    add("--weights", choices=("ema", "model"), help="which weights of a checkpoint with both (default: ema)")
    add("--layout", choices=LAYOUTS, help="sit: t = 1 is data; repa: t = 1 is noise; if the tensors leave it open")
    add("--input-size", type=int, help="side of the latents, for networks without a position embedding")
    add("--num-classes", type=int, help="number of rows of the label table, if it has no null class")
    add("--position", choices=POSITIONS, help="for checkpoints without a table; sincos also replaces a rounded table")
    add("--pool", choices=POOLS, help="of ATConv (default: raster, as in the released code)")
    add("--activation", choices=tuple(ACTIVATIONS), help="of ATConv (default: that of the released code tree)")
    add("--interpolant", choices=tuple(INTERPOLANTS), help="default: from the checkpoint's arguments, or linear")
    add("--prediction", choices=PREDICTIONS, help="default: from the checkpoint's arguments, or velocity")
    add("--vae", help="autoencoder of its latents (default: stabilityai/sd-vae-ft-ema at 0.18215, which is not opened)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    flags = {key: value for key, value in vars(_parser().parse_args(argv)).items() if value is not None}
    source, out, vae = flags.pop("released"), flags.pop("out"), flags.pop("vae", None)
    with exit_on_input_error():
        require_free(out)
        released = read_released(source, flags.pop("weights", None))
        model = convert(released, **flags)
        if vae is not None:
            spec = load_autoencoder(vae, channels=model.config.in_channels).spec
            model.register_to_config(latents=spec.to_dict())
        save_converted(model, released, out)

        config = model.config
        log.info(
            "%s: %d blocks (%s) of width %d, patch %d, %s, latents of side %d, %s parameters.",
            out,
            config.depth,
            describe_pattern(config.mixer_pattern),
            config.hidden_size,
            config.patch_size,
            f"{config.num_classes} classes" if config.num_classes else "unconditional",
            config.input_size,
            f"{model.num_parameters():,}",
        )
        if released.projectors:
            log.info("REPA's projectors are kept in %s: model.init_from starts from them, too.", out / PROJECTORS_NAME)
        if config.latents is None:
            log.warning("Its latents have %d channels: sampling needs --vae.", config.in_channels)


if __name__ == "__main__":
    main()
